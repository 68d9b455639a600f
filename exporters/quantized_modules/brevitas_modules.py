"""Brevitas layers: the scales are computed by modules of their own, from parameters or from running statistics.

Brevitas is not imported here: its classes are known by name, so that this file loads without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from exporters.quantized_modules.findings import Findings, described, quantizer_like
from exporters.quantized_modules.plain_layer import WEIGHT, plain_layer
from exporters.quantizer import INPUT, OUTPUT, Place, Quantizer
from profiles.errors import GpusqError

_HINT = (
    "train it with a signed symmetric activation quantizer: act_quant=brevitas.quant.Int8ActPerTensorFloat; "
    "QuantReLU's default is unsigned, and exact with bit_width=7 or less"
)

_LAYERS: dict[str, type[nn.Module]] = {
    "QuantLinear": nn.Linear,
    "QuantConv1d": nn.Conv1d,
    "QuantConv2d": nn.Conv2d,
    "QuantConv3d": nn.Conv3d,
    "QuantConvTranspose1d": nn.ConvTranspose1d,
    "QuantConvTranspose2d": nn.ConvTranspose2d,
    "QuantConvTranspose3d": nn.ConvTranspose3d,
    "QuantEmbedding": nn.Embedding,
}
_ACTIVATIONS = frozenset({"QuantIdentity", "QuantReLU", "QuantSigmoid", "QuantTanh", "QuantHardTanh", "QuantHardSwish"})
# The proxies whose integers are round(x / scale), clamped.
_UNIFORM_ACTIVATIONS = frozenset({"ActQuantProxyFromInjector"})


class EltwiseAdd(nn.Module):
    """x + y, both quantized with one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.input_quant = nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum."""
        total: Tensor = self.input_quant(x) + self.input_quant(y)
        return total


def replaced(module: nn.Module, name: str, found: Findings) -> nn.Module | None:
    """Return the plain module that takes the place of `module`; None for one that is not known."""
    kind = type(module).__qualname__
    if kind in _LAYERS:
        return _layer(module, _LAYERS[kind], name, found)
    if kind in _ACTIVATIONS:
        return _activation(module, name, found)
    if kind == "QuantEltwiseAdd":
        _take_activation(module, "input_quant", Place(f"{name}.input_quant", OUTPUT), found)
        _take_activation(module, "output_quant", Place(name, OUTPUT), found)
        return EltwiseAdd()
    return None


def _layer(module: Any, kind: type[nn.Module], name: str, found: Findings) -> nn.Module:
    if getattr(module, "is_same_padded_strided", False):
        raise GpusqError(f"{name!r} pads to the same size with a stride", hint="pad with nn.ZeroPad2d before the layer")
    weight = _weight(module, name, found)
    plain = plain_layer(module, kind, weight, _bias(module, name, found) if hasattr(module, "bias") else None)
    _take_activation(module, "input_quant", Place(name, INPUT), found)
    _take_activation(module, "output_quant", Place(name, OUTPUT), found)
    return plain


def _weight(module: Any, name: str, found: Findings) -> Tensor:
    if not module.weight_quant.is_quant_enabled:
        weight: Tensor = module.weight
        return weight
    with torch.no_grad():
        quantized = module.quant_weight()
    place = Place(name, WEIGHT)
    values: Tensor = quantized.value
    found.add_weight(place, _weight_quantizer(quantized, module, place), values)
    return values


def _weight_quantizer(quantized: Any, module: Any, place: Place) -> Quantizer:
    low, high = _range(_bits(quantized, place), signed=bool(quantized.signed), narrow=False)
    shape = tuple(quantized.value.shape)
    scale, zero_point = quantized.scale, quantized.zero_point
    if hasattr(quantized, "group_dim"):  # [out, groups, 1]: without the axis that runs along the group
        axis = quantized.group_dim % len(shape) + 1
        scale, zero_point = quantized.scale_.squeeze(axis), quantized.zero_point_
        zero_point = zero_point.squeeze(axis) if zero_point.ndim > len(shape) else zero_point
    return quantizer_like(scale, zero_point, shape, low, high)


def _bits(quantized: Any, place: Place) -> int:
    if not hasattr(quantized, "bit_width"):
        raise GpusqError(
            f"{str(place)!r} is quantized to a {type(quantized).__name__}, not to integers",
            hint="train it with one of Brevitas's integer quantizers, such as Int8WeightPerChannelFloat",
        )
    return int(quantized.bit_width)


def _bias(module: Any, name: str, found: Findings) -> Tensor | None:
    bias: Tensor | None = module.bias
    quantizer = getattr(module, "bias_quant", None)
    if bias is None or quantizer is None or not quantizer.is_quant_enabled:
        return bias
    if quantizer.requires_input_scale:
        found.notes.append(f"{name}.bias stays float: its scale is the input's times the weight's")
        return bias
    with torch.no_grad():
        quantized: Tensor = quantizer(bias).value
    found.notes.append(f"{name}.bias is float, with the values that it was quantized to")
    return quantized


def _activation(module: Any, name: str, found: Findings) -> nn.Module:
    _take_activation(module, "input_quant", Place(name, INPUT), found)
    _take_activation(module, "act_quant", Place(name, OUTPUT), found)
    fused = module.act_quant.fused_activation_quant_proxy
    implementation = nn.Identity() if fused is None else fused.activation_impl
    kind = next((base for base in type(implementation).__mro__ if base.__module__.startswith("torch.nn")), None)
    if kind is None:
        raise GpusqError(
            f"the activation of {name!r} is a {described(implementation)}", hint="use one of torch.nn's activations"
        )
    return _fresh(implementation, kind)


def _fresh(implementation: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """An activation of torch's own class; Brevitas's are subclasses of these."""
    plain = kind.__new__(kind)
    plain.__dict__.update(implementation.__dict__)
    return plain


def _take_activation(module: Any, attribute: str, place: Place, found: Findings) -> None:
    proxy = getattr(module, attribute, None)
    if proxy is None or not proxy.is_quant_enabled:
        return
    kind = type(proxy).__qualname__
    if "Dynamic" in kind:
        found.dynamic(place, described(proxy))
        return
    inner = type(proxy.fused_activation_quant_proxy.tensor_quant).__qualname__
    if kind not in _UNIFORM_ACTIVATIONS or "RescalingIntQuant" not in (inner, _original_name(proxy)):
        raise GpusqError(f"{str(place)!r} is quantized by {kind} with {inner}, which is not known here", hint=_HINT)
    with torch.no_grad():
        scale, zero_point, bits = proxy.scale(), proxy.zero_point(), int(proxy.bit_width())
    low, high = _range(bits, signed=bool(proxy.is_signed), narrow=bool(proxy.is_narrow_range))
    if scale.numel() > 1:
        raise GpusqError(f"{str(place)!r} has one scale for each channel", hint=_HINT)
    found.add_activation(place, quantizer_like(scale, zero_point, (), low, high), hint=_HINT)


def _original_name(proxy: Any) -> str:
    return str(getattr(proxy.fused_activation_quant_proxy.tensor_quant, "original_name", ""))


def _range(bits: int, *, signed: bool, narrow: bool) -> tuple[int, int]:
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow
