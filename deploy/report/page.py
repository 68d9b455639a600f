"""What the page is built of besides the facts: its style, its scripts, and the policy that forbids requests.

The scripts and the style are allowed by their SHA-256 and nothing else is: a script that a hostile name smuggled in
would not run, and the file can ask for no image, font, style sheet or connection. Vega evaluates its expressions with
an interpreter (`ast: true`), so the policy needs no `unsafe-eval`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from markupsafe import Markup

_FOLDER = Path(__file__).parent


def inline(name: str) -> Markup:
    """Return the text of a file of this folder, for a `<style>` or `<script>` element."""
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def page_script() -> Markup:
    """Return the script that draws the plots."""
    return inline("report.js")


@cache
def vega_script() -> Markup:
    """Return Vega, Vega-Lite and Vega-Embed as one script that sets `window.vegaEmbed`; takes seconds, once."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # Inside a script element the parser looks for these three; in JavaScript's strings the backslash changes nothing.
    script = re.sub(r"<(?=/script|script|!--)", r"\\x3c", script, flags=re.IGNORECASE)
    return Markup(script.replace("\r\n", "\n"))


def content_security_policy(style: str, scripts: Iterable[str]) -> str:
    """Return the policy under which exactly this style and these scripts are used, and nothing is loaded."""
    allowed = " ".join(_source(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
