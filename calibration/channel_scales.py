"""Factors that make a tensor and the weights behind it easier to quantize: y = (x / s) · (s · W), for any s > 0.

    smooth      s[k] = amax(x[k])^α / amax(W[k])^(1−α)                      arXiv 2211.10438, equation 4
    equalized   s[k] = √(amax(V[k]) / amax(W[k])), V being what makes x     arXiv 1906.04721, equation 11

Which s is best is predicted by the error of the products, each rounding being noise of its own:

    E ‖Δy‖² = (amax(x/s) / 127)² / 12 · ‖s · W‖²   +   Σₖ E[x[k]²] / s[k]² · Σₙ (Q(s·W) − s·W)²[k, n]
                the activation's rounding                 the weight's rounding, as it is

The first term is 0 where activations stay float. Zeros of W have no error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.probes import Channels
from calibration.weight_scales import weight_amax

Float = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
_ALPHAS = np.linspace(0.1, 1.0, 10)
_HIGH = 127
_SMALLEST = 1e-4
# An enlarged channel is clipped sooner on inputs that were not among the samples: it keeps some room above it.
HEADROOM = 2.0
_ROUNDS = 6
_WORTH = 0.98  # of the error: what is won must be more than the noise of the prediction


@dataclass(frozen=True)
class Reader:
    """A weight that multiplies the tensor.

    Attributes:
        weight: float32 [groups, K, N, P]: the tensor has groups · K channels, P is the size of a kernel, 1 for a GEMM.
        block: length of the blocks along K that share a scale; 0 for one scale of each output.
        high: the largest integer of the weight.
    """

    weight: Float
    block: int = 0
    high: int = _HIGH


@dataclass(frozen=True)
class Reading:
    """A tensor, by what its channels reach, and the weights that multiply it."""

    channels: Channels
    readers: Sequence[Reader]


def smooth(readings: Sequence[Reading], alpha: float) -> Float:
    """Return s by equation 4, float32 [C], the largest 1; 1 where a channel or its weights are nothing but zeros."""
    a, w = np.max([reading.channels.amax for reading in readings], axis=0).astype(np.float64), _weight_amax(readings)
    return _ratio(a**alpha, w ** (1 - alpha), (a > 0) & (w > 0))


def equalized(readings: Sequence[Reading], made_by: Float) -> Float:
    """Return s by equation 11, float32 [C]; `made_by` [C] is the largest weight that makes each channel."""
    v, w = made_by.astype(np.float64), _weight_amax(readings)
    return _ratio(np.sqrt(v), np.sqrt(w), (v > 0) & (w > 0))


def best_factors(
    readings: Sequence[Reading],
    *,
    made_by: Float | None = None,
    ceilings: Sequence[tuple[Float, float]] = (),
    activations: bool = True,
    alpha: float | None = None,
) -> tuple[Float, float]:
    """Return s [C] with the least predicted error, and that error over the error without it.

    Args:
        readings: the tensors that have these channels.
        made_by: the largest weight that makes each channel, for the equalization that looks at weights alone.
        ceilings: what the channels reach, [C], below each Clip on the tensors' way, and where it clips.
        activations: whether the tensors themselves are quantized.
        alpha: of equation 4; None to search it.

    Returns:
        s of nothing but ones, and 1, where nothing lowers the error by 2 % at least. What is
        found is the start of another round, until nothing more is won.
    """
    total = np.ones(len(readings[0].channels.amax), np.float32)
    before = predicted_error(readings, total, activations=activations)
    least = before
    for _ in range(_ROUNDS):
        scaled = [_scaled(reading, total) for reading in readings]
        made = None if made_by is None else made_by / total
        found, error = total, least * _WORTH
        for s in _candidates(scaled, made, alpha):
            bounded = total * _with_headroom(scaled, s, [(amax / total, limit) for amax, limit in ceilings])
            predicted = predicted_error(readings, bounded, activations=activations)
            if predicted < error:
                found, error = bounded, predicted
        if found is total:
            break
        total, least = found, error
    return total, least / before if before else 1.0


def predicted_error(readings: Sequence[Reading], s: Float, *, activations: bool = True) -> float:
    """Return the error of the products of all readers with factors `s` [C], summed over their outputs."""
    total = 0.0
    for reading in readings:
        step = float((reading.channels.amax / s).max(initial=0)) / _HIGH if activations else 0.0
        square = (reading.channels.mean_square / np.square(s)).astype(np.float32)
        total += sum(_error(reader, s, step, square) for reader in reading.readers)
    return total


def _error(reader: Reader, s: Float, step: float, square: Float) -> float:
    channels = (*reader.weight.shape[:2], 1, 1)
    w = reader.weight * s.reshape(channels)
    scale = _scales(reader, w)
    rounding = np.square(np.rint(w / scale) * scale - w) * square.reshape(channels)
    return step**2 / 12 * float(np.square(w).sum(dtype=np.float64)) + float(rounding.sum(dtype=np.float64))


def _scales(reader: Reader, w: Float) -> Float:
    """The scales of `w`, so that they broadcast with it."""
    groups, _, n, _ = w.shape
    if reader.block:
        amax = np.repeat(weight_amax(w, 1, reader.block, low=-reader.high - 1, high=reader.high), reader.block, axis=1)
    else:
        rows = w.transpose(0, 2, 1, 3).reshape(groups * n, -1)
        amax = weight_amax(rows, 0, low=-reader.high - 1, high=reader.high).reshape(groups, 1, n, 1)
    return np.asarray(np.where(amax > 0, amax, 1) / np.float32(reader.high), np.float32)


def _candidates(readings: Sequence[Reading], made_by: Float | None, alpha: float | None) -> Iterator[Float]:
    if made_by is not None:
        yield equalized(readings, made_by)
    for value in _ALPHAS.tolist() if alpha is None else [alpha]:
        yield smooth(readings, value)


def _scaled(reading: Reading, s: Float) -> Reading:
    """The reading as it is with factors `s`."""
    channels = Channels(reading.channels.amax / s, (reading.channels.mean_square / np.square(s)).astype(np.float32))
    weights = [
        Reader(reader.weight * s.reshape(*reader.weight.shape[:2], 1, 1), reader.block, reader.high)
        for reader in reading.readers
    ]
    return Reading(channels, weights)


def _with_headroom(readings: Sequence[Reading], s: Float, ceilings: Sequence[tuple[Float, float]]) -> Float:
    """`s`, no channel enlarged beyond 1 / HEADROOM of what its tensor reaches, or of where a Clip above it clips."""
    reached = [(reading.channels.amax, float((reading.channels.amax / s).max())) for reading in readings]
    for amax, limit in (*reached, *ceilings):
        s = np.maximum(s, np.minimum(np.float32(HEADROOM) * amax / np.float32(limit or 1), np.float32(1)))
    return s


def _weight_amax(readings: Sequence[Reading]) -> npt.NDArray[np.float64]:
    readers = [reader for reading in readings for reader in reading.readers]
    each = [np.abs(reader.weight).max(axis=(2, 3)).reshape(-1) for reader in readers]
    return np.asarray(np.max(each, axis=0), np.float64)


def _ratio(top: Wide, bottom: Wide, alive: npt.NDArray[np.bool_]) -> Float:
    """`top` / `bottom` with the largest at 1, and 1 for what is dead."""
    s = np.divide(top, bottom, out=np.ones_like(top), where=alive)
    largest = s[alive].max(initial=0)
    return np.where(alive, s / largest if largest > 0 else 1, 1).clip(min=_SMALLEST).astype(np.float32)
