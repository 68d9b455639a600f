"""torch.ao.quantization, eager and FX, in its three states, and PT2E's fake quantizers, which have the same attributes.

* QAT: `weight_fake_quant` in modules of torch.ao.nn.qat and torch.ao.nn.intrinsic.qat; the BatchNorm that these hold is
  folded as torch does in `convert`. FakeQuantize modules on activations, as children called `activation_post_process`
  with a hook, or as nodes of an FX graph.
* converted: integers in packed parameters of torch.ao.nn.quantized modules, which quantize their output.
* converted to reference: float weights beside their scale in torch.ao.nn.quantized.reference modules.

The scales are the buffers as they stand; nothing is observed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from exporters.quantized_modules.findings import Findings, described, quantizer_like
from exporters.quantized_modules.plain_layer import WEIGHT, plain_layer
from exporters.quantizer import INPUT, OUTPUT, Place, Quantizer
from profiles.errors import GpusqError

HINT = (
    "take a qconfig with symmetric activations: FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, "
    "dtype=torch.quint8, qscheme=torch.per_tensor_symmetric); get_default_qat_qconfig is affine, and the fused variant "
    "is affine behind a ReLU"
)
WEIGHT_HINT = (
    "take default_per_channel_weight_fake_quant: the fused one is affine where a channel has weights of one sign"
)
_OBSERVER = "activation_post_process"
_QAT = ("torch.ao.nn.qat.", "torch.ao.nn.intrinsic.qat.")
_FAKE = ("torch.ao.quantization.fake_quantize", "torchao.quantization.pt2e.fake_quantize")
_OBSERVERS = ("torch.ao.quantization.observer", "torchao.quantization.pt2e.observer")
_FLOAT_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)
_UNIFORM = frozenset({"FakeQuantize", "FusedMovingAvgObsFakeQuantize", "FixedQParamsFakeQuantize"})
_PASS = frozenset({"QuantStub", "DeQuantStub", "DeQuantize", "Dropout"})
# Their forward, or what stands for one, is float torch around children that are replaced.
_CONTAINERS = frozenset({"QuantWrapper", "FloatFunctional", "FXFloatFunctional"})
_CONVERTED = {
    "Linear": nn.Linear,
    "LinearReLU": nn.Linear,
    **{f"{kind}{n}d": getattr(nn, f"Conv{n}d") for kind in ("Conv", "ConvReLU") for n in (1, 2, 3)},
}


def replaced(module: nn.Module, name: str, found: Findings) -> nn.Module | None:
    """Return the plain module that takes the place of `module`; None for one that is not known."""
    source, kind = type(module).__module__, type(module).__qualname__
    if source.startswith(_QAT):
        return _trained(module, name, found)
    if source in _FAKE and kind in _UNIFORM:
        _take_activation(module, Place(name, OUTPUT), found)
        return nn.Identity()
    if source.startswith("torch.ao.nn.quantized.dynamic.") and kind == "Linear":
        found.dynamic(Place(name, INPUT), described(module))
        return _converted(module, name, found)
    if source.startswith("torch.ao.nn.quantized.reference."):
        return _reference(module, name, found)
    if source.startswith(("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")) and kind in _CONVERTED:
        converted = _converted(module, name, found)
        _take_output(module, Place(name, OUTPUT), found)
        return converted
    return _simple(module, source, kind, name, found)


def _simple(module: Any, source: str, kind: str, name: str, found: Findings) -> nn.Module | None:
    if kind == "Quantize":
        _take_output(module, Place(name, OUTPUT), found)
        return nn.Identity()
    if kind == "QFunctional":
        functional = FloatFunctional()
        _take_output(module, Place(f"{name}.{_OBSERVER}", OUTPUT), found)
        return functional
    if source in _OBSERVERS:
        found.notes.append(f"{name} observes only; it was left out")
        return nn.Identity()
    if source == "torch.ao.nn.intrinsic.modules.fused" or kind in _CONTAINERS:
        container: nn.Module = module
        return container
    return nn.Identity() if kind in _PASS else None


def take_output_quantizer(module: nn.Module, name: str, found: Findings) -> None:
    """Take away the fake quantizer that an eager module holds for its output, and the hook that calls it."""
    observer = module._modules.get(_OBSERVER)
    hooks = [key for key, hook in module._forward_hooks.items() if getattr(hook, "__name__", "") == _HOOK]
    if observer is None or not hooks:
        return
    for key in hooks:
        del module._forward_hooks[key]
    del module._modules[_OBSERVER]
    if type(observer).__qualname__ not in _UNIFORM:
        found.notes.append(f"{name}.{_OBSERVER} is a {described(observer)} and quantizes nothing; it was left out")
        return
    _take_activation(observer, Place(name, OUTPUT), found)


_HOOK = "_observer_forward_hook"


def _take_activation(fake: Any, place: Place, found: Findings) -> None:
    if fake.is_dynamic:
        found.dynamic(place, described(fake))
        return
    if not fake.fake_quant_enabled[0]:
        found.notes.append(f"{place} stays float: its fake quantizer is disabled")
        return
    if fake.is_per_channel:
        raise GpusqError(f"{str(place)!r} has one scale for each channel", hint=HINT)
    low, high = _bounds(fake)
    found.add_activation(place, quantizer_like(fake.scale, fake.zero_point, (), low, high), hint=HINT)


def _take_output(module: Any, place: Place, found: Findings) -> None:
    """The output of a converted module: its integers take the whole type."""
    dtype = getattr(module, "dtype", torch.quint8)
    scale, zero = torch.as_tensor(module.scale), torch.as_tensor(module.zero_point)
    found.add_activation(place, quantizer_like(scale, zero, (), *type_range(dtype)), hint=HINT)


def type_range(dtype: torch.dtype) -> tuple[int, int]:
    """The integers of a quantized type."""
    return (0, 255) if dtype in (torch.quint8, torch.uint8) else (-128, 127)


def _trained(module: Any, name: str, found: Findings) -> nn.Module | None:
    kind = next((layer for layer in _FLOAT_LAYERS if isinstance(module, layer)), None)
    if kind is None:
        return None
    weight, bias = _folded(module, name, found)
    if ".dynamic." in type(module).__module__:
        found.dynamic(Place(name, INPUT), described(module))
    fake, place = module.weight_fake_quant, Place(name, WEIGHT)
    if type(fake).__qualname__ not in _UNIFORM:
        raise GpusqError(f"{str(place)!r} is quantized by a {described(fake)}, which is not known here", hint=HINT)
    if fake.fake_quant_enabled[0]:
        quantizer = _weight_quantizer(fake, weight, place)
        weight = _fake_quantized(fake, weight)
        found.add_weight(place, quantizer, weight, hint=WEIGHT_HINT)
    else:
        found.notes.append(f"{place} stays float: its fake quantizer is disabled")
    return _plain_layer(module, kind, weight, bias)


def _folded(module: Any, name: str, found: Findings) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with the BatchNorm in the module, if it has one, folded as torch.ao's convert does."""
    bn = module._modules.get("bn")
    bias = getattr(module, "bias", None)
    if bn is None:
        return module.weight.detach(), bias
    found.notes.append(f"{name}.bn is folded into {name}")
    fold = fuse_linear_bn_weights if isinstance(module, nn.Linear) else fuse_conv_bn_weights
    weight, bias = fold(module.weight, bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    return weight.detach(), bias


def _weight_quantizer(fake: Any, weight: Tensor, place: Place) -> Quantizer:
    low, high = _bounds(fake)
    if not fake.is_per_channel:
        return quantizer_like(fake.scale, fake.zero_point, (), low, high)
    if fake.scale.numel() != weight.shape[fake.ch_axis]:
        raise GpusqError(
            f"{str(place)!r} has {fake.scale.numel()} scales for {weight.shape[fake.ch_axis]} channels",
            hint="it was never trained: run a batch through the model, or load the trained state dict",
        )
    return _per_channel(fake.scale, fake.zero_point, fake.ch_axis, low, high)


def _per_channel(scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int) -> Quantizer:
    return Quantizer(
        scale.detach().float().numpy().copy(), axis, None, low, high, zero_point.detach().to(torch.int32).numpy().copy()
    )


def _fake_quantized(fake: Any, weight: Tensor) -> Tensor:
    """What `fake` makes of `weight`, without letting it observe."""
    low, high = _bounds(fake)
    if fake.is_per_channel:
        return torch.fake_quantize_per_channel_affine(weight, fake.scale, fake.zero_point, fake.ch_axis, low, high)
    return torch.fake_quantize_per_tensor_affine(weight, fake.scale, fake.zero_point, low, high)


def _bounds(fake: Any) -> tuple[int, int]:
    return int(fake.activation_post_process.quant_min), int(fake.activation_post_process.quant_max)


def _reference(module: Any, name: str, found: Findings) -> nn.Module | None:
    kind = next((layer for layer in _FLOAT_LAYERS if isinstance(module, layer)), None)
    if kind is None or not hasattr(module, "get_weight"):
        return None
    weight: Tensor = module.get_weight().detach()
    low, high = type_range(module.weight_dtype)
    if module.weight_quant_min is not None and module.weight_quant_max is not None:
        low, high = module.weight_quant_min, module.weight_quant_max
    if module.weight_qscheme == torch.per_tensor_affine:
        quantizer = quantizer_like(module.weight_scale, module.weight_zero_point, (), low, high)
    else:
        axis = int(module.weight_axis)
        quantizer = _per_channel(module.weight_scale, module.weight_zero_point, axis, low, high)
    if module.weight_qscheme is not None:
        found.add_weight(Place(name, WEIGHT), quantizer, weight, hint=WEIGHT_HINT)
    return _plain_layer(module, kind, weight, getattr(module, "bias", None))


def _converted(module: Any, name: str, found: Findings) -> nn.Module:
    kind = _CONVERTED[type(module).__qualname__]
    packed: Tensor = module.weight()
    place = Place(name, WEIGHT)
    weight = found.add_integers(place, _packed_quantizer(packed), packed.int_repr(), hint=WEIGHT_HINT)
    return _plain_layer(module, kind, weight, module.bias())


def _packed_quantizer(packed: Tensor) -> Quantizer:
    low, high = type_range(packed.dtype)
    if packed.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        scale, zero = packed.q_per_channel_scales(), packed.q_per_channel_zero_points()
        return _per_channel(scale, zero, packed.q_per_channel_axis(), low, high)
    scale, zero = torch.tensor(packed.q_scale()), torch.tensor(packed.q_zero_point())
    return quantizer_like(scale, zero, (), low, high)


def _plain_layer(module: nn.Module, kind: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    plain = plain_layer(module, kind, weight, bias)
    if "ReLU" in type(module).__qualname__:
        plain.register_forward_hook(_relu)
    return plain


def _relu(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.relu(output)
