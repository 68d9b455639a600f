"""Zstandard, by the API of Python 3.14's own module: that, or its backport for older Pythons."""

from __future__ import annotations

import importlib.util
from typing import Any

from profiles.errors import GpusqError

_MODULES = ("compression.zstd", "backports.zstd")


def import_zstd() -> Any:
    """Return the module.

    Raises:
        GpusqError: this Python has neither.
    """
    for name in filter(_has, _MODULES):
        return importlib.import_module(name)
    raise GpusqError("this Python has no Zstandard", hint="pip install backports.zstd")


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
