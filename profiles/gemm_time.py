"""The time of a GEMM, dense or 2:4: the best of the tiles and splits that a library could choose.

    tiles = ⌈M / tile M⌉ × ⌈N / tile N⌉ × splits × groups        waves = ⌈tiles / SMs⌉
    tile  = tile M × tile N × (K / splits + ramp)
    math  = 2 × tile / (rate of one SM × share of the peak)
    feed  = (tile M + tile N) × (K / splits + ramp) × bytes / (bytes that a SM takes in a clock)
    memory = bytes from memory / (bandwidth × share), what fits in L2 being read once, and faster
    time  = (waves × (math ⊕ feed)) ⊕ memory + a pass over the partial sums if K is split,     a ⊕ b = (a⁴ + b⁴)^¼

A 2:4 weight halves the math and is stored with its indices: 9/16 of the bytes in 16 bits, 10/16 in 8. Everything is
computed for arrays of problems at once; times are µs without the launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from profiles.cost_parameters import GemmParameters
from profiles.errors import GpusqError
from profiles.machine import Machine
from profiles.work import BYTES

Array = npt.NDArray[np.float64]

# The thread-block tiles of CUTLASS and cuBLAS, and the splits of K.
_TILES = [(256, 128), (128, 256), (128, 128), (192, 128), (128, 192), (256, 64), (64, 256), (128, 64), (64, 128),
          (64, 64), (128, 32), (32, 128), (64, 32), (32, 64), (32, 32)]  # fmt: skip
_SPLITS = (1, 2, 4, 8, 16)
_CHOICES = np.array([(m, n, splits) for m, n in _TILES for splits in _SPLITS], dtype=np.float64)
_TILE_M, _TILE_N, _SPLIT = (_CHOICES[:, axis][:, None] for axis in range(3))
_POWER = 4.0
_PARTIAL_BYTES = 4
_WEIGHT_SHARE = {16: 9 / 16, 8: 10 / 16, 4: 12 / 16, 32: 9 / 16}


@dataclass(frozen=True)
class GemmTimes:
    """Of each problem, in µs.

    Attributes:
        total: the best choice's time, without a launch.
        math: what the tensor cores need of it.
        memory: what the memory needs of it.
    """

    total: Array
    math: Array
    memory: Array


def gemm_times(
    machine: Machine,
    parameters: GemmParameters,
    number: str,
    m: Any,
    n: Any,
    k: Any,
    *,
    groups: Any = 1.0,
    sparse: bool = False,
    written: Any = None,
    read: Any = None,
    warm: bool = False,
    splits: bool = True,
    overlap: float = 1.0,
    kept: float = 0.0,
    share: float | None = None,
) -> GemmTimes:
    """Return the times of GEMMs [m, k] × [k, n], without the launch.

    Args:
        machine: the device.
        parameters: the fitted figures.
        number: type of the operands.
        m: rows of the activation; of each problem, like all that follow.
        n: outputs.
        k: length of the sums.
        groups: independent products of that size.
        sparse: whether the weight is 2:4 and a sparse kernel takes it.
        written: bytes of the output; those of `number`, at least two a value, where it is left out.
        read: bytes of the activation; m × k values where it is left out.
        splits: whether K may be split over several tiles.
        overlap: share of the activation's values that a tile takes: less than one where rows share them.
        kept: share of the weights that L2 still holds from the last run of the model.
        share: share of the sustained peak that the kernels keep; the library's that was measured where it is left out.
        warm: whether the same problem ran just before, as in a benchmark, so that L2 holds the operands that fit.
    """
    m, n, k, groups = (np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (m, n, k, groups))
    width = BYTES[number]
    stored = _WEIGHT_SHARE[int(width * 8)] if sparse else 1.0
    if share is None:
        share = parameters.share(machine.architecture, number, sparse=sparse)
    waves = np.ceil(np.ceil(m / _TILE_M) * np.ceil(n / _TILE_N) * _SPLIT * groups / machine.sms)
    length = k / _SPLIT + parameters.ramp_bytes / width
    math = waves * 2 * _TILE_M * _TILE_N * length / (_rate(machine, number, sparse) * share / machine.sms)
    taken = parameters.feed_bytes_per_clock[generation(machine)] * machine.clock
    feed = waves * (_TILE_M * overlap + _TILE_N * stored) * length * width / taken
    a = m * k * width * groups if read is None else np.atleast_1d(np.asarray(read, dtype=np.float64))
    b = n * k * width * groups * stored
    c = m * n * groups * max(width, 2.0) if written is None else np.atleast_1d(np.asarray(written, dtype=np.float64))
    wave_reads = 2 * np.sqrt(machine.sms * _TILE_M * _TILE_N * stored) * k * width * waves / _SPLIT
    reread = np.where(a + b < machine.l2, 0.0, np.maximum(0.0, np.minimum(wave_reads, 64 * (a + b)) - a - b))
    moved = a + b * (1 - kept + kept / parameters.l2_speedup) + c + reread
    bandwidth = machine.bandwidth * parameters.bandwidth_share
    if warm:
        moved = np.where(a + b + c < 0.9 * machine.l2, moved / parameters.l2_speedup, moved)
    partial = np.where(_SPLIT > 1, 2 * (_SPLIT - 1) * m * n * groups * _PARTIAL_BYTES, 0.0)
    memory = moved / bandwidth + partial / (bandwidth * parameters.l2_speedup)
    tiles = (math**_POWER + feed**_POWER) ** (1 / _POWER)
    total = (tiles**_POWER + memory**_POWER) ** (1 / _POWER) + np.where(_SPLIT > 1, parameters.split_us, 0.0)
    if not splits:
        total = np.where(_SPLIT > 1, np.inf, total)
    best = total.argmin(axis=0)
    columns = np.arange(total.shape[1])
    return GemmTimes(total[best, columns], math[best, columns], memory[best, columns])


def _rate(machine: Machine, number: str, sparse: bool) -> float:
    """Operations a µs of all SMs at the clock that they sustain."""
    rates = machine.sparse if sparse else machine.dense
    if number not in rates:
        raise GpusqError(
            f"{machine.name} has no {number} rate in its profile, so a kernel of that type cannot be predicted",
            hint="choose another --precision; `gpusq profiles` shows the rates of a device",
        )
    return rates[number] * clock_share(machine, number)


def clock_share(machine: Machine, number: str) -> float:
    """Share of the boost clock that products of that type sustain."""
    return 1.0 if number in machine.halved else machine.sustained


def generation(machine: Machine) -> str:
    """The way in which SMs are fed: `ampere` and Ada copy by thread, Hopper and Blackwell by the TMA."""
    capability = int(machine.architecture.removeprefix("sm"))
    return "ampere" if capability < 90 else "hopper" if capability < 100 else "blackwell"
