"""Unpack the sparse formats of compressed-tensors: kept values + one bit per weight → the dense weight.

    M.compressed  the kept values, row by row: [R, C/2] in "sparse-24-bitmask", [kept] in "sparse-bitmask"
    M.bitmask     uint8 [R, ⌈C/8⌉], bit j of byte i (least significant first) tells whether column 8·i + j is kept
    M.shape       int64, the two numbers R and C
    M.row_offsets int64 [R], only in "sparse-bitmask": where a row's values begin; it follows from the bitmask

become M.weight [R, C]. Older versions write M.weight.compressed and so on. The format is that of compressed-tensors
0.6 to 0.11; later ones write neither.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from profiles.errors import GpusqError

Format = Literal["sparse-24-bitmask", "sparse-bitmask"]
KINDS: dict[Format, str] = {
    "sparse-24-bitmask": "compressed-tensors sparse-24-bitmask",
    "sparse-bitmask": "compressed-tensors sparse-bitmask",
}
VALUES, BITS, SHAPE, OFFSETS = ".compressed", ".bitmask", ".shape", ".row_offsets"
FETCH = "download the checkpoint again; a whole one has compressed, bitmask and shape of each layer"


def unpack_bitmasks(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Format]]:
    """`state` with the packed weights dense, in their place; and the format of each, by the weight's name.

    Raises GpusqError, naming the layer, where the parts do not fit each other.
    """
    layers = [name.removesuffix(BITS) for name in state if name.endswith(BITS)]
    dense: dict[str, torch.Tensor] = {}
    formats: dict[str, Format] = {}
    gone = {layer + part for layer in layers for part in (BITS, SHAPE, OFFSETS)}
    for name, tensor in state.items():
        layer = name.removesuffix(VALUES)
        if layer != name and layer in layers:
            weight = layer if layer.endswith(".weight") else layer + ".weight"
            formats[weight] = "sparse-bitmask" if layer + OFFSETS in state else "sparse-24-bitmask"
            dense[weight] = _unpack(layer, formats[weight], state)
        elif name not in gone:
            dense[name] = tensor
    for layer in layers:
        _check_unpacked(layer, state)
    return dense, formats


def _check_unpacked(layer: str, state: dict[str, torch.Tensor]) -> None:
    if layer + VALUES not in state:
        raise GpusqError(f"layer {layer!r} has a bitmask but no {layer + VALUES!r}", hint=FETCH)
    if layer + ".weight" in state and not layer.endswith(".weight"):
        raise GpusqError(f"layer {layer!r} has its weight twice, plain and packed with a bitmask", hint=FETCH)


def _unpack(layer: str, kind: Format, state: dict[str, torch.Tensor]) -> torch.Tensor:
    values, bits = state[layer + VALUES], state[layer + BITS]
    rows, columns = _shape(layer, state)
    if bits.dtype is not torch.uint8 or list(bits.shape) != [rows, -(-columns // 8)]:
        raise GpusqError(
            f"layer {layer!r}: the bitmask is {_form(bits)}, expected uint8 for a weight of {[rows, columns]}",
            hint=FETCH,
        )
    keep = torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=columns, bitorder="little").astype(bool))
    kept = int(keep.sum())
    if kept != values.numel() or (kind == "sparse-24-bitmask" and list(values.shape) != [rows, columns // 2]):
        raise GpusqError(
            f"layer {layer!r}: {_form(values)} values do not fit a bitmask that keeps {kept} of {[rows, columns]}",
            hint=FETCH,
        )
    # As bytes: torch cannot index float8, and no bit of a value may change.
    stored = values.contiguous().reshape(-1, 1).view(torch.uint8)
    dense = torch.zeros(rows, columns, stored.shape[-1], dtype=torch.uint8)
    dense[keep] = stored
    return dense.reshape(rows, -1).view(values.dtype)


def _shape(layer: str, state: dict[str, torch.Tensor]) -> tuple[int, int]:
    shape = state.get(layer + SHAPE)
    if shape is None:
        raise GpusqError(f"layer {layer!r} has a bitmask but no {layer + SHAPE!r}", hint=FETCH)
    sizes = [] if shape.is_floating_point() or shape.is_complex() or shape.numel() != 2 else shape.flatten().tolist()
    if len(sizes) != 2 or min(sizes) < 1:
        raise GpusqError(f"layer {layer!r}: its shape is {_form(shape)}, expected two positive numbers", hint=FETCH)
    return int(sizes[0]), int(sizes[1])


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
