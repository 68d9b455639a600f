"""Fit the GEMM's figures to the table of GEMMs.

First what all devices share, and each device's floor: the launch as that benchmark timed it, which a CUDA graph does
not have, and which is used for nothing else. Then, with those fixed, the share of the peak of each architecture and
type. Series that contradict physics are told apart, fitted by nobody, and shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from profiles.cost_parameters import GemmParameters
from profiles.device import load_device
from profiles.gemm_time import gemm_times
from profiles.least_squares import Fit, fit_figures
from profiles.machine import Machine, machine_of
from profiles.published import GEMM_DEVICES, PublishedGemm, read_gemms

Array = npt.NDArray[np.float64]
THIN = 3  # each third problem is fitted
TYPES = ("fp16", "bf16", "int8", "fp8")
_PHYSICS = {
    "feed.ampere": 24.0,
    "feed.hopper": 37.0,
    "feed.blackwell": 100.0,
    "ramp_bytes": 4.0,
    "bandwidth_share": 0.8,
    "l2_speedup": 2.7,
    "split_us": 2.8,
}
# Boards with neither a base clock nor a relative.
_WITHOUT_CLOCK = {"b200": 0.78}
# What each series contradicts.
SUSPECT = {
    ("DGX Spark GB10", "fp4", False): "up to 1.29 times the dense peak",
    ("B200 180GB SXM", "fp4", False): "up to 1.43 times the dense peak",
    ("DGX Spark GB10", "fp4", True): "paired with a dense series beyond its peak",
    ("B200 180GB SXM", "fp4", True): "paired with a dense series beyond its peak",
    ("RTX5080", "fp4", False): "0.38 of the peak at most, and five rows",
    ("RTX5080", "fp4", True): "0.19 of the peak at most, and five rows",
    ("B200 180GB SXM", "int8", False): "0.21 of the peak at most, where FP8, at the same rate, reaches 0.72",
    ("DGX Spark GB10", "bf16", True): "two kernels by turns, 0.28 or 0.56 of the peak for like shapes",
    ("DGX Spark GB10", "fp16", True): "two kernels by turns, 0.28 or 0.56 of the peak for like shapes",
}


@dataclass(frozen=True)
class Series:
    """All problems of one device, type and kernel."""

    device: str
    number: str
    sparse: bool
    rows: tuple[PublishedGemm, ...]

    @property
    def key(self) -> tuple[str, str, bool]:
        """What tells it from the others."""
        return self.device, self.number, self.sparse

    @property
    def machine(self) -> Machine:
        """Its device."""
        return _machine(self.device)

    @property
    def share_key(self) -> str:
        """The key of its share in the parameters."""
        return f"{self.machine.architecture}.{self.number}"

    @property
    def us(self) -> Array:
        """The published times."""
        return np.array([row.sparse_us if self.sparse else row.dense_us for row in self.rows])

    def residuals(self, parameters: GemmParameters, floor: float, sustained: dict[str, float]) -> Array:
        """log(predicted / published) of each problem."""
        machine = self.machine
        machine = replace(machine, sustained=sustained.get(machine.name, machine.sustained))
        sizes = ([getattr(row, axis) for row in self.rows] for axis in ("m", "n", "k"))
        times = gemm_times(machine, parameters, self.number, *sizes, sparse=self.sparse, warm=True)
        return np.asarray(np.log((times.total + floor) / self.us))


@dataclass(frozen=True)
class GemmFit:
    """The fit of the table."""

    parameters: GemmParameters
    floors: dict[tuple[str, bool], float]
    sustained: dict[str, float]
    fit: Fit
    series: tuple[Series, ...]


def all_series(thin: int = 1) -> tuple[Series, ...]:
    """Every series of the table, of each `thin`-th problem."""
    rows: dict[tuple[str, str], list[PublishedGemm]] = {}
    for row in read_gemms():
        rows.setdefault((row.device, row.number), []).append(row)
    return tuple(Series(*key, sparse, tuple(found[::thin])) for key, found in rows.items() for sparse in (False, True))


def fit_gemm(thin: int = THIN) -> GemmFit:
    """Fit the figures of GEMMs to each `thin`-th problem."""
    series = tuple(each for each in all_series(thin) if each.key not in SUSPECT)
    floors = [(device, sparse) for device in GEMM_DEVICES for sparse in (False, True)]
    guess = [*_PHYSICS.values(), *_WITHOUT_CLOCK.values(), *[0.95] * 4, *[0.85] * 4, *[5.0] * len(floors)]
    looseness = [0.3] * (len(_PHYSICS) + 1) + [0.2] * 8 + [0.7] * len(floors)

    def residuals(x: Array) -> Array:
        parameters, floor, sustained = _figures(x)
        return np.concatenate([s.residuals(parameters, floor[s.device, s.sparse], sustained) for s in series])

    groups = [each.key for each in series for _ in each.rows]
    fit = fit_figures(residuals, guess, groups, looseness=[x / 2 for x in looseness], steps=6)
    parameters, floor, sustained = _figures(fit.x)
    return GemmFit(_with_shares(parameters, series, floor, sustained), floor, sustained, fit, series)


def generic(fit: GemmFit, x: Array, left_out: str) -> tuple[GemmParameters, dict[tuple[str, bool], float]]:
    """The figures `x` for a device that is not among the fitted ones: no share of its own, the others' usual floor."""
    parameters, floors, _ = _figures(x)
    others = {
        sparse: [us for (name, s), us in floors.items() if s == sparse and name != left_out] for sparse in (False, True)
    }
    usual = {(left_out, sparse): float(np.median(found)) for sparse, found in others.items()}
    return parameters, {**floors, **usual}


def _figures(x: Array) -> tuple[GemmParameters, dict[tuple[str, bool], float], dict[str, float]]:
    values = iter(np.exp(x).tolist())
    physics = {name: next(values) for name in _PHYSICS}
    sustained = {name: next(values) for name in _WITHOUT_CLOCK}
    dense, sparse = ({kind: next(values) for kind in TYPES} for _ in range(2))
    floors = {(device, pruned): next(values) for device in GEMM_DEVICES for pruned in (False, True)}
    feed = {name.removeprefix("feed."): physics.pop(name) for name in list(physics) if name.startswith("feed.")}
    return (
        GemmParameters(feed_bytes_per_clock=feed, dense_share=dense, sparse_share=sparse, **physics),
        floors,
        sustained,
    )


def _with_shares(
    parameters: GemmParameters,
    series: Sequence[Series],
    floors: dict[tuple[str, bool], float],
    sustained: dict[str, float],
) -> GemmParameters:
    """The figures with the share of each architecture and type: the one with which its series is off by nothing."""
    for each in series:
        shares = parameters.sparse_share if each.sparse else parameters.dense_share
        start = shares[each.number]
        tried = start * np.linspace(0.6, 1.3, 29)
        off = [
            float(
                np.median(
                    np.abs(each.residuals(_share(parameters, each, value), floors[each.device, each.sparse], sustained))
                )
            )
            for value in tried
        ]
        parameters = _share(parameters, each, float(tried[int(np.argmin(off))]))
    return parameters


def _share(parameters: GemmParameters, series: Series, value: float) -> GemmParameters:
    field = "sparse_share" if series.sparse else "dense_share"
    return parameters.model_copy(update={field: {**getattr(parameters, field), series.share_key: value}})


@cache
def _machine(device: str) -> Machine:
    return machine_of(load_device(GEMM_DEVICES[device]))
