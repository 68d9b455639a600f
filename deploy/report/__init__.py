"""The report of a bundle: `report.html` for people, `report.md` for terminals and pull requests.

Both are rendered from the manifest alone, and from the raw latency samples where something was measured. The page is
one file: its script is inlined once, its content security policy forbids every request, and each figure carries the
origin that the manifest gives it. What is absent is said to be absent.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deploy.manifest import Manifest
from deploy.report import formats, markdown, plots, tables, verdicts
from deploy.report.page import content_security_policy, inline, page_script, vega_script
from deploy.report.samples import read_samples

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"

_FOLDER = Path(__file__).parent


def report(manifest: Manifest, bundle: Path) -> None:
    """Write `report.html` and `report.md` into the folder `bundle`.

    Raises:
        GpusqError: the manifest names raw latency samples that are not in the bundle, or are damaged.
    """
    samples = read_samples(bundle / manifest.measured.raw) if manifest.measured else None
    environment = _environment()
    facts = {"manifest": manifest, "cards": verdicts.cards(manifest)}
    style, scripts = inline("report.css"), (vega_script(), page_script())
    html = environment.get_template("report.html.j2").render(
        facts,
        plots=plots.plots(manifest, samples),
        style=style,
        scripts=scripts,
        policy=content_security_policy(style, scripts),
    )
    text = environment.get_template("report.md.j2").render(facts)
    (bundle / HTML_NAME).write_text(html, encoding="utf-8", newline="\n")
    (bundle / MARKDOWN_NAME).write_text(text, encoding="utf-8", newline="\n")


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.globals.update(tables=tables, verdicts=verdicts)
    environment.filters.update(
        count=formats.count,
        unbroken=formats.unbroken,
        short_hash=formats.short_hash,
        aligned=markdown.aligned,
        plain=markdown.plain,
        indented=markdown.indented,
    )
    return environment
