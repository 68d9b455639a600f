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
class Change:
    """Something that a pass changed: where, and what it did there."""

    where: str
    what: str


@dataclass(frozen=True)
class Outcome:
    """What one pass did to a model.

    Attributes:
        name: what the pass does, in words.
        changed: how many places it changed.
        left_alone: what it could have changed and did not, with the reason.
        changes: the places one by one, where each is a decision.
    """

    name: str
    changed: int
    left_alone: tuple[LeftAlone, ...] = ()
    changes: tuple[Change, ...] = ()


class Pass(Protocol):
    """A step of the graph surgery."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Edit `model` in place."""
        ...
