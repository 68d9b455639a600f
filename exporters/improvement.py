"""The named ways to lose less by quantization than the default, which takes every range as it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

Improvement = Literal["mse-weights", "smooth-quant", "equalize", "error-feedback", "bias-correction"]
IMPROVEMENTS: tuple[Improvement, ...] = get_args(Improvement)


def measures_samples(improvements: Collection[Improvement]) -> bool:
    """Whether any of them has to see the model run on samples."""
    return any(improvement != "mse-weights" for improvement in improvements)
