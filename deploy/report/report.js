"use strict";
(() => {
  const tip = document.getElementById("tip");
  const tiles = [...document.querySelectorAll("[data-tip]")];
  let shown = null;

  // What a tile says stands beside it, inside the window; the name of an element says the same to a screen reader.
  const show = (tile) => {
    shown?.classList.remove("shown");
    shown = tile;
    tile.classList.add("shown");
    tip.textContent = tile.getAttribute("aria-label");
    tip.hidden = false;
    const place = tile.getBoundingClientRect();
    const left = Math.min(place.left, innerWidth - tip.offsetWidth - 8);
    const below = place.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${below ? place.bottom + 8 : place.top - 8 - tip.offsetHeight}px`;
  };
  const hide = () => {
    shown?.classList.remove("shown");
    shown = null;
    tip.hidden = true;
  };
  const step = (tile, by) => {
    const own = [...tile.closest(".drawing").querySelectorAll("[data-tip]")];
    const next = own[Math.min(Math.max(own.indexOf(tile) + by, 0), own.length - 1)];
    tile.setAttribute("tabindex", "-1"); // one stop for Tab in each drawing
    next.setAttribute("tabindex", "0");
    next.focus();
  };
  const keys = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  for (const tile of tiles) {
    tile.addEventListener("pointerenter", () => show(tile));
    tile.addEventListener("pointerleave", hide);
    tile.addEventListener("focus", () => show(tile));
    tile.addEventListener("blur", hide);
    tile.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hide();
      if (!(event.key in keys)) return;
      event.preventDefault();
      step(tile, keys[event.key]);
    });
  }
  addEventListener("scroll", hide, { passive: true });
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
