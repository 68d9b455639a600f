from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.weight_scales import WeightMethod, weight_amax

Float = npt.NDArray[np.float32]


def random(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def error(w: Float, amax: Float, low: int, high: int) -> Float:
    """The squared error of each column."""
    scale = np.where(amax > 0, amax, 1) / np.float32(high)
    return np.asarray(np.square(np.clip(np.rint(w / scale), low, high) * scale - w).sum(axis=0))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_max_is_the_largest_magnitude(axis: int | None) -> None:
    w = random(6, 8)
    expected = np.abs(w).max() if axis is None else np.abs(w).max(axis=1 - axis)
    np.testing.assert_array_equal(weight_amax(w, axis), expected)


def test_blocks_lie_along_their_axis() -> None:
    w = random(8, 3)
    expected = np.abs(w.reshape(2, 4, 3)).max(axis=1)
    np.testing.assert_array_equal(weight_amax(w, 0, 4), expected)
    np.testing.assert_array_equal(weight_amax(w.T, 1, 4), expected.T)


@given(st.integers(0, 50), st.sampled_from([(-8, 7), (-128, 127)]))
def test_mse_has_no_larger_error_than_max(seed: int, limits: tuple[int, int]) -> None:
    w = random(64, 4, seed=seed)
    low, high = limits
    by_max = error(w, weight_amax(w, 1, low=low, high=high), low, high)
    by_mse = error(w, weight_amax(w, 1, low=low, high=high, method="mse"), low, high)
    assert (by_mse <= by_max * (1 + 1e-5)).all()


def test_mse_clips_an_outlier_of_four_bits() -> None:
    w = random(128, 1)
    w[0] = 5
    assert weight_amax(w, 1, low=-8, high=7, method="mse") < 5


@given(st.integers(0, 30), st.integers(1, 4))
def test_pruned_values_do_not_count(seed: int, kept: int) -> None:
    """The scales of a weight are those of the values that pruning kept."""
    w = random(16, 1, seed=seed)
    sparse = np.zeros((64, 1), np.float32)
    sparse[seed % kept :: 4][:16] = w
    methods: tuple[WeightMethod, ...] = ("max", "mse")
    for method in methods:
        found = weight_amax(sparse, 1, high=7, low=-8, method=method)
        np.testing.assert_array_equal(found, weight_amax(w, 1, high=7, low=-8, method=method))


def test_a_dead_channel_has_amax_zero() -> None:
    w = random(8, 2)
    w[:, 1] = 0
    assert weight_amax(w, 1, method="mse")[1] == 0


def test_what_is_not_finite_is_seen_as_such() -> None:
    w = random(8, 2)
    w[0, 0] = np.inf
    assert weight_amax(w, 1, method="mse")[0] == np.inf
