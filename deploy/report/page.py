"""What the page is built of besides the facts: its style, its script, and the policy that forbids requests.

The script and the style are allowed by their SHA-256 and nothing else is: a script that a hostile name smuggled in
would not run, and the file can ask for no image, font, style sheet or connection.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from markupsafe import Markup

_FOLDER = Path(__file__).parent


def inline(name: str) -> Markup:
    """Return the text of a file of this folder, for a `<style>` or `<script>` element."""
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def content_security_policy(style: str, script: str) -> str:
    """Return the policy under which exactly this style and this script are used, and nothing is loaded."""
    return (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
