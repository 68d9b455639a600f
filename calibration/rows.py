"""Arrays [N, …] whose rows are read or computed when they are asked for.

    rows.shape, rows.dtype, len(rows)      are known at once
    rows[np.array([3, 17])]                a plain array [2, …], made now and kept by nobody

So 512 photos never lie in memory at once. A numpy array, mapped from a file or not, is such a thing as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Index = npt.NDArray[np.intp]
_BATCH = 64


class Rows(Protocol):
    """An array [N, …], of which any rows can be had by an array of their numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, N first."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of what indexing returns."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Index, /) -> Array: ...


@dataclass(frozen=True)
class Computed:
    """Rows that `compute` makes of their numbers, int [M] → [M, …]."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    compute: Callable[[Index], Array]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Index | slice, /) -> Array:
        return self.compute(np.arange(len(self))[rows])


def chosen(rows: Rows, index: Index) -> Rows:
    """The rows with the numbers `index`, in that order; `rows` itself where that is all of them."""
    if np.array_equal(index, np.arange(len(rows))):
        return rows
    return Computed((len(index), *rows.shape[1:]), rows.dtype, lambda asked: rows[index[asked]])


def head(rows: Rows, count: int) -> Rows:
    """The first `count` rows, or all where there are no more."""
    return chosen(rows, np.arange(min(count, len(rows))))


def converted(rows: Rows, dtype: str, convert: Callable[[Array], Array]) -> Rows:
    """`rows` with every batch of them made into `dtype` by `convert`, which keeps its shape."""
    target = np.dtype(dtype)
    return Computed(rows.shape, target, lambda asked: convert(rows[asked]).astype(target, copy=False))


def stacked(parts: Sequence[Rows]) -> Rows:
    """The rows of all `parts`, one after the other; their shapes differ in the first axis alone."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part) for part in parts)])

    def compute(asked: Index) -> Array:
        found = np.empty((len(asked), *parts[0].shape[1:]), parts[0].dtype)
        of = np.searchsorted(starts, asked, side="right") - 1
        for number in np.unique(of):
            found[of == number] = parts[number][asked[of == number] - starts[number]]
        return found

    return Computed((int(starts[-1]), *parts[0].shape[1:]), parts[0].dtype, compute)


def zeros(shape: tuple[int, ...], dtype: str) -> Rows:
    """Rows of nothing but zeros."""
    return Computed(shape, np.dtype(dtype), lambda asked: np.zeros((len(asked), *shape[1:]), dtype))


def all_of(rows: Rows) -> Array:
    """All rows in memory."""
    return rows[np.arange(len(rows))]


def batches(count: int, size: int = _BATCH) -> Iterator[Index]:
    """The numbers 0 … `count` − 1, `size` at a time."""
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))
