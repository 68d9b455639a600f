from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.scales.packing import unpack_ternary, unpack_words


@settings(max_examples=200, deadline=None)
@given(
    bits=st.integers(1, 8),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 140)),
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**16),
)
def test_unpacks_what_compressed_tensors_packs(
    compressed_tensors: Any, bits: int, shape: tuple[int, int], axis: int, seed: int
) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # type: ignore[import-untyped]

    high = 1 << (bits - 1)
    integers = np.random.default_rng(seed).integers(-high, high, shape).astype(np.int8)
    packed = pack_to_int32(torch.from_numpy(integers.copy()), bits, packed_dim=axis)
    assert np.array_equal(unpack_words(packed.numpy(), bits, shape, axis), integers)


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 8), columns=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_unpacks_what_bitnet_packs(bitnet: Any, rows: int, columns: int, seed: int) -> None:
    ternary = np.random.default_rng(seed).integers(-1, 2, (4 * rows, columns)).astype(np.int8)
    packed = bitnet.pack_weights(torch.from_numpy(ternary.astype(np.float32)))
    assert np.array_equal(unpack_ternary(packed.numpy()), ternary)


@pytest.mark.parametrize("words", [(4, 3), (5, 4), (4,)])
def test_words_of_another_shape_are_an_error(words: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="words of 4-bit integers"):
        unpack_words(np.zeros(words, np.int32), 4, (4, 32))
