"""Count and make the zeros of structured sparsity: 2:4, and 4:8 in pairs for 4-bit values.

    2:4   a 0 0 b                 of every four values along K at least two are zero
    4:8   a b 0 0 0 0 c d         of every four pairs along K at least two are zero

Both are two units of four, a unit being one value or a pair. NVIDIA's sparse tensor cores take 8- and 16-bit operands
in the first form and 4-bit ones in the second (PTX ISA, "Sparse matrix storage" of mma.sp; the granularities of
tcgen05.mma.sp: ".kind::mxf4 4:8 (in pairs)").

−0 is a zero. NaN is a value. Groups of nothing but zeros fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

UNITS = 4
KEPT = 2
FOUR_BIT = frozenset({"int4", "uint4", "float4_e2m1fn"})
_CHUNK = 1 << 20  # values; the masks of a chunk stay in the processor's cache
_ONES = np.uint32(0x01010101)
_THREE = np.uint32(0x03000000)
# Types that numpy compares slowly: the bits of a magnitude, and the largest magnitude that is a number.
_MAGNITUDES: dict[str, tuple[type[np.unsignedinteger], int, int]] = {
    "float16": (np.uint16, 0x7FFF, 0x7C00),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float8_e4m3fn": (np.uint8, 0x7F, 0x7E),
    "float8_e5m2": (np.uint8, 0x7F, 0x7C),
    "float4_e2m1fn": (np.uint8, 0x07, 0x07),
    "int4": (np.uint8, 0x0F, 0x0F),
    "uint4": (np.uint8, 0x0F, 0x0F),
}


@dataclass(frozen=True)
class Pattern:
    """Two units of four along K.

    Attributes:
        name: `2:4` or `4:8`.
        width: values of a unit.
    """

    name: str
    width: int

    @property
    def group(self) -> int:
        """Values of a group."""
        return UNITS * self.width


TWO_FOUR = Pattern("2:4", 1)
FOUR_EIGHT = Pattern("4:8", 2)


@dataclass(frozen=True)
class Census:
    """What was counted in a weight.

    Attributes:
        size: values of the weight.
        values: values that are not zero, NaN among them.
        nans: values that are NaN.
        groups: groups along K; 0 where K is no multiple of a group.
        broken: groups with more than two units that are not zero.
    """

    size: int
    values: int
    nans: int
    groups: int
    broken: int

    @property
    def zeros(self) -> float:
        """Share of the values that are zero."""
        return 1.0 - self.values / self.size if self.size else 0.0

    @property
    def fits(self) -> bool:
        """Whether the weight has groups and none of them breaks the pattern."""
        return self.groups > 0 and self.broken == 0


def count_zeros(weight: Array, axis: int, pattern: Pattern = TWO_FOUR) -> Census:
    """Count the values of `weight` and the groups along `axis` that break `pattern`.

    Nothing of the weight's size is allocated, unless it is neither C- nor Fortran-contiguous.

    Args:
        weight: of any shape and any real type, those of ml_dtypes among them.
        axis: K.
        pattern: what a group is.
    """
    axis %= weight.ndim
    if not weight.flags.c_contiguous and weight.flags.f_contiguous:
        weight, axis = weight.T, weight.ndim - 1 - axis
    length, inner = weight.shape[axis], prod(weight.shape[axis + 1 :])
    whole = length % pattern.group == 0
    rows = np.ascontiguousarray(weight).reshape(-1, pattern.group if whole else 1, inner)
    values = nans = broken = 0
    for chunk in _chunks(rows):
        mask, bad = _not_zero(chunk)
        values += int(np.count_nonzero(mask))
        nans += bad
        broken += _broken(mask, pattern) if whole else 0
    return Census(weight.size, values, nans, weight.size // pattern.group if whole else 0, broken)


def prune(weight: Array, axis: int, pattern: Pattern = TWO_FOUR) -> Array:
    """Return a copy of `weight` in which each group along `axis` that breaks `pattern` keeps its two largest units.

    The others become 0; of equal ones the first are kept. Of a pair it is the sum of squares that counts: this is the
    nearest weight of the pattern in the sense of least squares. Groups that fit are not touched.
    """
    moved = np.moveaxis(weight.copy(), axis, -1)
    groups = np.ascontiguousarray(moved).reshape(-1, UNITS, pattern.width)
    mask, _ = _not_zero(groups)
    broken = np.count_nonzero(mask.any(axis=2), axis=1) > KEPT
    squares = np.square(groups[broken].astype(np.float64)).sum(axis=2)
    dropped = np.argsort(-squares, axis=1, kind="stable")[:, KEPT:]
    groups[np.flatnonzero(broken)[:, None], dropped] = 0
    return np.ascontiguousarray(np.moveaxis(groups.reshape(moved.shape), -1, axis))


def _chunks(rows: Array) -> Iterator[Array]:
    step = max(1, _CHUNK // max(1, prod(rows.shape[1:])))
    return (rows[start : start + step] for start in range(0, len(rows), step))


def _not_zero(values: Array) -> tuple[npt.NDArray[np.bool_], int]:
    """Where `values` are not zero, and how many of them are NaN."""
    known = _MAGNITUDES.get(values.dtype.name)
    if known is not None:
        unsigned, bits, largest = known
        magnitudes = values.view(unsigned) & unsigned(bits)
        return magnitudes != 0, int(np.count_nonzero(magnitudes > largest))
    whole = np.issubdtype(values.dtype, np.integer)
    return np.not_equal(values, 0), 0 if whole else int(np.count_nonzero(np.not_equal(values, values)))


def _broken(mask: npt.NDArray[np.bool_], pattern: Pattern) -> int:
    """Groups with more than two units that are not zero; `mask` is [groups, values of a group, inner]."""
    units = mask if pattern.width == 1 else mask[:, 0::2] | mask[:, 1::2]
    if units.shape[2] == 1:  # the four bytes of a group are one word, and the product's top byte is their sum
        sums = np.ascontiguousarray(units).reshape(-1).view(np.uint32) * _ONES
        return int(np.count_nonzero(sums >= _THREE))
    ones = units.view(np.uint8)
    count = ones[:, 0] + ones[:, 1]
    count += ones[:, 2]
    count += ones[:, 3]
    return int(np.count_nonzero(count > KEPT))
