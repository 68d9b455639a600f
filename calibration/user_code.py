"""Code that users name on the command line, such as `module:function`, may lie where they are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def working_directory_importable() -> Iterator[None]:
    """Let the user's code be found where the user is, as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
