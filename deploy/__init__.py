"""The command line and the steps after ONNX: convert, build, plan, verify, bench, report.

`from deploy import convert` is the whole way from a checkpoint to bundles.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.conversion import Conversion, convert

__all__ = ["Conversion", "convert"]


def __getattr__(name: str) -> Any:
    # `import deploy.cli` must not pay for what only a conversion needs.
    if name in __all__:
        return getattr(importlib.import_module("deploy.conversion"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
