"""The report: `report.html` for people, `report.md` for terminals and pull requests.

Both are rendered from one `Document`, so that they say the same. The page is one file: its script is inlined, its
content security policy forbids every request, its drawings are there without the script, and each figure carries its
origin. What is absent is said to be absent.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deploy.manifest import Manifest
from deploy.report import formats, markdown
from deploy.report.bundle_page import Beside, bundle_page
from deploy.report.document import ORIGINS, Document
from deploy.report.page import content_security_policy, inline
from deploy.report.samples import Samples, read_samples

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"

_FOLDER = Path(__file__).parent
_MARKS = {"good": "✓", "bad": "✗", "open": "○", "absent": "–"}


def report(manifest: Manifest, bundle: Path, beside: Beside | None = None) -> Document:
    """Write `report.html` and `report.md` into the folder `bundle`, and return what they say.

    Args:
        manifest: what is known of the bundle.
        bundle: its folder.
        beside: what else is known: timings of a history, predictions, claims.

    Raises:
        GpusqError: the manifest names raw latency samples that are not in the bundle, or are damaged.
    """
    document = bundle_page(manifest, read_bundle_samples(manifest, bundle), beside)
    write(document, bundle / HTML_NAME, bundle / MARKDOWN_NAME)
    return document


def read_bundle_samples(manifest: Manifest, bundle: Path) -> Samples | None:
    """The raw latencies of a bundle's measurement; None where there is none.

    Raises:
        GpusqError: the file is missing or damaged.
    """
    return read_samples(bundle / manifest.measured.raw) if manifest.measured else None


def write(document: Document, page: Path, text: Path) -> None:
    """Write a document as a page and as Markdown."""
    page.write_text(to_html(document), encoding="utf-8", newline="\n")
    text.write_text(to_markdown(document), encoding="utf-8", newline="\n")


def to_html(document: Document) -> str:
    """The document as one page that loads nothing."""
    style, script = inline("report.css"), inline("report.js")
    policy = content_security_policy(style, script)
    return _render("report.html.j2", document=document, style=style, script=script, policy=policy)


def to_markdown(document: Document) -> str:
    """The document as Markdown that reads well as plain text."""
    return _render("report.md.j2", document=document)


def _render(template: str, **facts: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(marks=_MARKS, origins=ORIGINS)
    environment.filters.update(
        unbroken=formats.unbroken,
        short_hash=formats.short_hash,
        aligned=markdown.aligned,
        plain=markdown.plain,
        indented=markdown.indented,
    )
    return environment.get_template(template).render(facts)
