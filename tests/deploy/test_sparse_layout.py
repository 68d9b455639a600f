from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.sparse_layout import Layout, decode, encode, find_layout

TYPES: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32}


def pruned(shape: tuple[int, ...], axis: int, bits: int, seed: int, paired: bool = False) -> npt.NDArray[Any]:
    """Random bits with at most two units of four kept along `axis`, elements of 4 bits one a byte."""
    rng = np.random.default_rng(seed)
    moved = [*shape[:axis], *shape[axis + 1 :], shape[axis]]
    units = rng.integers(0, 2 ** (8 if paired else bits), (int(np.prod(shape)) // (8 if paired else 4), 4))
    units[np.arange(len(units)), rng.integers(0, 4, len(units))] = 0
    dropped = (units == 0).argmax(axis=1) + rng.integers(1, 4, len(units))
    units[np.arange(len(units)), dropped % 4] = 0
    flat = np.stack([units & 15, units >> 4], axis=-1) if paired else units
    return np.moveaxis(flat.reshape(moved), -1, axis)


def stored(weight: npt.NDArray[Any], bits: int) -> bytes:
    if bits != 4:
        return np.ascontiguousarray(weight).astype(TYPES[bits]).tobytes()
    flat = weight.reshape(-1).astype(np.uint8)
    return (flat[0::2] | flat[1::2] << 4).tobytes()


@given(
    rows=st.integers(1, 5), groups=st.integers(1, 5), axis=st.integers(0, 1), bits=st.sampled_from([4, 8, 16, 32]),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_comes_back_bit_for_bit(rows: int, groups: int, axis: int, bits: int, seed: int) -> None:
    shape = (rows * 2, groups * 4) if axis else (groups * 4, rows * 2)
    data = stored(pruned(shape, axis, bits, seed), bits)
    layout = Layout(shape, bits, axis)
    values, places = encode(data, layout)
    assert (len(values), len(places)) == (layout.values_bytes, layout.places_bytes)
    assert decode(values, places, layout) == data


@given(groups=st.integers(1, 4), axis=st.integers(0, 1), seed=st.integers(0, 2**32 - 1))
def test_pairs_of_4_bits_come_back_bit_for_bit(groups: int, axis: int, seed: int) -> None:
    shape = (6, groups * 8) if axis else (groups * 8, 6)
    data = stored(pruned(shape, axis, 4, seed, paired=True), 4)
    layout = Layout(shape, 4, axis, paired=True)
    assert decode(*encode(data, layout), layout) == data


@pytest.mark.parametrize(
    ("bits", "paired", "ratio"), [(8, False, 6.4), (4, True, 12.8), (4, False, 32 / 3), (16, False, 32 / 9)]
)
def test_needs_the_papers_bits_a_weight(bits: int, paired: bool, ratio: float) -> None:
    layout = Layout((64, 256), bits, 1, paired)
    values, places = encode(stored(pruned((64, 256), 1, bits, 0, paired), bits), layout)
    assert layout.elements * 4 / (len(values) + len(places)) == pytest.approx(ratio)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_finds_the_axis_of_a_convolution(axis: int) -> None:
    shape = (8, 16, 4, 4)
    assert find_layout(stored(pruned(shape, axis, 8, 1), 8), shape, 8) == Layout(shape, 8, axis)


def test_finds_pairs_only_where_single_elements_do_not_fit() -> None:
    data = stored(pruned((16, 64), 1, 4, 3, paired=True), 4)
    assert find_layout(data, (16, 64), 4) == Layout((16, 64), 4, 1, paired=True)
    assert find_layout(stored(pruned((16, 64), 1, 4, 3), 4), (16, 64), 4) == Layout((16, 64), 4, 1)


@pytest.mark.parametrize("shape", [(4, 7), (0, 4), ()])
def test_finds_none_where_groups_do_not_fit(shape: tuple[int, ...]) -> None:
    assert find_layout(bytes(int(np.prod(shape))), shape, 8) is None


def test_finds_none_in_a_dense_weight_or_one_of_zeros() -> None:
    assert find_layout(bytes([1, 2, 3, 0] * 8), (4, 8), 8) is None
    assert find_layout(bytes(32), (4, 8), 8) is None


def test_negative_zero_of_a_float_is_kept() -> None:
    data = np.array([[-0.0, 0.0, 1.5, 0.0]], np.float16).tobytes()
    layout = find_layout(data, (1, 4), 16)
    assert layout is not None
    assert decode(*encode(data, layout), layout) == data


def test_refuses_another_length() -> None:
    with pytest.raises(ValueError, match="4 and 2 bytes are not those of"):
        decode(bytes(4), bytes(2), Layout((1, 8), 8, 1))
