"""What another type or sparsity would bring to a model: its kernels, changed, and timed again.

    in INT8     a product with a weight reads its activation and its weight in another type; what it writes stays
    2:4         every product with a weight can take a sparse kernel, which it takes where that is the faster

Nothing is compiled for it, so what a placement of quantizers adds or saves in other kernels is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from profiles.cost_parameters import CostParameters
from profiles.latency import latency_of
from profiles.machine import Machine
from profiles.work import BYTES, Work


def int8_ms(works: Sequence[Work], machine: Machine, parameters: CostParameters) -> tuple[float, float] | None:
    """Milliseconds with float16 products and with INT8 ones, all dense; None where the device has no INT8."""
    if not {"fp16", "int8"} <= machine.dense.keys() or not any(map(_has_weight, works)):
        return None
    fp16, int8 = ([_typed(_dense(work), number) for work in works] for number in ("fp16", "int8"))
    return latency_of(fp16, machine, parameters).ms, latency_of(int8, machine, parameters).ms


def sparse_ms(works: Sequence[Work], machine: Machine, parameters: CostParameters) -> tuple[float, float] | None:
    """Milliseconds with dense weights and with 2:4 ones, in the types that the model has; None without such kernels."""
    if not any(_has_weight(work) and work.number in machine.sparse for work in works):
        return None
    dense, pruned = ([replace(work, pruned=on and _has_weight(work)) for work in works] for on in (False, True))
    return latency_of(dense, machine, parameters).ms, latency_of(pruned, machine, parameters).ms


def _has_weight(work: Work) -> bool:
    return work.kind in ("gemm", "convolution") and work.weights > 0


def _dense(work: Work) -> Work:
    return replace(work, pruned=False)


def _typed(work: Work, number: str) -> Work:
    if not _has_weight(work):
        return work
    factor = BYTES[number] / BYTES[work.number]
    return replace(work, number=number, read=work.read * factor, weights=work.weights * factor)
