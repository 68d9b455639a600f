"""The names of the methods, apart from what computes by them: the command line lists them without numpy."""

from __future__ import annotations

from typing import Literal, get_args

MethodName = Literal["max", "percentile", "entropy", "mse", "least-loss"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
LEAST_LOSS: MethodName = "least-loss"
PERCENTILE = 99.99
