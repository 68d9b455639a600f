"""torchao: QAT's FakeQuantizedLinear, and the tensor subclasses that `quantize_` and QAT's conversion put into modules.

    Int8Tensor                  int8 [N, K], scale [N, 1] or [1, 1]; activations static, dynamic or none
    IntxUnpackedToInt8Tensor    1 to 8 bits in int8, scale [N, K / group]; activations dynamic or none

`exporters.safe_pickle` reads such tensors where torchao is installed, which names their classes to torch.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from exporters.dense import is_torchao
from exporters.quantized_modules.findings import Findings, described, quantizer_like
from exporters.quantized_modules.plain_layer import WEIGHT, plain_layer, set_parameters
from exporters.quantizer import INPUT, Place
from profiles.errors import GpusqError

_LINEARS = frozenset({"FakeQuantizedLinear", "Int8DynActInt4WeightQATLinear", "Int4WeightOnlyQATLinear"})
_EMBEDDINGS = frozenset({"FakeQuantizedEmbedding", "Int4WeightOnlyQATEmbedding"})
_INTEGER_FAKES = frozenset({"IntxFakeQuantizer", "FakeQuantizer"})
_HINT = "train it with IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=True) for the weights"


def replaced(module: nn.Module, name: str, found: Findings) -> nn.Module | None:
    """Return the plain module that takes the place of `module`; None for one that is not known."""
    kind = type(module).__qualname__
    if kind in _LINEARS:
        return _linear(module, name, found)
    if kind in _EMBEDDINGS:
        return _embedding(module, name, found)
    if kind == "Int8DynActInt4WeightLinear":
        return _converted_linear(module, name, found)
    return None


def has_tensors(module: nn.Module) -> bool:
    """Whether a parameter or buffer of `module` itself is one of torchao's tensors."""
    return any(map(is_torchao, (*module._parameters.values(), *module._buffers.values())))


def take_tensors(module: nn.Module, name: str, found: Findings) -> None:
    """Replace the parameters of `module` itself that are torchao's tensors by their real values, float32."""
    for tensor_name, tensor in list(module._parameters.items()):
        if not is_torchao(tensor):
            continue
        values = _taken(tensor, Place(name, tensor_name), found)
        set_parameters(module, {tensor_name: values})
        module.__dict__.pop("extra_repr", None)  # torchao's own, which describes its tensor


def _taken(tensor: Any, place: Place, found: Findings) -> Tensor:
    kind = type(tensor).__qualname__
    if kind == "Int8Tensor":
        _int8_activation(tensor, place, found)
        low, high = -128, 127
    elif kind == "IntxUnpackedToInt8Tensor":
        if tensor.activation_quantization is not None:
            found.dynamic(
                Place(place.module, INPUT),
                str(getattr(tensor.activation_quantization, "value", tensor.activation_quantization)),
            )
        low, high = _bounds(tensor.target_dtype)
    else:
        raise GpusqError(
            f"{str(place)!r} is a {described(tensor)}, which is not known here",
            hint="convert with Int8WeightOnlyConfig(version=2) or IntxWeightOnlyConfig, or export the QAT model before "
            "its conversion",
        )
    zero_point = tensor.zero_point
    if zero_point is not None and zero_point.dtype.is_floating_point and bool(zero_point.any()):
        raise GpusqError(f"{str(place)!r} has a zero-point that is no integer", hint=_HINT)
    shape = tuple(tensor.qdata.shape)
    return found.add_integers(place, quantizer_like(tensor.scale, zero_point, shape, low, high), tensor.qdata)


def _int8_activation(tensor: Any, place: Place, found: Findings) -> None:
    if getattr(tensor, "act_pre_scale", None) is not None:
        raise GpusqError(
            f"{str(place)!r} scales its input by channel before it quantizes it (SmoothQuant, AWQ)",
            hint="fold that scale into the layer before",
        )
    if tensor.act_quant_kwargs is None:
        return
    place = Place(place.module, INPUT)
    if tensor.act_quant_scale is None:
        found.dynamic(place, f"Int8Tensor, {tensor.act_quant_kwargs.granularity}")
        return
    if tensor.act_quant_scale.numel() != 1:
        raise GpusqError(f"{str(place)!r} has one scale for each row", hint="calibrate with PerTensor() activations")
    low, high = (-64, 63) if tensor.act_quant_kwargs.reduce_range else (-128, 127)
    found.add_activation(place, quantizer_like(tensor.act_quant_scale, tensor.act_quant_zero_point, (), low, high))


def _linear(module: Any, name: str, found: Findings) -> nn.Module:
    fake = module.activation_fake_quantizer
    if fake is not None and fake.enabled:
        place = Place(name, INPUT)
        if type(fake).__qualname__ not in _INTEGER_FAKES:
            raise GpusqError(f"{str(place)!r} is quantized by a {described(fake)}, which is not known here", hint=_HINT)
        found.dynamic(place, str(fake.config.granularity))
    return plain_layer(module, nn.Linear, _trained_weight(module, name, found), module.bias)


def _embedding(module: Any, name: str, found: Findings) -> nn.Module:
    return plain_layer(module, nn.Embedding, _trained_weight(module, name, found), None)


def _trained_weight(module: Any, name: str, found: Findings) -> Tensor:
    weight: Tensor = module.weight.detach()
    fake, place = module.weight_fake_quantizer, Place(name, WEIGHT)
    if fake is None or not fake.enabled:
        return weight
    if type(fake).__qualname__ not in _INTEGER_FAKES:
        raise GpusqError(f"{str(place)!r} is quantized by a {described(fake)}, which is not known here", hint=_HINT)
    with torch.no_grad():
        values: Tensor = fake(weight).detach()
    low, high = _bounds(fake.config.dtype)
    found.add_weight(place, quantizer_like(fake.scale, fake.zero_point, tuple(weight.shape), low, high), values)
    return values


def _converted_linear(module: Any, name: str, found: Findings) -> nn.Module:
    found.dynamic(Place(name, INPUT), "int8 per token")
    quantizer = quantizer_like(module.scales, module.zeros, tuple(module.weight.shape), -8, 7)
    weight = found.add_integers(Place(name, WEIGHT), quantizer, module.weight)
    return plain_layer(module, nn.Linear, weight, module.bias)


def _bounds(dtype: Any) -> tuple[int, int]:
    """The integers of `torch.int4` or torchao's own `TorchAODType.INT4`."""
    match = re.search(r"(u?)int(\d+)", str(dtype).lower())
    assert match is not None
    bits = int(match[2])
    return (0, 2**bits - 1) if match[1] else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
