"""The latency of a model on a device: its kernels one after another, as in a CUDA graph.

    latency = start + Σ count × (time of the kernel + one launch)

A board falls from its boost clock to its sustained one only when the tensor cores are busy all the time. So the share
of the run that they are busy decides where between the two the clock stands.

A small model's weights stay in L2 from one run to the next: all of them up to half of the cache, none beyond one and a
half of it, where each run drives out what the next one needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from profiles.cost_parameters import CostParameters
from profiles.kernel_time import KernelTime, kernel_times
from profiles.machine import Machine
from profiles.work import Work


@dataclass(frozen=True)
class Latency:
    """The predicted latency of a model.

    Attributes:
        ms: milliseconds of one run.
        kernels: the time of each of its works, in their order.
        bound_by: what most of the time goes to.
        unmodelled: share of the time in kernels that the model does not know, whose bytes alone were counted.
    """

    ms: float
    kernels: tuple[KernelTime, ...]
    bound_by: str
    unmodelled: float


def latency_of(works: Sequence[Work], machine: Machine, parameters: CostParameters) -> Latency:
    """Return the latency of a model that is `works` on `machine`.

    Raises:
        GpusqError: the machine has no rate for a number type of theirs.
    """
    machine = replace(machine, sustained=parameters.sustained.get(machine.name, machine.sustained))
    kept = _kept(works, machine)
    times = kernel_times(works, replace(machine, sustained=1.0), parameters, kept)
    busy = _busy(works, times)
    held = 1 - (1 - machine.sustained) * min(1.0, busy / parameters.kernel.full_load)
    if held < 1:
        times = kernel_times(works, replace(machine, sustained=held), parameters, kept)
    total = sum(work.count * time.us for work, time in zip(works, times, strict=True))
    by: dict[str, float] = {}
    for work, time in zip(works, times, strict=True):
        by[time.bound_by] = by.get(time.bound_by, 0.0) + work.count * time.us
    unknown = sum(work.count * time.us for work, time in zip(works, times, strict=True) if not time.modelled)
    return Latency(
        ms=(total + parameters.kernel.start_us) / 1e3,
        kernels=tuple(times),
        bound_by=max(by, key=lambda bound: by[bound]) if by else "launch",
        unmodelled=unknown / total if total else 0.0,
    )


def _kept(works: Sequence[Work], machine: Machine) -> float:
    """Share of the weights that L2 holds from the last run."""
    return min(1.0, max(0.0, 1.5 - sum(work.count * work.weights for work in works) / machine.l2))


def _busy(works: Sequence[Work], times: Sequence[KernelTime]) -> float:
    """Share of the time in which the tensor cores multiply."""
    total = sum(work.count * time.us for work, time in zip(works, times, strict=True))
    return sum(work.count * time.math_us for work, time in zip(works, times, strict=True)) / total if total else 0.0
