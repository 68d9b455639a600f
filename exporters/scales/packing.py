"""Integers of a few bits out of the words that they are packed in; each function undoes what the library's own does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_WORD = 32
_TERNARY_BITS = 2


def unpack_words(words: npt.NDArray[np.int32], bits: int, shape: Sequence[int], axis: int = -1) -> npt.NDArray[np.int8]:
    """Undo compressed-tensors' `pack_to_int32`.

    Along `axis`, element i lies in the bits from i · bits on, counted from the lowest bit of the first word, and may
    straddle two words. What is stored is the integer plus 2^(bits − 1).

    Args:
        words: int32, the tensor's shape with `axis` shortened to ceil(length · bits / 32).
        bits: 1 to 8.
        shape: of the tensor.
        axis: along which it is packed.

    Returns:
        int8 of `shape`.

    Raises:
        ValueError: `words` does not have the shape that `shape` asks for.
    """
    length = shape[axis]
    expected = list(shape)
    expected[axis] = -(-length * bits // _WORD)
    if list(words.shape) != expected:
        raise ValueError(f"{list(words.shape)} words of {bits}-bit integers, expected {expected} for {list(shape)}")
    stream = np.ascontiguousarray(np.moveaxis(words, axis, -1), "<i4").view(np.uint8)
    each = np.unpackbits(stream, axis=-1, count=length * bits, bitorder="little").reshape(
        *stream.shape[:-1], length, bits
    )
    unsigned = each.astype(np.int16) @ (1 << np.arange(bits, dtype=np.int16))
    return np.ascontiguousarray(np.moveaxis(unsigned - (1 << (bits - 1)), -1, axis).astype(np.int8))


def unpack_ternary(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Undo BitNet's packing: byte [r, k] holds rows r, r + R, r + 2R and r + 3R, two bits each, plus 1.

    Args:
        packed: uint8 [R, K].

    Returns:
        int8 [4 · R, K]; −1, 0 and 1, and 2 where the bytes are no such packing.
    """
    rows = [(packed >> shift) & 3 for shift in range(0, 8, _TERNARY_BITS)]
    return np.concatenate(rows).astype(np.int8) - 1
