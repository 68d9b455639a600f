"""What one input of a model takes, as far as samples need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field


@dataclass(frozen=True)
class InputSpec:
    """One input: its shape without the batch, and how a uint8 sample becomes the float that it takes."""

    shape: tuple[Annotated[int, Field(gt=0)], ...]
    dtype: str
    scale: float = 1.0
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0


@dataclass(frozen=True)
class SampleSpec(InputSpec):
    """An input of a model at hand: `dynamic` names the axes of `shape` whose length may vary."""

    dynamic: tuple[int, ...] = ()


def varying_axes(spec: InputSpec) -> tuple[int, ...]:
    """The axes of a sample whose length may vary; what a student file describes has none."""
    return spec.dynamic if isinstance(spec, SampleSpec) else ()


def fits(shape: tuple[int, ...], spec: InputSpec) -> bool:
    """Whether a sample of `shape` is what the input takes."""
    varying = varying_axes(spec)
    return len(shape) == len(spec.shape) and all(
        found == wanted or axis in varying for axis, (found, wanted) in enumerate(zip(shape, spec.shape, strict=True))
    )


def words(spec: InputSpec) -> str:
    """The shape of a batch, `N×3×224×224`, with `?` for what may vary."""
    varying = varying_axes(spec)
    return "×".join(["N", *("?" if axis in varying else str(dim) for axis, dim in enumerate(spec.shape))])
