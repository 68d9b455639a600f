"""BitNet as Hugging Face stores it: −1, 0 and 1, four to a byte, and one `weight_scale` [1] for the tensor.

    BitLinear       W = ternary / weight_scale
    AutoBitLinear   W = ternary · weight_scale

Activations are quantized for each token while the network runs, which TensorRT does not do in INT8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from exporters.quantizer import Place, Quantizer
from exporters.scales.compressed_tensors import refuse_dynamic
from exporters.scales.packing import unpack_ternary
from exporters.scales.taken import DAMAGED, WEIGHT, Hints, TakenScales, keep_weight, widened
from profiles.errors import GpusqError

_SCALE = ".weight_scale"


def recognise(state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> bool:
    """Whether the configuration says so, or a byte weight has one scale."""
    return _config(metadata).get("quant_method") == "bitnet" or next(_layers(state), None) is not None


def take(state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], hints: Hints) -> TakenScales:
    """Return the ternary weights, exactly."""
    config = _config(metadata)
    if config.get("quantization_mode") == "online":
        raise GpusqError(
            "the checkpoint is BitNet in training (quantization_mode 'online'): it holds no scales",
            hint="save it with quantization_mode 'offline'",
        )
    taken = dict(state)
    notes: list[str] = []
    quantizers: dict[Place, Quantizer] = {}
    for module in _layers(state):
        if not hints.drop_dynamic:
            raise refuse_dynamic(module)
        place = Place(module, WEIGHT)
        quantizer, integers = _ternary(place, state, inverse=config.get("linear_class") != "autobitlinear")
        quantizers[place], taken[f"{module}.weight"] = keep_weight(place, integers, quantizer, notes)
        del taken[module + _SCALE]
    if quantizers:
        notes.append("activations were quantized for each token while the network ran: they stay float")
    return TakenScales(taken, quantizers, "BitNet (Hugging Face), ternary weights", tuple(notes))


def _ternary(
    place: Place, state: Mapping[str, torch.Tensor], *, inverse: bool
) -> tuple[Quantizer, np.ndarray[Any, np.dtype[np.int8]]]:
    integers = unpack_ternary(state[str(place)].cpu().numpy())
    if (integers == 2).any():
        raise GpusqError(f"the packed weight {str(place)!r} holds a code that is none of −1, 0 and 1", hint=DAMAGED)
    scale = widened(state[place.module + _SCALE]).reshape(())
    with np.errstate(divide="ignore"):
        return Quantizer(np.asarray(np.float32(1) / scale if inverse else scale), low=-1, high=1), integers


def _layers(state: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name, tensor in state.items():
        module = name.removesuffix(_SCALE)
        weight = state.get(f"{module}.weight")
        if module != name and tensor.numel() == 1 and weight is not None and weight.dtype == torch.uint8:
            yield module


def _config(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    config = metadata.get("quantization_config")
    return config if isinstance(config, Mapping) else {}
