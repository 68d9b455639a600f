"use strict";
(() => {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const options = {
    actions: false,
    ast: true, // the expression interpreter: the page's policy forbids eval
    defaultStyle: false,
    renderer: "svg",
    tooltip: { theme: "report", disableDefaultStyle: true },
  };
  for (const [name, spec] of Object.entries(plots)) {
    const place = document.getElementById(`plot-${name}`);
    window.vegaEmbed(place, spec, options).catch((error) => {
      place.textContent = "This plot could not be drawn. The tables of this section hold its figures.";
      console.error(name, error);
    });
  }
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
