"""What a pass did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir


@dataclass(frozen=True)
class LeftAlone:
    """Something that a pass did not change, and why."""

    where: str
    why: str


@dataclass(frozen=True)
class Outcome:
    """What one pass did to a model."""

    name: str
    changed: int
    left_alone: tuple[LeftAlone, ...] = ()


class Pass(Protocol):
    """A step of the graph surgery."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Edit `model` in place."""
        ...
