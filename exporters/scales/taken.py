"""What a grammar finds in a state dict, and the arithmetic that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from exporters.quantizer import INPUT, OUTPUT, Place, Quantizer, check_quantizer, revived, symmetric, symmetric_weight
from profiles.errors import GpusqError

Array = npt.NDArray[np.float32]
WEIGHT = "weight"
_MOST_BITS = 8
DAMAGED = "the checkpoint is damaged, or belongs to another library than its names say"
DROP_DYNAMIC = "keep the weights alone quantized with --drop-dynamic"
FLOAT8 = "FP8 is not taken yet: quantize to INT8, or export the float model"


@dataclass(frozen=True)
class Hints:
    """What the user decided where a checkpoint leaves it open.

    Attributes:
        drop_dynamic: keep the weights and leave out activations whose scales are computed while the network runs.
        bits: of the integers, where the checkpoint does not say; 8 without it.
    """

    drop_dynamic: bool = False
    bits: int | None = None


@dataclass(frozen=True)
class TakenScales:
    """A state dict without its quantizers, and the quantizers.

    Attributes:
        state: float weights for the plain architecture; a quantized weight is float32 `integers · scale`.
        quantizers: the trained scales by place.
        kind: whose names these were, in words; empty where there were none.
        notes: what was decided where two readings were possible, and what was changed.
        factors: float32 [channels] by module: the module's input is multiplied by it, ahead of its quantizer.
    """

    state: dict[str, torch.Tensor]
    quantizers: dict[Place, Quantizer] = field(default_factory=dict)
    kind: str = ""
    notes: tuple[str, ...] = ()
    factors: dict[str, Array] = field(default_factory=dict)


def widened(tensor: torch.Tensor) -> Array:
    """`tensor` in float32; float16 and bfloat16 widen without loss."""
    return np.asarray(tensor.detach().to(torch.float32).cpu().numpy(), np.float32)


def narrowed(scale: Array, axis: int | None) -> tuple[Array, int | None]:
    """One scale for the whole tensor where there is but one number."""
    return (scale.reshape(()), None) if scale.size == 1 else (scale, axis)


def channel_axis(scale: Array) -> int | None:
    """The only axis of `scale` that is longer than 1; None where none is, -1 where several are."""
    long = [axis for axis, dim in enumerate(scale.shape) if dim > 1]
    return None if not long else long[0] if len(long) == 1 else -1


def keep_weight(
    place: Place, integers: npt.NDArray[np.integer], quantizer: Quantizer, notes: list[str]
) -> tuple[Quantizer, torch.Tensor]:
    """Return the quantizer around 0 of a weight of `integers`, with positive scales, and its float32 values."""
    moved, kept = symmetric_weight(quantizer, integers, place)
    if quantizer.zero_point.any():
        notes.append(f"{place}: its zero-point is folded into integers of {moved.low} to {moved.high}")
    moved = _revive(place, kept, moved, notes)
    check_quantizer(moved, place, kept.shape)
    return moved, torch.from_numpy(moved.real(kept))


def keep_activation(place: Place, quantizer: Quantizer) -> Quantizer:
    """Return the quantizer around 0 of an activation."""
    assert place.tensor in (INPUT, OUTPUT)
    if not quantizer.scale.all():
        raise GpusqError(
            f"the scale of {str(place)!r} is 0: its calibration saw nothing but zeros",
            hint="calibrate with samples that reach this layer, or leave it unquantized",
        )
    check_quantizer(quantizer, place)
    return symmetric(quantizer, place)


def sound_bits(place: object, bits: object, least: int = 2) -> int:
    """Return `bits` where integers of so many fit int8."""
    if not isinstance(bits, int) or not least <= bits <= _MOST_BITS:
        raise GpusqError(
            f"{str(place)!r} is quantized to {bits!r} bits", hint=f"taken are integers of {least} to {_MOST_BITS} bits"
        )
    return bits


def keep_factor(module: str, factor: Array) -> Array:
    """Return `factor`, finite and not 0."""
    bad = ~np.isfinite(factor) | (factor == 0)
    if bad.any():
        raise GpusqError(
            f"the factor of the input of {module!r} is {float(factor[bad].flat[0]):g}",
            hint="factors are finite and not 0",
        )
    return factor


def refuse_float8(place: object) -> GpusqError:
    """The error for a tensor that is quantized to FP8."""
    return GpusqError(f"{str(place)!r} is quantized to FP8", hint=FLOAT8)


def must_have(state: Mapping[str, torch.Tensor], name: str, scale: str) -> torch.Tensor:
    """Return the tensor `name` that `scale` belongs to."""
    if name not in state:
        raise GpusqError(f"scale {scale!r} belongs to no tensor {name!r}", hint=DAMAGED)
    return state[name]


def _revive(place: Place, integers: npt.NDArray[np.int8], quantizer: Quantizer, notes: list[str]) -> Quantizer:
    dead = quantizer.scale == 0
    if not dead.any():
        return quantizer
    if replace(quantizer, scale=dead.astype(np.float32)).real(integers).any():
        raise GpusqError(f"the scale of {str(place)!r} is 0 where its integers are not", hint=DAMAGED)
    notes.append(f"{place}: {int(dead.sum())} dead channels, whose scale was 0, have the scale 1")
    return replace(quantizer, scale=revived(quantizer.scale))
