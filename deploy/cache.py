"""Where gpusq keeps what it may need again: `$XDG_CACHE_HOME/gpusq`, or `~/.cache/gpusq`; it may be deleted."""

from __future__ import annotations

import os
from pathlib import Path


def search_folder() -> Path:
    """The folder for what searches have found out; it need not be there."""
    return _root() / "searches"


def _root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "gpusq"
