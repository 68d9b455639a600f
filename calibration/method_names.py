"""The names of the methods, apart from what computes by them: the command line lists them without numpy."""

from __future__ import annotations

from typing import Literal, get_args

MethodName = Literal["max", "percentile", "entropy", "mse"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
PERCENTILE = 99.99
