"""Weights that are no integers times a scale, or that another library packed: known by name, refused by name.

A codebook's levels lie where training put them, so no scale reproduces them; rounding them to a grid would be another
network, and silently so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from exporters.scales.taken import Hints, TakenScales
from profiles.errors import GpusqError

_NOT_UNIFORM = "its levels are not evenly spaced, so no integers and scale hold them exactly; dequantize it to float"
_REPACK = "load it with the library that wrote it and save it as compressed-tensors, or as float weights"
# (what the name of a tensor behind its module ends in, what the weight is, the cure)
_SIGNS = (
    (".weight.quant_state.bitsandbytes__nf4", "an NF4 codebook of bitsandbytes", _NOT_UNIFORM),
    (".weight.quant_state.bitsandbytes__fp4", "an FP4 codebook of bitsandbytes", _NOT_UNIFORM),
    (".weight.quant_map", "a codebook of bitsandbytes", _NOT_UNIFORM),
    (".weight_codebook", "a codebook", _NOT_UNIFORM),
    (".codebook", "a codebook", _NOT_UNIFORM),
    (".codebooks", "a codebook (AQLM)", _NOT_UNIFORM),
    (".lut", "a table of levels", _NOT_UNIFORM),
    (".lookup_table", "a table of levels", _NOT_UNIFORM),
    (".SCB", "LLM.int8 of bitsandbytes, whose outliers are chosen while it runs,", _REPACK),
    (".qweight", "packed as GPTQ or AWQ do", _REPACK),
    (".W_q", "packed as HQQ does", _REPACK),
)

_CODES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)


def recognise(state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> bool:
    """Whether some weight is one of these."""
    return next(_found(state), None) is not None


def take(state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], hints: Hints) -> TakenScales:
    """Refuse the first weight of the kind."""
    module, what, cure = next(_found(state))
    raise GpusqError(f"the weight of {module!r} is {what}: it is not taken", hint=cure)


def _found(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str, str]]:
    for name in state:
        for sign, what, cure in _SIGNS:
            module = name.removesuffix(sign)
            if module != name and _is_coded(state, module):
                yield module, what, cure


def _is_coded(state: Mapping[str, torch.Tensor], module: str) -> bool:
    """Whether `module` keeps codes in place of a float weight: a layer may well have a codebook of its own."""
    weight = state.get(f"{module}.weight")
    if weight is not None and weight.is_floating_point():
        return False
    inside = (tensor for name, tensor in state.items() if name.startswith(f"{module}."))
    return any(tensor.dtype in _CODES for tensor in inside)
