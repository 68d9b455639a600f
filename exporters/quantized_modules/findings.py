"""What is found while the modules of a library are replaced."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exporters.quantizer import Place, Quantizer, check_quantizer, revived, symmetric, symmetric_weight
from exporters.scales.taken import DROP_DYNAMIC
from profiles.errors import GpusqError


@dataclass
class Findings:
    """The quantizers of the modules replaced so far.

    Attributes:
        drop_dynamic: leave an activation float whose scale is computed anew for each input, instead of refusing it.
        quantizers: by place.
        notes: what was folded, kept float or decided, one line each.
    """

    drop_dynamic: bool = False
    quantizers: dict[Place, Quantizer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add_activation(self, place: Place, quantizer: Quantizer, *, hint: str = "") -> None:
        """Keep the quantizer of an activation, around 0.

        Raises:
            GpusqError: it has no exact int8 form around 0; the hint says how to train one.
        """
        check_quantizer(quantizer, place)
        try:
            self.quantizers[place] = symmetric(quantizer, place)
        except GpusqError as error:
            raise GpusqError(error.message, hint=hint or error.hint) from None

    def add_weight(self, place: Place, quantizer: Quantizer, values: Tensor, *, hint: str = "") -> None:
        """Keep the quantizer of a parameter whose `values` are what the library computes with.

        Raises:
            GpusqError: `values` are no integers of one byte times the scale; a zero-point that is not folded exactly.
        """
        array = np.asarray(values.detach().float().numpy())
        centred = replace(_revived(quantizer), low=-255, high=255, zero_point=np.zeros((), np.int32))
        check_quantizer(centred, place, array.shape)
        # The values are (q − zero_point) · scale: the zero-point is gone from them already.
        integers = centred.integers(array)
        _check_levels(centred, integers, array, place)
        centred = replace(centred, low=quantizer.low, high=quantizer.high)
        self._keep(place, centred, integers, hint)

    def add_integers(self, place: Place, quantizer: Quantizer, integers: Tensor, *, hint: str = "") -> Tensor:
        """Keep the quantizer of a parameter that is stored as `integers`; return its real values, float32.

        Raises:
            GpusqError: a zero-point that is not folded exactly.
        """
        stored = np.asarray(integers.detach().cpu().numpy())
        quantizer = _revived(quantizer)
        check_quantizer(quantizer, place, stored.shape)
        folded = self._keep(place, quantizer, stored, hint)
        return torch.from_numpy(self.quantizers[place].real(folded))

    def _keep(
        self, place: Place, quantizer: Quantizer, integers: npt.NDArray[np.integer[Any]], hint: str
    ) -> npt.NDArray[np.int8]:
        try:
            self.quantizers[place], folded = symmetric_weight(quantizer, integers, place)
        except GpusqError as error:
            raise GpusqError(error.message, hint=hint or error.hint) from None
        return folded

    def dynamic(self, place: Place, source: str) -> None:
        """Note, or refuse, that the activation at `place` has no scale of its own."""
        if not self.drop_dynamic:
            raise GpusqError(
                f"{str(place)!r} is quantized dynamically ({source}): its scale is computed anew for each input",
                hint=f"TensorRT has no dynamic INT8: train static activation scales, or {DROP_DYNAMIC}",
            )
        self.notes.append(f"{place} stays float: its dynamic quantization ({source}) was dropped")


def quantizer_like(scale: Tensor, zero_point: Tensor | None, shape: tuple[int, ...], low: int, high: int) -> Quantizer:
    """Return the quantizer whose `scale` broadcasts against a tensor of `shape`, or has one entry for each block of it.

    Args:
        scale: one number, or as many axes as the tensor: each of its axes is 1, whole, or counts the blocks.
        zero_point: of the shape of `scale`, or one number.
        shape: of the tensor.
        low: the smallest integer.
        high: the largest integer.
    """
    scales = np.asarray(scale.detach().float().cpu().numpy())
    zeros = _zeros(zero_point, scales.shape)
    if scales.size == 1:
        return Quantizer(scales.reshape(()), low=low, high=high, zero_point=zeros.reshape(()))
    assert scales.ndim == len(shape)
    spread = [axis for axis, dim in enumerate(scales.shape) if dim > 1]
    if len(spread) == 1 and scales.shape[spread[0]] == shape[spread[0]]:
        return Quantizer(scales.reshape(-1), spread[0], low=low, high=high, zero_point=zeros.reshape(-1))
    (blocked,) = [axis for axis in spread if scales.shape[axis] != shape[axis]]
    whole = tuple(dim if axis == blocked else shape[axis] for axis, dim in enumerate(scales.shape))
    block = shape[blocked] // scales.shape[blocked]
    scales, zeros = np.broadcast_to(scales, whole).copy(), np.broadcast_to(zeros, whole).copy()
    return Quantizer(scales, blocked, block, low, high, zeros)


def described(module: Any) -> str:
    """`brevitas.nn.quant_linear.QuantLinear`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _revived(quantizer: Quantizer) -> Quantizer:
    return replace(quantizer, scale=revived(quantizer.scale))


def _zeros(zero_point: Tensor | None, shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
    if zero_point is None:
        return np.zeros(shape, np.int32)
    zeros = zero_point.detach().cpu().numpy()
    return np.broadcast_to(zeros.reshape(shape) if zeros.size > 1 else zeros.reshape(()), shape).astype(np.int32)


def _check_levels(
    quantizer: Quantizer, integers: npt.NDArray[np.int32], values: npt.NDArray[np.floating[Any]], place: Place
) -> None:
    off = quantizer.real(integers) != values
    if off.any():
        worst = float(np.abs(quantizer.real(integers) - values).max())
        raise GpusqError(
            f"{str(place)!r} is no multiple of its scale: {int(off.sum())} of {off.size} values are off by up to "
            f"{worst:g}",
            hint="only uniform integer levels are exported; float formats and codebooks are not INT8",
        )
