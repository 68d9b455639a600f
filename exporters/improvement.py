"""The named ways to lose less by quantization than the default, which takes every range as it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from profiles.errors import GpusqError

Improvement = Literal["auto", "mse-weights", "smooth-quant", "equalize", "error-feedback", "bias-correction"]
IMPROVEMENTS: tuple[Improvement, ...] = get_args(Improvement)
AUTO: Improvement = "auto"  # choose among the others by what the model loses
AUTO_FEWEST = 8  # samples on which that can be told

# What each of these placements can be improved by; the others know integers alone.
_OF_FLOATS: dict[str, tuple[Improvement, ...]] = {
    "fp8": ("bias-correction",),
    "fp8-mha": ("bias-correction",),
    "nvfp4": (),
}


_RANGES = ("max", "percentile")  # the other methods weigh the rounding to integers


def check_improvable(
    placement: str, improve: Collection[Improvement], *, target_drop: float | None = None, method: str = "max"
) -> None:
    """Raise GpusqError where something is for integers and the placement rounds to floats."""
    if AUTO in improve and len(improve) > 1:
        other = next(name for name in improve if name != AUTO)
        raise GpusqError(f"--improve auto chooses by itself, and {other} was asked for", hint="give one of the two")
    unfit: list[str] = [name for name in improve if name not in _OF_FLOATS.get(placement, IMPROVEMENTS)]
    if placement in _OF_FLOATS and target_drop is not None:
        unfit.append("--target-drop")
    if placement in _OF_FLOATS and method not in _RANGES:
        unfit.append(f"--method {method}")
    if unfit:
        raise GpusqError(
            f"{unfit[0]} is for integers, and placement {placement} rounds to floats",
            hint="leave it out, or use --placement w8a8-linear",
        )


def tried_on(placement: str) -> tuple[Improvement, ...]:
    """What `auto` chooses among."""
    return () if placement in _OF_FLOATS else IMPROVEMENTS[1:]


def measures_samples(improvements: Collection[Improvement]) -> bool:
    """Whether any of them has to see the model run on samples."""
    return any(improvement != "mse-weights" for improvement in improvements)
