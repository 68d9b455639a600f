"""Published figures that differ in one thing, FP16 beside INT8 or dense beside 2:4, of one device, model and batch.

They come from one source. Their ratio is a speed-up, and is known better than either figure: what a source does unlike
others, or the model gets wrong of a network, is common to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from profiles.published import PublishedLatency

Step = Literal["int8", "2:4"]
STEPS: tuple[Step, ...] = ("int8", "2:4")
Array = npt.NDArray[np.float64]


def pairs_of(rows: Sequence[PublishedLatency], step: Step) -> list[tuple[int, int]]:
    """The indices of what is slow, FP16 or dense, and of what is fast, INT8 or 2:4."""
    slow = {_key(row, step): index for index, row in enumerate(rows) if _is_slow(row, step)}
    return [
        (slow[_key(row, step)], index)
        for index, row in enumerate(rows)
        if _is_fast(row, step) and _key(row, step) in slow
    ]


def all_pairs(rows: Sequence[PublishedLatency]) -> list[tuple[int, int]]:
    """The pairs of every step."""
    return [pair for step in STEPS for pair in pairs_of(rows, step)]


def _key(row: PublishedLatency, step: Step) -> tuple[object, ...]:
    number = row.number if step == "2:4" else ""
    return row.device, row.works, row.size, row.batch, row.page, row.software.split(" p9")[0], number


def _is_slow(row: PublishedLatency, step: Step) -> bool:
    return not row.pruned and (step == "2:4" or row.number == "fp16")


def _is_fast(row: PublishedLatency, step: Step) -> bool:
    return row.pruned if step == "2:4" else row.number == "int8" and not row.pruned
