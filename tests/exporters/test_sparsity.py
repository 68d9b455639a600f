from __future__ import annotations

from fractions import Fraction
from math import ceil

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exporters.sparsity import compressed_bytes, count_broken_groups, sparsity_of
from profiles.device import SparseKernels, load_device

Weight = npt.NDArray[np.generic]

FREE = SparseKernels(int8_k_multiple=32, float16_k_multiple=16, int8_wants_int8_output=False, source="this test")


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    """[4a, b] or [a, 4b], mostly zeros, a few of them negative, as int8, float16 or float32."""
    rows, columns = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    shape = draw(st.sampled_from([(4 * rows, columns), (rows, 4 * columns)]))
    dtype = draw(st.sampled_from([np.int8, np.float16, np.float32]))
    values = [0, 0, 0, 1, -2, 127] if dtype is np.int8 else [0.0, -0.0, 0.0, 6e-8, -2.0, 127.0]
    drawn: Weight = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from(values))).astype(dtype)
    return drawn


def naive_broken_groups(weight: Weight, k_axis: int) -> int:
    rows = weight.tolist() if k_axis == 1 else weight.T.tolist()
    groups = [row[start : start + 4] for row in rows for start in range(0, len(row), 4)]
    return sum(len([value for value in group if value != 0]) > 2 for group in groups)


def two_four(k: int, n: int, dtype: npt.DTypeLike = np.int8) -> Weight:
    return np.tile(np.array([[1, 0, 0, -3]], dtype), (n, k // 4))


@given(weights())
def test_counts_as_the_naive_reference_does(weight: Weight) -> None:
    for axis in (0, 1):
        if weight.shape[axis] % 4 == 0:
            assert count_broken_groups(weight, axis) == naive_broken_groups(weight, axis)


@given(weights(), st.sampled_from([0, 1]))
def test_pattern_and_zeros_follow_the_definition(weight: Weight, axis: int) -> None:
    found = sparsity_of(weight, axis, None)
    whole_groups = weight.shape[axis] % 4 == 0
    expected = "2:4" if whole_groups and naive_broken_groups(weight, axis) == 0 else "dense"
    assert (found.pattern, found.axis, found.eligible) == (expected, axis, False)
    zeros = sum(value == 0 for value in weight.ravel().tolist())
    assert found.zeros == pytest.approx(zeros / weight.size)


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
def test_an_all_zero_weight_is_two_of_four(dtype: npt.DTypeLike) -> None:
    found = sparsity_of(np.zeros((8, 32), dtype), 1, None)
    assert (found.pattern, found.zeros, found.broken_groups) == ("2:4", 1.0, 0)


def test_a_negative_zero_is_a_zero() -> None:
    assert count_broken_groups(np.array([[1, -0.0, -0.0, 2]], np.float32), 1) == 0


def test_zeros_along_n_do_not_count() -> None:
    weight = two_four(4, 4)
    assert sparsity_of(weight, 1, None).pattern == "2:4"
    found = sparsity_of(weight, 0, None)
    assert (found.pattern, found.broken_groups) == ("dense", 2)
    assert found.reason == "50.0 % of the groups of four hold more than two values"


def test_k_that_is_no_multiple_of_four_is_dense() -> None:
    found = sparsity_of(np.zeros((8, 6), np.int8), 1, FREE)
    assert (found.pattern, found.eligible, found.reason) == ("dense", False, "K = 6 is no multiple of 4")


@pytest.mark.parametrize(
    ("weight", "eligible", "reason"),
    [
        (two_four(32, 8), True, ""),
        (two_four(16, 8, np.float16), True, ""),
        (two_four(48, 8), False, "sparse int8 kernels need K to be a multiple of 32; it is 48"),
        (two_four(8, 8, np.float16), False, "sparse float16 kernels need K to be a multiple of 16; it is 8"),
        (two_four(32, 8, np.float32), False, "sparse kernels take int8 and float16, not float32"),
    ],
)
def test_eligible_by_type_and_alignment(weight: Weight, eligible: bool, reason: str) -> None:
    found = sparsity_of(weight, 1, FREE)
    assert (found.pattern, found.eligible) == ("2:4", eligible)
    assert found.reason.endswith(reason)
    assert bool(found.reason) == bool(reason)


def test_k_and_n_follow_the_axis() -> None:
    assert sparsity_of(two_four(32, 8).T, 0, FREE).eligible
    assert sparsity_of(two_four(48, 32).T, 0, FREE).reason.endswith("it is 48")


def test_the_a100_asks_for_an_int8_output_besides() -> None:
    found = sparsity_of(two_four(32, 8), 1, load_device("a100").sparse)
    assert found.eligible
    assert "only where the output is INT8" in found.reason


@given(groups=st.integers(0, 10_000), bits=st.sampled_from([4, 8, 16, 32]))
def test_compressed_bytes_are_two_values_and_two_indices_a_group(groups: int, bits: int) -> None:
    assert compressed_bytes(np.zeros((groups, 4), np.int8), bits=bits) == ceil(Fraction(groups * (2 * bits + 4), 8))


@pytest.mark.parametrize(("bits", "ratio"), [(32, 128 / 68), (16, 64 / 36), (8, 32 / 20)])
def test_compression_of_a_whole_weight(bits: int, ratio: float) -> None:
    weight = two_four(64, 16)
    assert weight.size * bits / 8 / compressed_bytes(weight, bits=bits) == pytest.approx(ratio)
