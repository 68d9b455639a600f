"""Scales of compressed-tensors, which are also the names of the project's own format.

    M.weight             int8 [N, K]; or float, to be quantized with its scales (dense, "frozen")
    M.weight_packed      int32 [N, ceil(K · bits / 32)] with M.weight_shape [2], in place of M.weight
    M.weight_scale       [1], [N, 1] or [N], or [N, K / group]
    M.weight_zero_point  int8, of the shape of the scales; packed along N like the weight
    M.input_scale        [1] or [], likewise M.output_scale; M.input_zero_point

The `quantization_config` of config.json gives each layer its bits and group; without it the shapes do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from exporters.quantizer import INPUT, OUTPUT, Place, Quantizer
from exporters.scales.packing import unpack_words
from exporters.scales.taken import (
    DAMAGED,
    DROP_DYNAMIC,
    WEIGHT,
    Array,
    Hints,
    TakenScales,
    keep_activation,
    keep_factor,
    keep_weight,
    must_have,
    narrowed,
    refuse_float8,
    sound_bits,
    widened,
)
from profiles.errors import GpusqError

_CODES = ("weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx")
_SCALES = ("weight_scale", "input_scale", "output_scale", "input_zero_point", "output_zero_point")
_NAMES = (*_CODES, *_SCALES, "pre_quant_scale")
_REFUSED = {
    "k_scale": "quantizes the KV cache",
    "v_scale": "quantizes the KV cache",
    "q_scale": "quantizes the attention's query",
    "weight_global_scale": "is quantized to FP4",
    "input_global_scale": "is quantized to FP4",
}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_EIGHT = 8
_WORD = 32  # bits
_PARTS = ("weights", "input_activations", "output_activations")
_Integers = npt.NDArray[np.int8]
_Scheme = Mapping[str, Any]


def recognise(state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> bool:
    """Whether the configuration says so, or a scale lies beside an integer weight."""
    return _config(metadata).get("quant_method") == "compressed-tensors" or any(
        name.endswith((".weight_scale", ".weight_packed")) and _is_stored_quantized(state, name.rpartition(".")[0])
        for name in state
    )


def take(state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], hints: Hints) -> TakenScales:
    """Return the weights and the scales of each layer that has some."""
    config = _config(metadata)
    taken: dict[str, torch.Tensor] = {n: t for n, t in state.items() if n.rpartition(".")[2] not in _NAMES}
    quantizers: dict[Place, Quantizer] = {}
    factors: dict[str, Array] = {}
    notes: list[str] = []
    for module, tensors in _layers(state).items():
        scheme = _scheme(config, module)
        _refuse(module, tensors)
        if "weight_scale" in tensors or "weight_packed" in tensors:
            place = Place(module, WEIGHT)
            quantizers[place], taken[str(place)] = _weight(
                place, tensors, _mapping(scheme.get("weights")), hints, notes
            )
        for place in (Place(module, INPUT), Place(module, OUTPUT)):
            arguments = _mapping(scheme.get(f"{place.tensor}_activations"))
            if (found := _activation(place, tensors, arguments, hints, notes)) is not None:
                quantizers[place] = found
        if "pre_quant_scale" in tensors:
            factors[module] = keep_factor(module, widened(tensors["pre_quant_scale"]))
    if config.get("kv_cache_scheme"):
        raise _not_taken("the checkpoint", "quantizes the KV cache")
    kind = f"compressed-tensors, {config['format']}" if config.get("format") else "INT8 weights with their scales"
    return TakenScales(taken, quantizers, kind, tuple(dict.fromkeys(notes)), factors)


def refuse_dynamic(module: str) -> GpusqError:
    """The error for activations whose scales are computed for each token."""
    return GpusqError(
        f"the input of {module!r} is quantized with scales computed while the network runs",
        hint=f"TensorRT has no dynamic INT8: calibrate static scales, or {DROP_DYNAMIC}",
    )


def _layers(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each module that has a scale."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name in state:
        module, _, tensor = name.rpartition(".")
        if tensor in _NAMES or tensor in _REFUSED:
            layers.setdefault(module, {})
    for name, held in state.items():
        module, _, tensor = name.rpartition(".")
        if module in layers:
            layers[module][tensor] = held
    return layers


def _weight(
    place: Place, tensors: Mapping[str, torch.Tensor], arguments: _Scheme, hints: Hints, notes: list[str]
) -> tuple[Quantizer, torch.Tensor]:
    if arguments.get("type") == "float":
        raise refuse_float8(place)
    bits = sound_bits(place, arguments.get("num_bits") or hints.bits or _EIGHT, least=1)
    scale = widened(must_have(tensors, "weight_scale", f"{place}_packed"))
    packed = "weight_packed" in tensors
    weight = None if packed else must_have(tensors, WEIGHT, f"{place}_scale")
    shape = _shape(place, tensors) if weight is None else tuple(weight.shape)
    if packed and not arguments.get("num_bits"):
        _check_width(place, tensors["weight_packed"], shape, bits)
    zero = _zero_point(place, tensors, bits, shape, scale.shape)
    quantizer = _quantizer(place, scale, zero, shape, arguments, bits)
    integers: npt.NDArray[np.integer]
    if weight is None:
        integers = _unpacked(place, tensors, "weight_packed", bits, shape, -1)
    elif weight.dtype == torch.int8:
        integers = weight.cpu().numpy()
    else:
        integers = _rounded(place, weight, tensors["weight_scale"], quantizer)
    if ((integers < quantizer.low) | (integers > quantizer.high)).any():
        hint = DAMAGED if arguments.get("num_bits") else "leave out --bits, or give more"
        raise GpusqError(f"{str(place)!r} holds integers beyond its {bits} bits", hint=hint)
    return keep_weight(place, integers, quantizer, notes)


def _quantizer(
    place: Place,
    scale: Array,
    zero: npt.NDArray[np.int32] | None,
    shape: tuple[int, ...],
    arguments: _Scheme,
    bits: int,
) -> Quantizer:
    axis, block = _layout(place, scale, shape, arguments)
    target = scale.shape if block is not None else (-1,)
    flat, axis = (scale, axis) if block is not None else narrowed(scale.reshape(target), axis)
    quantizer = Quantizer(flat, axis, block, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    return quantizer if zero is None else replace(quantizer, zero_point=zero.reshape(flat.shape))


def _layout(place: Place, scale: Array, shape: tuple[int, ...], arguments: _Scheme) -> tuple[int | None, int | None]:
    """The axis and the block of the scales of a weight."""
    if arguments.get("strategy") == "block":
        raise _not_taken(str(place), "is quantized in blocks of rows and columns")
    if scale.size == 1:
        return None, None
    if shape and scale.size and scale.shape[0] == shape[0] == scale.size:
        return 0, None
    if (
        scale.size
        and 0 not in shape
        and scale.ndim == len(shape)
        and scale.shape[:-1] == shape[:-1]
        and shape[-1] % scale.shape[-1] == 0
    ):
        block = shape[-1] // scale.shape[-1]
        if arguments.get("group_size") in (None, block):
            return len(shape) - 1, block
    raise GpusqError(
        f"the scale of {str(place)!r} is {list(scale.shape)}, which does not fit {list(shape)}",
        hint="one for the tensor, one for each row, or one for each group of a row",
    )


def _rounded(place: Place, weight: torch.Tensor, scale: torch.Tensor, quantizer: Quantizer) -> npt.NDArray[np.int32]:
    """The integers of a float weight, divided in the type in which the library divides."""
    if not weight.is_floating_point() or weight.dtype in _FLOAT8:
        raise refuse_float8(place) if weight.dtype in _FLOAT8 else _not_taken(str(place), f"is {weight.dtype}")
    ones = Quantizer(quantizer.scale, quantizer.axis, quantizer.block).real(np.ones(tuple(weight.shape), np.int8))
    divisor = torch.from_numpy(ones).to(scale.dtype)
    quotient = (weight.detach().cpu() / torch.where(divisor == 0, torch.ones_like(divisor), divisor)).float().numpy()
    shifted = Quantizer(quantizer.zero_point.astype(np.float32), quantizer.axis, quantizer.block)
    zero = shifted.real(np.ones(quotient.shape, np.int8)) if quantizer.zero_point.any() else np.float32(0)
    return np.rint(np.clip(quotient + zero, quantizer.low, quantizer.high)).astype(np.int32)


def _activation(
    place: Place, tensors: Mapping[str, torch.Tensor], arguments: _Scheme, hints: Hints, notes: list[str]
) -> Quantizer | None:
    if arguments.get("dynamic"):
        if not hints.drop_dynamic:
            raise refuse_dynamic(place.module)
        notes.append("activations were quantized with scales computed while the network ran: they stay float")
        return None
    if arguments.get("type") == "float":
        raise refuse_float8(place)
    if f"{place.tensor}_scale" not in tensors:
        if arguments:
            raise GpusqError(f"{str(place)!r} is quantized and has no scale", hint=DAMAGED)
        return None
    if WEIGHT not in tensors and "weight_packed" not in tensors:
        raise GpusqError(f"scale '{place}_scale' belongs to no layer: {place.module!r} has no weight", hint=DAMAGED)
    scale = widened(tensors[f"{place.tensor}_scale"])
    if scale.size != 1:
        raise _not_taken(str(place), f"has {scale.size} scales")
    bits = sound_bits(place, arguments.get("num_bits") or _EIGHT)
    quantizer = Quantizer(scale.reshape(()), low=-(1 << (bits - 1)), high=(1 << (bits - 1)) - 1)
    zero = tensors.get(f"{place.tensor}_zero_point")
    if zero is not None and zero.numel() != 1:
        raise _not_taken(str(place), f"has {zero.numel()} zero-points")
    if zero is not None:
        quantizer = replace(quantizer, zero_point=zero.cpu().to(torch.int32).numpy().reshape(()))
    return keep_activation(place, quantizer)


def _zero_point(
    place: Place, tensors: Mapping[str, torch.Tensor], bits: int, shape: tuple[int, ...], scales: tuple[int, ...]
) -> npt.NDArray[np.int32] | None:
    zero = tensors.get("weight_zero_point")
    if zero is None:
        return None
    if zero.dtype == torch.int32 and "weight_packed" in tensors:
        return _unpacked(place, tensors, "weight_zero_point", bits, (*shape[:-1], scales[-1]), 0).astype(np.int32)
    if zero.numel() != int(np.prod(scales)):
        raise GpusqError(
            f"the zero-point of {str(place)!r} is {list(zero.shape)}, its scale {list(scales)}", hint=DAMAGED
        )
    return np.asarray(zero.cpu().to(torch.int32).numpy(), np.int32)


def _unpacked(
    place: Place, tensors: Mapping[str, torch.Tensor], name: str, bits: int, shape: tuple[int, ...], axis: int
) -> _Integers:
    words = tensors[name]
    try:
        if words.dtype != torch.int32:
            raise ValueError(f"{words.dtype}, expected int32")
        return unpack_words(words.cpu().numpy(), bits, shape, axis)
    except (ValueError, IndexError) as error:
        raise GpusqError(f"'{place.module}.{name}' does not unpack: {error}", hint=DAMAGED) from error


def _check_width(place: Place, words: torch.Tensor, shape: tuple[int, ...], bits: int) -> None:
    """Refuse integers of `bits`, which no configuration tells, in words that hold as many of another width."""
    fit = [width for width in range(1, _EIGHT + 1) if shape and words.shape[-1:] == (-(-shape[-1] * width // _WORD),)]
    if fit and bits not in fit:
        raise GpusqError(
            f"'{place}_packed' has {words.shape[-1]} words for {shape[-1]} integers, which {bits} bits do not fill",
            hint=f"no quantization_config tells how many bits they have: say --bits {' or '.join(map(str, fit))}",
        )


def _shape(place: Place, tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    shape = must_have(tensors, "weight_shape", f"{place}_packed")
    if shape.is_floating_point() or shape.is_complex():
        raise GpusqError(f"'{place}_shape' is {shape.dtype}", hint=DAMAGED)
    return tuple(int(dim) for dim in shape.flatten().tolist())


def _refuse(module: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, reason in _REFUSED.items():
        if name in tensors:
            raise _not_taken(module, reason)
    if (weight := tensors.get(WEIGHT)) is not None and weight.dtype in _FLOAT8:
        raise refuse_float8(f"{module}.weight")
    if "weight_g_idx" in tensors:
        raise _not_taken(f"{module}.weight", "has its columns in groups out of order (act-order)")


def _not_taken(name: str, reason: str) -> GpusqError:
    return GpusqError(
        f"{name!r} {reason}: it is not taken",
        hint="taken are INT8 and INT4 weights with one scale for the tensor, each row or each group, and one scale for "
        "an activation",
    )


def _is_stored_quantized(state: Mapping[str, torch.Tensor], module: str) -> bool:
    weight = state.get(f"{module}.weight")
    return f"{module}.weight_packed" in state or (weight is not None and weight.dtype in (torch.int8, *_FLOAT8))


def _config(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    return _mapping(metadata.get("quantization_config") or metadata.get("compression_config"))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _scheme(config: Mapping[str, Any], module: str) -> _Scheme:
    """What the configuration says about `module`: the group that names it, else the one that names classes."""
    groups = [group for group in _mapping(config.get("config_groups")).values() if isinstance(group, Mapping)]
    named = [group for group in groups if any(_names(target, module) for target in _targets(group))]
    candidates = named or [group for group in groups if any(map(_is_class, _targets(group)))]
    distinct = {repr([group.get(key) for key in _PARTS]): group for group in candidates}
    if len(distinct) > 1:
        raise GpusqError(
            f"{len(distinct)} groups of the quantization_config may be meant for {module!r}",
            hint="let their targets name the layers, not only their classes",
        )
    return next(iter(distinct.values()), {})


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets")
    return [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else []


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and target.isidentifier() and target[:1].isupper()
