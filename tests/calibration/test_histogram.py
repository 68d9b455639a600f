from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.histogram import OCTAVES, Histogram, merged

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
ARRAYS = hnp.arrays(np.float32, st.integers(1, 40), elements=FINITE)


def counted(*arrays: npt.ArrayLike) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.add(np.asarray(array, np.float32))
    return histogram


def same(a: Histogram, b: Histogram) -> bool:
    return a.bits == b.bits and np.array_equal(a.counts, b.counts)


@given(ARRAYS)
def test_counts_as_numpy_does_with_the_same_edges(values: npt.NDArray[np.float32]) -> None:
    histogram = counted(values)
    expected, _ = np.histogram(np.abs(values).astype(np.float64), histogram.edges)
    assert np.array_equal(histogram.counts, expected)
    assert histogram.count == values.size


@given(ARRAYS)
def test_knows_the_largest_magnitude_exactly(values: npt.NDArray[np.float32]) -> None:
    assert counted(values).amax == np.abs(values).max()


@given(st.lists(ARRAYS, min_size=1, max_size=5))
def test_neither_order_nor_parts_matter(parts: list[npt.NDArray[np.float32]]) -> None:
    whole = counted(np.concatenate(parts))
    shuffled = sorted(parts, key=lambda part: float(part[0]))
    assert same(whole, counted(*shuffled))
    assert same(whole, merged(counted(part) for part in shuffled))


def test_a_bin_is_at_most_a_2048th_of_its_value_wide() -> None:
    edges = counted([3.0]).edges
    assert np.all(np.diff(edges)[1:] <= edges[1:-1] * 2.0**-11)
    assert edges[-1] == 4
    assert edges[1] == 4 * 2.0**-OCTAVES


def test_what_a_larger_value_leaves_below_the_window_is_counted_as_zero() -> None:
    histogram = counted([1.0, 1.5, 2.0**-10], [2.0**10])
    assert histogram.counts[0] == 1
    assert histogram.count == 4


def test_the_window_moves_up_to_the_bin() -> None:
    first = np.float32(2.0**-5)  # of the 16 octaves below 2¹¹
    histogram = counted([1.0, first, np.nextafter(first, np.float32(0))], [2.0**10])
    assert histogram.counts[:2].tolist() == [1, 1]
    assert histogram.count == 4


def test_root_mean_square_agrees_with_numpy() -> None:
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    assert counted(x).rms == pytest.approx(np.sqrt(np.mean(x.astype(np.float64) ** 2)), rel=2.0**-12)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_notices_what_is_not_finite(value: float) -> None:
    assert not counted([1.0, value]).finite
    assert not merged([counted([1.0]), counted([value])]).finite
    assert counted([1.0]).finite


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_counts_other_types_as_float32(dtype: type[np.floating[npt.NBitBase]]) -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, 2)).astype(dtype)
    assert same(counted(x), counted(x.astype(np.float32)))


def test_counts_what_is_not_contiguous() -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert same(counted(x.T[::2]), counted(x.T[::2].copy()))
