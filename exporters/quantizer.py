"""What training decided about one quantized tensor.

    q = clamp(round_half_even(x / scale) + zero_point, low, high),   x ≈ (q − zero_point) · scale

A student has such quantizers at places: the input or the output of a module, or one of its parameters. NVIDIA's
compilers quantize symmetrically to signed integers, so a quantizer is moved to a zero-point of 0 where that changes no
number, and refused by name where it would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from exporters.slices import cuts
from profiles.errors import GpusqError

INPUT, OUTPUT = "input", "output"
_ASYMMETRIC = "train or calibrate it with symmetric quantization; NVIDIA's compilers take no zero-point"
_UNSIGNED = (
    "train or calibrate it with signed symmetric integers, or with 7 bits or fewer; NVIDIA's compilers take no uint8"
)
INT8_LOW, INT8_HIGH = INT8 = (-128, 127)
INT4 = (-8, 7)
Grid = Literal["integers", "e4m3", "nvfp4"]
"""What values are rounded to: integers, 8-bit floats, or 4-bit floats in blocks with a scale each."""
E4M3 = (-448, 448)  # the largest finite numbers of ONNX's FLOAT8E4M3FN
# The operator that stands for a quantizer while a module is traced.
DOMAIN, OPERATOR = "gpusq", "FakeQuantize"


class Place(NamedTuple):
    """Where a quantizer sits.

    Attributes:
        module: name of the module, `blocks.0.attn.qkv`.
        tensor: `input`, `output`, or the name of a parameter, `weight`.
    """

    module: str
    tensor: str

    @property
    def is_parameter(self) -> bool:
        """Whether the tensor is a parameter of the module."""
        return self.tensor not in (INPUT, OUTPUT)

    def __str__(self) -> str:
        return f"{self.module}.{self.tensor}" if self.module else self.tensor


def _no_shift() -> npt.NDArray[np.int32]:
    return np.zeros((), np.int32)


@dataclass(frozen=True)
class Quantizer:
    """One scale for the tensor, one for each channel along `axis`, or one for each block of `block` along it.

    Attributes:
        scale: float32, strictly positive; [], [channels], or the tensor's shape with `axis` divided by `block`.
        axis: of the tensor that is quantized; None for one scale.
        block: length of the blocks; None where there are none.
        low: the smallest integer.
        high: the largest integer.
        zero_point: int32, [] or the shape of `scale`.
        grid: `integers`, or `e4m3` for 8-bit floats, which reach from `low` to `high` too.
    """

    scale: npt.NDArray[np.float32]
    axis: int | None = None
    block: int | None = None
    low: int = INT8[0]
    high: int = INT8[1]
    zero_point: npt.NDArray[np.int32] = field(default_factory=_no_shift)
    grid: Grid = "integers"

    @property
    def bits(self) -> int:
        """Bits that the integers take."""
        return max(self.high.bit_length(), (-self.low - 1).bit_length() if self.low < 0 else 0) + (self.low < 0)

    def integers(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.int32]:
        """Quantize `values`, the whole tensor; int32 of the same shape."""
        scale, zero = self.spread(self.scale, values.shape), self.spread(self.zero_point, values.shape)
        with np.errstate(over="ignore"):
            q = np.rint(values.astype(np.float32, copy=False) / scale) + zero
        return np.asarray(np.clip(q, self.low, self.high), np.int32)

    def codes(self, values: npt.NDArray[np.floating]) -> npt.NDArray[Any]:
        """What is stored of `values`, the whole tensor: integers, or floats that their type still rounds."""
        if self.grid == "integers":
            return self.integers(values)
        scaled = values.astype(np.float32, copy=False) / self.spread(self.scale, values.shape)
        return np.asarray(np.clip(scaled, self.low, self.high), np.float32)

    def stored(self, values: npt.NDArray[np.floating], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Quantize `values`, the whole tensor, part by part: nothing else of its size is allocated than the result.

        Returns the integers or small floats in `dtype`, of the same shape.
        """
        if values.ndim < 2:
            return self.codes(values).astype(dtype)
        result = np.empty(values.shape, dtype)
        across = 1 if self.axis is not None and self.axis % values.ndim == 0 else 0
        for cut in cuts(values.shape, across):
            result[cut] = self._at(cut).codes(values[cut])
        return result

    def _at(self, cut: tuple[slice, ...]) -> Quantizer:
        """The quantizer of a part of its tensor, cut along another axis than that of the scales."""
        if self.block is None:
            return self
        shifts = self.zero_point[cut] if self.zero_point.ndim else self.zero_point
        return replace(self, scale=self.scale[cut], zero_point=shifts)

    def real(self, integers: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Dequantize `integers`; float32 of the same shape."""
        zero = self.spread(self.zero_point, integers.shape)
        shifted = (integers.astype(np.int32) - zero).astype(np.float32)
        return np.asarray(shifted * self.spread(self.scale, integers.shape), np.float32)

    def spread(self, array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Give `array`, a scale or a zero-point, a shape that broadcasts against a tensor of `shape`."""
        if array.ndim == 0 or self.axis is None:
            return array
        return spread(array, shape, self.axis, self.block)


def spread(array: npt.NDArray[Any], shape: tuple[int, ...], axis: int, block: int | None = None) -> npt.NDArray[Any]:
    """Give `array`, one entry for each channel along `axis` or each block of it, a shape that broadcasts to `shape`."""
    axis %= len(shape)
    if block is not None:
        return np.repeat(array, block, axis=axis)[(*(slice(None),) * axis, slice(shape[axis]))]
    return array.reshape([-1 if index == axis else 1 for index in range(len(shape))])


def check_quantizer(quantizer: Quantizer, place: Place, shape: tuple[int, ...] | None = None) -> None:
    """Raise GpusqError unless `quantizer` is sound and, where `shape` is that of its tensor, fits it."""
    scale = quantizer.scale
    if scale.dtype != np.float32 or quantizer.zero_point.dtype != np.int32:
        raise TypeError(f"{place}: scale {scale.dtype}, zero-point {quantizer.zero_point.dtype}")
    bad = ~(np.isfinite(scale) & (scale > 0))
    if bad.any():
        raise GpusqError(
            f"the scale of {str(place)!r} is {float(scale[bad].flat[0]):g}{_where(bad)}",
            hint="scales are finite and positive; a dead channel may have any positive one, such as 1/127",
        )
    if quantizer.zero_point.shape not in ((), scale.shape):
        raise GpusqError(
            f"the zero-point of {str(place)!r} is {list(quantizer.zero_point.shape)}, its scale {list(scale.shape)}",
            hint="the two have one shape",
        )
    if shape is not None and scale.shape != (expected := _scale_shape(quantizer, place, shape)):
        raise GpusqError(
            f"the scale of {str(place)!r} is {list(scale.shape)}, expected {list(expected)} for {list(shape)}",
            hint="the checkpoint belongs to another architecture, or its scales were cut",
        )


def symmetric(quantizer: Quantizer, place: Place) -> Quantizer:
    """Return `quantizer` with a zero-point of 0 and a range within int8, exactly the same function.

    Shifting integers and zero-point alike changes nothing as long as the shifted range fits: uint8 around 128 is int8
    around 0, uint4 around 8 is int4.

    Raises:
        GpusqError: the shifted range does not fit int8.
    """
    shift = np.unique(quantizer.zero_point)
    low, high = quantizer.low - int(shift.min()), quantizer.high - int(shift.max())
    same = len(shift) == 1
    if same and low >= INT8[0] and high <= INT8[1]:
        return replace(quantizer, low=low, high=high, zero_point=_no_shift())
    zero = str(shift[0]) if same else f"{shift[0]} to {shift[-1]}"
    raise GpusqError(
        f"{str(place)!r} is quantized asymmetrically: zero-point {zero} with integers {quantizer.low} to "
        f"{quantizer.high} is no int8 around 0",
        hint=_UNSIGNED if same and not shift[0] and quantizer.low == 0 else _ASYMMETRIC,
    )


def symmetric_weight(
    quantizer: Quantizer, integers: npt.NDArray[np.integer], place: Place
) -> tuple[Quantizer, npt.NDArray[np.int8]]:
    """Return `quantizer` around 0 and the weight's integers with it; exact where each integer that occurs fits int8."""
    shifted = integers.astype(np.int32) - quantizer.spread(quantizer.zero_point, integers.shape)
    low, high = int(shifted.min(initial=0)), int(shifted.max(initial=0))
    if low < INT8[0] or high > INT8[1]:
        raise GpusqError(
            f"{str(place)!r} is quantized asymmetrically: without its zero-point its integers are {low} to {high}",
            hint="train or calibrate weights with symmetric quantization; NVIDIA's compilers take no zero-point",
        )
    if quantizer.zero_point.any():
        low, high = INT4 if low >= INT4[0] and high <= INT4[1] else INT8
        quantizer = replace(quantizer, low=low, high=high)
    return replace(quantizer, zero_point=_no_shift()), shifted.astype(np.int8)


def revived(scale: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Return `scale` in float32 with 1.0 where it is 0: in a pruned channel every integer is 0 anyway."""
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32)


def by_module(quantizers: Mapping[Place, Quantizer]) -> dict[str, dict[str, Quantizer]]:
    """Group by module's name, then by tensor."""
    grouped: dict[str, dict[str, Quantizer]] = {}
    for place, quantizer in quantizers.items():
        grouped.setdefault(place.module, {})[place.tensor] = quantizer
    return grouped


def _scale_shape(quantizer: Quantizer, place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    if quantizer.axis is None:
        return ()
    if not -len(shape) <= quantizer.axis < len(shape):
        raise GpusqError(
            f"the quantizer of {str(place)!r} has axis {quantizer.axis}, the tensor {len(shape)} axes",
            hint="the checkpoint belongs to another architecture",
        )
    axis = quantizer.axis % len(shape)
    if quantizer.block is None:
        return (shape[axis],)
    return tuple(-(-dim // quantizer.block) if index == axis else dim for index, dim in enumerate(shape))


def _where(bad: npt.NDArray[np.bool_]) -> str:
    return "" if bad.ndim == 0 else f" in channel {', '.join(map(str, np.argwhere(bad)[0]))}"
