"""The time of each kernel of a model, as TensorRT runs it in a CUDA graph, and what bounds it.

    GEMM, convolution   gemm_time, the faster of dense and 2:4 where the weight is pruned, as the builder chooses
    attention           operations / (rate × share) ⊕ bytes / bandwidth: one fused kernel, its scores never stored
    everything else     bytes / (bandwidth × share)
    each                + one launch: the gap to the next kernel in the graph, and its own start and end

What a kernel reads was written by one before it. As much of that as L2 holds comes from there, at L2's speed; weights
come from the memory, but for those that L2 still holds from the last run (profiles/latency.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from profiles.cost_parameters import CostParameters
from profiles.gemm_time import clock_share, gemm_times
from profiles.machine import Machine
from profiles.work import BYTES, Work

Array = npt.NDArray[np.float64]
_NARROW = 8  # outputs of a group; below, a kernel multiplies on the CUDA cores, and its bytes bound it
_SMALL = 64 * 16  # values of a weight, likewise
_OVERLAP = 0.5  # the patches of a convolution share values, which its tiles take once
_L2_KEPT = 0.5  # share of the cache that is still there when the next kernel reads it


@dataclass(frozen=True)
class KernelTime:
    """One kernel's time.

    Attributes:
        us: µs with its launch, of one of the `count`.
        bound_by: what most of it goes to.
        math_us: what the tensor cores need of it, µs.
        sparse: whether the sparse kernel was the faster.
        modelled: whether the model knows kernels of its kind; if not, `us` counts its bytes alone.
    """

    us: float
    bound_by: str
    math_us: float
    sparse: bool = False
    modelled: bool = True


def kernel_times(
    works: Sequence[Work], machine: Machine, parameters: CostParameters, kept: float = 0.0
) -> list[KernelTime]:
    """Return the time of each of `works` on `machine`, L2 still holding the share `kept` of the weights.

    Raises:
        GpusqError: the machine has no rate for a number type of theirs.
    """
    times: list[KernelTime | None] = [None] * len(works)
    for (kind, number), indices in _products(works).items():
        chosen = [works[index] for index in indices]
        for index, time in zip(indices, _best(chosen, kind, number, machine, parameters, kept), strict=True):
            times[index] = time
    return [
        time or (_attention if _is_attention(work) else _moving)(work, machine, parameters)
        for work, time in zip(works, times, strict=True)
    ]


def _products(works: Sequence[Work]) -> dict[tuple[str, str], list[int]]:
    """The indices of what the tensor cores multiply, by kind and type, so that each group is computed at once."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, work in enumerate(works):
        if work.kind in ("gemm", "convolution") and work.n >= _NARROW and work.k * work.n >= _SMALL:
            groups.setdefault((work.kind, work.number), []).append(index)
    return groups


def _is_attention(work: Work) -> bool:
    return work.kind == "attention" and work.operations > 0


def _best(
    works: Sequence[Work], kind: str, number: str, machine: Machine, parameters: CostParameters, kept: float
) -> list[KernelTime]:
    """The faster of the dense and, where the weight is pruned, the sparse kernel."""
    dense = _of_products(works, kind, number, machine, parameters, kept, sparse=False)
    if number not in machine.sparse or not any(work.pruned for work in works):
        return dense
    sparse = _of_products(works, kind, number, machine, parameters, kept, sparse=True)
    return [s if w.pruned and s.us < d.us else d for w, d, s in zip(works, dense, sparse, strict=True)]


def _of_products(
    works: Sequence[Work],
    kind: str,
    number: str,
    machine: Machine,
    parameters: CostParameters,
    kept: float,
    *,
    sparse: bool,
) -> list[KernelTime]:
    convolution = kind == "convolution"
    speedup = parameters.gemm.l2_speedup
    times = gemm_times(
        machine,
        parameters.gemm,
        number,
        *([getattr(work, axis) for work in works] for axis in ("m", "n", "k")),
        groups=[work.groups for work in works],
        sparse=sparse,
        overlap=_OVERLAP if convolution else 1.0,
        splits=not convolution,
        kept=kept,
        share=_share(machine, parameters, number, convolution=convolution, sparse=sparse),
        read=[_from_memory(work.read, machine, speedup) for work in works],
        written=[_from_memory(work.written, machine, speedup) for work in works],
    )
    launch, cores = _launch(machine, parameters), _cores(number, sparse)
    return [
        _bounded(float(us), float(math), float(memory), launch, cores, sparse)
        for us, math, memory in zip(times.total, times.math, times.memory, strict=True)
    ]


def _share(machine: Machine, parameters: CostParameters, number: str, *, convolution: bool, sparse: bool) -> float:
    """Share of the sustained peak that TensorRT's products keep: float16's on that architecture, and the gains."""
    kernel = parameters.kernel
    share = parameters.gemm.share(machine.architecture, "fp16", sparse=False) * _jetson(machine, parameters)
    if BYTES[number] == 1:
        share *= kernel.int8_gain * min(1 / machine.sustained, kernel.int8_power ** (-1 / 3))
    if convolution:
        share *= kernel.convolution_share
    return share * kernel.sparse_gain if sparse else share


def _jetson(machine: Machine, parameters: CostParameters) -> float:
    return parameters.kernel.jetson_share if machine.integrated else 1.0


def _attention(work: Work, machine: Machine, parameters: CostParameters) -> KernelTime:
    number = work.number if work.number in machine.dense else "fp16"
    clock = clock_share(machine, number)
    # One block takes 64 queries of a head; SMs without one wait.
    blocks = float(np.ceil(work.m / 64) * work.groups)
    waves = np.ceil(blocks / machine.sms) / (blocks / machine.sms)
    math = (
        work.operations
        * float(waves)
        / (machine.dense[number] * clock * parameters.kernel.attention_share * _jetson(machine, parameters))
    )
    memory = _memory_us(work, machine, parameters, 1.0)
    total = float((math**4 + memory**4) ** 0.25)
    return _bounded(total, math, memory, _launch(machine, parameters), "tensor core", False)


def _moving(work: Work, machine: Machine, parameters: CostParameters) -> KernelTime:
    memory = _memory_us(work, machine, parameters, parameters.kernel.pointwise_share)
    found = _bounded(memory, 0.0, memory, _launch(machine, parameters), "tensor core", False)
    return replace(found, modelled=work.kind != "other")


def _memory_us(work: Work, machine: Machine, parameters: CostParameters, share: float) -> float:
    speedup = parameters.gemm.l2_speedup
    moved = work.weights + _from_memory(work.read, machine, speedup) + _from_memory(work.written, machine, speedup)
    return moved / (machine.bandwidth * parameters.gemm.bandwidth_share * share)


def _from_memory(size: float, machine: Machine, speedup: float) -> float:
    """`size` bytes of activations as bytes of the memory: what L2 keeps counts for less."""
    kept = min(size, _L2_KEPT * machine.l2)
    return size - kept + kept / speedup


def _launch(machine: Machine, parameters: CostParameters) -> float:
    return parameters.kernel.launch_cycles / machine.clock


def _bounded(us: float, math: float, memory: float, launch: float, cores: str, sparse: bool) -> KernelTime:
    bound = "launch" if launch > us else cores if math > memory else "bandwidth"
    return KernelTime(us + launch, bound, math, sparse)


def _cores(number: str, sparse: bool) -> str:
    return "CUDA cores" if number == "fp32" else "sparse tensor core" if sparse else "tensor core"
