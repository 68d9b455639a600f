"""Scales of NVIDIA ModelOpt, and of pytorch-quantization before it.

    M.weight                         float, as trained
    M.weight_quantizer._amax         [] or [1, .., N, .., 1]; [N · blocks, 1] where it is quantized in blocks
    M.input_quantizer._amax          []
    M.input_quantizer._pre_quant_scale   [K], SmoothQuant and AWQ: x · factor, and only then the quantizer

pytorch-quantization calls them `_weight_quantizer` and `_input_quantizer`. Bits, range and blocks are in the
`modelopt_state` beside the weights (`mto.save`); without it they are taken as signed 8-bit, unless hints say otherwise.

    scale = amax / (2^(bits − 1) − 1)           as ModelOpt's own ONNX export divides, in float32
    q = clamp(round(w · ((2^(bits − 1) − 1) / amax)))      as it quantizes in training: these integers are kept
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from exporters.quantizer import INPUT, OUTPUT, Place, Quantizer
from exporters.scales.taken import (
    DAMAGED,
    DROP_DYNAMIC,
    WEIGHT,
    Array,
    Hints,
    TakenScales,
    channel_axis,
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

_QUANTIZER = re.compile(
    r"(?P<quantizer>(?P<path>.*?)(?P<old>_?)(?P<tensor>\w*?)_quantizer)(?P<index>\.\d+)?\.(?P<what>_\w+)"
)
_TENSORS = {"input": INPUT, "weight": WEIGHT, "output": OUTPUT}
_AMAX, _FACTOR = "_amax", "_pre_quant_scale"
_SMALLEST = np.float32(2.0**-24)  # ModelOpt rounds everything to 0 where amax is no larger
_EIGHT = 8


@dataclass(frozen=True)
class _Settings:
    """What the modelopt_state says about one quantizer."""

    bits: int = _EIGHT
    block: int | None = None
    unsigned: bool = False
    narrow: bool = False
    enabled: bool = True
    factor: bool = True

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1 + self.unsigned)) - 1

    @property
    def low(self) -> int:
        return 0 if self.unsigned else -self.high if self.narrow else -self.high - 1


def recognise(state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> bool:
    """Whether a quantizer has an amax, or the modelopt_state tells of quantizers."""
    return bool(_described(metadata)) or any(map(_QUANTIZER.fullmatch, state))


def take(state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], hints: Hints) -> TakenScales:
    """Return the weights and the scales; the quantizers that training had disabled are left out."""
    described = _described(metadata)
    old = any((found := _QUANTIZER.fullmatch(name)) and found["old"] for name in state)
    taken = TakenScales(
        {name: tensor for name, tensor in state.items() if not _QUANTIZER.fullmatch(name)},
        kind="pytorch-quantization" if old else "NVIDIA ModelOpt",
    )
    bits = sound_bits("--bits", hints.bits or _EIGHT)
    notes = [] if described else [_assumed(bits)]
    settings = {name: _settings(name, raw, hints, notes) for name, raw in described.items() if not _is_list(raw)}
    for name, tensor in state.items():
        if found := _QUANTIZER.fullmatch(name):
            _take_one(name, found, tensor, settings, state, bits, taken, notes)
    _check_calibrated(settings, state)
    return TakenScales(taken.state, taken.quantizers, taken.kind, tuple(notes), taken.factors)


def _take_one(
    name: str,
    found: re.Match[str],
    tensor: torch.Tensor,
    settings: Mapping[str, _Settings],
    state: Mapping[str, torch.Tensor],
    bits: int,
    taken: TakenScales,
    notes: list[str],
) -> None:
    quantizer = found["quantizer"] + (found["index"] or "")
    if settings and quantizer not in settings:
        raise GpusqError(f"the modelopt_state does not know {quantizer!r}", hint=DAMAGED)
    known = settings.get(quantizer, _Settings(bits=bits))
    if found["what"] == _FACTOR and found["tensor"] == INPUT:
        if known.factor:
            taken.factors[_module(found)] = keep_factor(_module(found), widened(tensor))
        return
    if not known.enabled:
        return
    if found["what"] != _AMAX or found["tensor"] not in _TENSORS or found["index"]:
        raise GpusqError(
            f"{name!r} belongs to a quantizer of a kind that is not taken",
            hint="those of a layer's input, weight and output are, with one amax each",
        )
    place = Place(_module(found), _TENSORS[found["tensor"]])
    amax = _sound(place, widened(tensor))
    if place.tensor == WEIGHT:
        weight = must_have(state, str(place), name)
        taken.quantizers[place], taken.state[str(place)] = _weight(place, weight, amax, known, notes)
    else:
        taken.quantizers[place] = _activation(place, amax, known, notes)


def _weight(
    place: Place, weight: torch.Tensor, amax: Array, settings: _Settings, notes: list[str]
) -> tuple[Quantizer, torch.Tensor]:
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise GpusqError(f"{str(place)!r} is {weight.dtype}, and not yet quantized by its amax", hint=DAMAGED)
    values = widened(weight)
    amax, axis, block = _layout(place, amax, values.shape, settings.block)
    high = np.float32(settings.high)
    with np.errstate(divide="ignore"):
        rounding = np.where(amax <= _SMALLEST, np.float32(0), high / amax).astype(np.float32)
    quantizer = Quantizer(np.asarray(amax / high), axis, block, settings.low, settings.high)
    factor = Quantizer(rounding, axis, block).real(np.ones(values.shape, np.int8))
    integers = np.clip(np.rint(values * factor), settings.low, settings.high).astype(np.int32)
    return keep_weight(place, integers, quantizer, notes)


def _activation(place: Place, amax: Array, settings: _Settings, notes: list[str]) -> Quantizer:
    if settings.block is not None:
        raise GpusqError(
            f"{str(place)!r} is quantized in blocks of {settings.block}",
            hint="only weights can be; quantize activations with one scale for the tensor",
        )
    axis = channel_axis(amax)
    if axis == -1 or not amax.size:
        raise GpusqError(f"the amax of {str(place)!r} is {list(amax.shape)}", hint="an activation has one scale")
    if axis is not None:
        notes.append(f"{place}: one scale for each channel, which TensorRT computes in floating point")
    scale, axis = narrowed(amax.reshape(-1) / np.float32(settings.high), axis)
    return keep_activation(place, Quantizer(scale, axis, None, settings.low, settings.high))


def _layout(
    place: Place, amax: Array, shape: tuple[int, ...], block: int | None
) -> tuple[Array, int | None, int | None]:
    """`amax` as a quantizer's scales lie, with their axis and block."""
    if block is not None and shape and block < shape[-1]:
        blocks = (*shape[:-1], -(-shape[-1] // block))
        if amax.size != np.prod(blocks):
            raise _misshapen(place, amax, shape)
        return amax.reshape(blocks), len(shape) - 1, block
    axis = channel_axis(amax)
    if (
        axis == -1
        or not amax.size
        or (axis is not None and (amax.ndim > len(shape) or amax.shape[axis] != shape[axis]))
    ):
        raise _misshapen(place, amax, shape)
    flat, axis = narrowed(amax.reshape(-1), axis)
    return flat, axis, None


def _misshapen(place: Place, amax: Array, shape: tuple[int, ...]) -> GpusqError:
    return GpusqError(
        f"the amax of {str(place)!r} is {list(amax.shape)}, which does not fit {list(shape)}",
        hint="one for the tensor, or one for each channel; blocks need the modelopt_state that mto.save writes",
    )


def _sound(place: Place, amax: Array) -> Array:
    bad = ~(np.isfinite(amax) & (amax >= 0))
    if bad.any():
        raise GpusqError(
            f"the amax of {str(place)!r} is {float(amax[bad].flat[0]):g}",
            hint="an amax is finite and not negative: calibrate again, or take the last sound checkpoint",
        )
    return amax


def _module(found: re.Match[str]) -> str:
    return found["path"].removesuffix(".")


def _assumed(bits: int) -> str:
    return (
        f"no modelopt_state: every quantizer is taken as enabled, signed, {bits}-bit, "
        "and its axis from the shape of its amax"
    )


def _described(metadata: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What the last of the modes in the modelopt_state says about each quantizer; empty without one."""
    raw = metadata.get("modelopt_state")
    modes = raw.get("modelopt_state_dict", ()) if isinstance(raw, Mapping) else ()
    described: dict[str, Mapping[str, Any]] = {}
    try:
        for _, mode in modes:
            described = mode.get("metadata", {}).get("quantizer_state") or described
    except (AttributeError, TypeError, ValueError) as error:
        raise GpusqError("the modelopt_state is none that mto.save writes", hint=DAMAGED) from error
    if not isinstance(described, Mapping) or not all(isinstance(raw, Mapping) for raw in described.values()):
        raise GpusqError("the modelopt_state is none that mto.save writes", hint=DAMAGED)
    return described


def _is_list(raw: Mapping[str, Any]) -> bool:
    return bool(raw.get("is_sequential_quantizer"))


def _settings(name: str, raw: Mapping[str, Any], hints: Hints, notes: list[str]) -> _Settings:
    """The settings of a quantizer.

    Raises:
        GpusqError: it is enabled, and of a kind that no integers and scale reproduce.
    """
    enabled = not raw.get("_disabled", False) and raw.get("_if_quant", True)
    factor = bool(raw.get("_enable_pre_quant_scale", True))
    if raw.get("_rotate"):
        raise GpusqError(f"{name!r} rotates its input", hint="train or export it without rotation")
    if not enabled:
        return _Settings(enabled=False, factor=factor)
    bits, blocks = raw.get("_num_bits", _EIGHT), raw.get("_block_sizes")
    if not isinstance(bits, int):
        if bits in ((4, 3), [4, 3]):
            raise refuse_float8(name)
        raise GpusqError(f"{name!r} quantizes to floats of {bits} bits", hint="quantize to INT8 or INT4")
    if blocks is not None and not isinstance(blocks, Mapping):
        raise GpusqError(f"{name!r} has blocks of {blocks!r}", hint=DAMAGED)
    if raw.get("_dynamic") or (blocks and blocks.get("type") == "dynamic"):
        if not hints.drop_dynamic or name.endswith("weight_quantizer"):
            raise GpusqError(
                f"{name!r} computes its scale while the network runs",
                hint=f"TensorRT has no dynamic INT8: calibrate it, type 'static', or {DROP_DYNAMIC}",
            )
        notes.append(f"{name} computed its scale while the network ran: its activation stays float")
        return _Settings(enabled=False, factor=factor)
    bits = sound_bits(name, bits)
    if raw.get("_bias") or not raw.get("_fake_quant", True) or raw.get("_learn_amax"):
        raise GpusqError(
            f"{name!r} is quantized with an offset, compressed, or with two learned scales",
            hint="save it before mtq.compress, with plain symmetric quantizers",
        )
    return _Settings(
        bits=bits,
        block=_block(name, blocks),
        unsigned=bool(raw.get("_unsigned", False)),
        narrow=bool(raw.get("_narrow_range", False)),
        factor=factor,
    )


def _block(name: str, blocks: Mapping[Any, Any] | None) -> int | None:
    sizes = {axis: size for axis, size in (blocks or {}).items() if isinstance(axis, int) and size}
    if not sizes:
        return None
    (axis, size), *more = sizes.items()
    if more or axis != -1 or not isinstance(size, int) or size < 1:
        raise GpusqError(
            f"{name!r} is quantized in blocks along {sorted(sizes)}", hint="blocks lie along the last axis"
        )
    return int(size)


def _check_calibrated(settings: Mapping[str, _Settings], state: Mapping[str, torch.Tensor]) -> None:
    for name, known in settings.items():
        if known.enabled and f"{name}.{_AMAX}" not in state:
            raise GpusqError(
                f"{name!r} has no amax: it was enabled and never calibrated",
                hint="calibrate with samples that reach this layer, or disable it",
            )
