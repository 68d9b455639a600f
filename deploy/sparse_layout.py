"""The exact layout of 2:4 weights: of four neighbours the two that are kept, and where they stand.

    [0, -7, 0, 3]  →  values [-7, 3], positions 1 and 3: 4 × 8 bits become 2 × 8 + 2 × 2 = 20, 5 bits a weight

A unit is one element, or for 4-bit weights pruned 4:8 a pair of them, which stand and fall together:
8 × 4 bits become 2 × 8 + 2 × 2 = 20, 2.5 bits a weight (GPUSQ-ViT, section 3.1). Against float32 that is 6.4 times
less for 8 bits, 12.8 for 4 bits in pairs, 10.7 for 4 bits one by one, 3.6 for 16 bits.

It stores bits, not numbers: a float's -0.0 is kept, and every group with at most two units that are not all zero bits
comes back as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

GROUP, KEPT = 4, 2
BYTE = 8
_NIBBLE = 4
_TYPES = {4: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32}

Units = npt.NDArray[Any]  # of unsigned integers


@dataclass(frozen=True)
class Layout:
    """How a weight lies in its bytes, and along which axis it is pruned.

    Attributes:
        shape: of the weight.
        bits: of an element: 4, 8, 16 or 32.
        axis: along which groups are counted.
        paired: whether a unit is a pair of 4-bit elements, neighbours along the axis.
    """

    shape: tuple[int, ...]
    bits: int
    axis: int
    paired: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def plain_bytes(self) -> int:
        """Bytes of the weight as it is."""
        return self.elements * self.bits // BYTE

    @property
    def groups(self) -> int:
        """Number of groups of four units."""
        return self.elements // (GROUP * (2 if self.paired else 1))

    @property
    def values_bytes(self) -> int:
        """Bytes of its kept units."""
        return self.groups * KEPT * self.bits * (2 if self.paired else 1) // BYTE

    @property
    def places_bytes(self) -> int:
        """Bytes of their positions."""
        return (self.groups + 1) // 2


def find_layout(data: bytes, shape: tuple[int, ...], bits: int) -> Layout | None:
    """The layout in which every group of the weight keeps at most two units; None where there is none."""
    for axis in (len(shape) - 1, *range(len(shape) - 1)):
        for paired in (False, True) if bits == _NIBBLE else (False,):
            layout = Layout(shape, bits, axis, paired)
            if _divides(layout) and len(data) == layout.plain_bytes and _is_sparse(_groups(data, layout)):
                return layout
    return None


def encode(data: bytes, layout: Layout) -> tuple[bytes, bytes]:
    """The kept units of `data`, group by group, and their positions, two groups in a byte."""
    groups = _groups(data, layout)
    kept = np.sort(np.argsort(groups == 0, axis=1, kind="stable")[:, :KEPT], axis=1).astype(np.uint8)
    values = np.take_along_axis(groups, kept, axis=1).reshape(-1)
    bits = _NIBBLE if layout.bits == _NIBBLE and not layout.paired else BYTE
    return _packed(values, bits), _packed(kept[:, 0] | kept[:, 1] << KEPT, _NIBBLE)


def decode(values: bytes, places: bytes, layout: Layout) -> bytes:
    """The bytes that `encode` was given.

    Raises:
        ValueError: the parts have other lengths than the layout asks for.
    """
    if (len(values), len(places)) != (layout.values_bytes, layout.places_bytes):
        raise ValueError(f"{len(values)} and {len(places)} bytes are not those of {layout}")
    positions = _unpacked(places, layout.groups)
    groups: Units = np.zeros((layout.groups, GROUP), _TYPES[layout.bits])
    kept = np.stack([positions & 3, positions >> KEPT], axis=1).astype(np.intp)
    np.put_along_axis(groups, kept, _values(values, layout).reshape(-1, KEPT), axis=1)
    return _ungrouped(groups, layout)


def _values(data: bytes, layout: Layout) -> Units:
    if layout.bits == _NIBBLE and not layout.paired:
        return _unpacked(data, layout.groups * KEPT)
    return np.frombuffer(data, _TYPES[layout.bits])


def _divides(layout: Layout) -> bool:
    group = GROUP * (2 if layout.paired else 1)
    whole = layout.elements * layout.bits % BYTE == 0
    return bool(layout.shape) and layout.elements > 0 and whole and layout.shape[layout.axis] % group == 0


def _is_sparse(groups: Units) -> bool:
    return bool((np.count_nonzero(groups, axis=1) <= KEPT).all()) and bool(groups.any())


def _groups(data: bytes, layout: Layout) -> Units:
    """The units [groups, 4], in the order of the weight with the pruned axis last."""
    flat = _unpacked(data, layout.elements) if layout.bits == _NIBBLE else np.frombuffer(data, _TYPES[layout.bits])
    rows = np.moveaxis(flat.reshape(layout.shape), layout.axis, -1)
    if layout.paired:
        pairs = rows.reshape(-1, 2)
        return (pairs[:, 0] | pairs[:, 1] << _NIBBLE).reshape(-1, GROUP)
    return rows.reshape(-1, GROUP)


def _ungrouped(groups: Units, layout: Layout) -> bytes:
    flat = groups.reshape(-1)
    if layout.paired:
        flat = np.stack([flat & 15, flat >> _NIBBLE], axis=1).reshape(-1)
    moved = [*layout.shape[: layout.axis], *layout.shape[layout.axis + 1 :], layout.shape[layout.axis]]
    weight = np.ascontiguousarray(np.moveaxis(flat.reshape(moved), -1, layout.axis)).reshape(-1)
    return _packed(weight, _NIBBLE) if layout.bits == _NIBBLE else weight.tobytes()


def _packed(values: Units, bits: int) -> bytes:
    """`values` as bytes; two 4-bit ones in a byte, the first in the low half, as ONNX stores INT4."""
    if bits != _NIBBLE:
        return values.tobytes()
    padded = np.zeros(len(values) + len(values) % 2, np.uint8)
    padded[: len(values)] = values
    return (padded[0::2] | padded[1::2] << _NIBBLE).tobytes()


def _unpacked(data: bytes, count: int) -> npt.NDArray[np.uint8]:
    both = np.frombuffer(data, np.uint8)
    return np.stack([both & 15, both >> _NIBBLE], axis=1).reshape(-1)[:count]
