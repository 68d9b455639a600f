from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exporters import zero_pattern
from exporters.zero_pattern import FOUR_EIGHT, TWO_FOUR, Census, Pattern, count_zeros, prune

Weight = npt.NDArray[Any]

INTEGERS = (np.int8, np.uint8, ml_dtypes.int4, ml_dtypes.uint4)
FLOATS = (
    *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float4_e2m1fn),
)
WITH_NAN = [dtype for dtype in FLOATS if dtype is not ml_dtypes.float4_e2m1fn]
patterns = st.sampled_from([TWO_FOUR, FOUR_EIGHT])


@st.composite
def weights(draw: st.DrawFn) -> tuple[Weight, int]:
    """Of one to four axes and any type, mostly zeros, C-, Fortran- or not contiguous; and an axis of it."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] = draw(st.sampled_from([4, 8, 16, 24, 6]))
    dtype = draw(st.sampled_from([*INTEGERS, *FLOATS]))
    some = [0, 0, 0, 1, 2, 7] if dtype in INTEGERS else [0.0, -0.0, 0.0, 1.0, -2.0, 0.5]
    some += [np.nan] if dtype in WITH_NAN else []
    drawn = draw(hnp.arrays(np.float32, tuple(shape), elements=st.sampled_from(some))).astype(dtype)
    way = draw(st.sampled_from(["C", "Fortran", "neither"]))
    if way == "Fortran":
        drawn = np.asfortranarray(drawn)
    elif way == "neither":
        drawn = np.repeat(drawn, 2, axis=axis).take(range(0, 2 * shape[axis], 2), axis=axis)[..., ::-1]
    return drawn, axis


def groups_of(weight: Weight, axis: int, size: int) -> Iterator[list[float]]:
    """One by one, as the definition says."""
    others = [range(length) for index, length in enumerate(weight.shape) if index != axis]
    for place in np.ndindex(*(len(other) for other in others)):
        line = [float(weight[(*place[:axis], k, *place[axis:])]) for k in range(weight.shape[axis])]
        yield from (line[start : start + size] for start in range(0, len(line), size))


def breaks(group: list[float], width: int) -> bool:
    units = [group[start : start + width] for start in range(0, len(group), width)]
    return sum(any(value != 0 for value in unit) for unit in units) > 2


def naive(weight: Weight, axis: int, pattern: Pattern) -> Census:
    values = [float(value) for value in weight.ravel()]
    whole = weight.shape[axis] % pattern.group == 0
    groups = list(groups_of(weight, axis, pattern.group)) if whole else []
    return Census(
        size=weight.size,
        values=sum(value != 0 for value in values),
        nans=sum(value != value for value in values),
        groups=len(groups),
        broken=sum(breaks(group, pattern.width) for group in groups),
    )


@given(weights(), patterns)
def test_counts_as_the_definition_says(weight: tuple[Weight, int], pattern: Pattern) -> None:
    assert count_zeros(*weight, pattern) == naive(*weight, pattern)


@given(weights(), patterns, st.integers(1, 40))
def test_counts_the_same_in_chunks_of_any_size(weight: tuple[Weight, int], pattern: Pattern, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_pattern, "_CHUNK", chunk)
        assert count_zeros(*weight, pattern) == naive(*weight, pattern)


def test_counts_more_than_one_chunk() -> None:
    weight = np.zeros((zero_pattern._CHUNK // 64 + 3, 128), np.int8)
    weight[-1, -3:] = weight[0, :3] = 1
    assert count_zeros(weight, 1) == Census(weight.size, 6, 0, weight.size // 4, 2)
    assert count_zeros(np.ascontiguousarray(weight.T), 0) == count_zeros(weight, 1) == count_zeros(weight.T, 0)


def test_an_axis_may_be_counted_from_the_end() -> None:
    weight = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert count_zeros(weight, -1) == count_zeros(weight, 1)
    assert count_zeros(weight, -1).broken == 1


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
def test_an_all_zero_weight_fits(dtype: npt.DTypeLike) -> None:
    for pattern in (TWO_FOUR, FOUR_EIGHT):
        counted = count_zeros(np.zeros((8, 32), dtype), 1, pattern)
        assert (counted.fits, counted.zeros, counted.broken) == (True, 1.0, 0)


@pytest.mark.parametrize("dtype", WITH_NAN)
def test_a_nan_is_a_value_and_is_counted(dtype: npt.DTypeLike) -> None:
    counted = count_zeros(np.array([[1, np.nan, np.nan, 0], [0, np.nan, 0, 0]], np.float32).astype(dtype), 1)
    assert (counted.values, counted.nans, counted.broken) == (4, 3, 1)


def test_infinity_is_no_nan() -> None:
    for dtype in (np.float16, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2):
        assert count_zeros(np.array([np.inf, -np.inf, 0, 0], np.float32).astype(dtype), 0).nans == 0


def test_the_two_patterns_differ() -> None:
    pairs = np.array([1, 2, 0, 0, 0, 0, 3, 4], ml_dtypes.int4)
    spread = np.array([1, 0, 2, 0, 0, 3, 0, 4], ml_dtypes.int4)
    ends = np.array([1, 2, 3, 4, 0, 0, 0, 0], ml_dtypes.int4)
    assert [count_zeros(weight, 0).broken for weight in (pairs, spread, ends)] == [0, 0, 1]
    assert [count_zeros(weight, 0, FOUR_EIGHT).broken for weight in (pairs, spread, ends)] == [0, 1, 0]


@given(weights(), patterns)
def test_pruning_mends_broken_groups_and_nothing_else(weight: tuple[Weight, int], pattern: Pattern) -> None:
    before, axis = weight
    if before.shape[axis] % pattern.group or count_zeros(before, axis).nans:
        return
    after = prune(before, axis, pattern)
    assert (after.dtype, after.shape) == (before.dtype, before.shape)
    assert count_zeros(after, axis, pattern).fits
    for old, new in zip(groups_of(before, axis, pattern.group), groups_of(after, axis, pattern.group), strict=True):
        assert new == (nearest(old, pattern.width) if breaks(old, pattern.width) else old)
    assert prune(after, axis, pattern).tobytes() == after.tobytes()


def nearest(group: list[float], width: int) -> list[float]:
    """The group with its two largest units, the first ones of equals."""
    units = [group[start : start + width] for start in range(0, len(group), width)]
    ranked = sorted(range(len(units)), key=lambda index: (-sum(value * value for value in units[index]), index))
    return [value for index, unit in enumerate(units) for value in (unit if index in ranked[:2] else [0.0] * width)]


def test_pruning_takes_minus_128_for_the_largest() -> None:
    assert prune(np.array([-128, 127, 126, 1], np.int8), 0).tolist() == [-128, 127, 0, 0]


def test_pruning_ranks_numbers_whose_squares_a_float32_cannot_hold() -> None:
    tiny = np.array([1e-30, 2e-30, 3e-30, 0], np.float32)
    assert np.flatnonzero(prune(tiny, 0)).tolist() == [1, 2]


def test_pruning_leaves_its_argument_alone() -> None:
    weight = np.array([4, 3, 2, 1], np.int8)
    weight.flags.writeable = False
    assert prune(weight, 0).tolist() == [4, 3, 0, 0]
    assert weight.tolist() == [4, 3, 2, 1]
