"""Predict a published figure as its source measured it: the kernels, the device, and what its program adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from profiles.cost_parameters import CostParameters, SoftwareEffect
from profiles.latency import latency_of
from profiles.machine import machine_of
from profiles.published import PublishedLatency, pruned, read_works
from profiles.work import Work

_MLP_ROWS = 197  # of the batch of 1 that the kernels of the MLP are compiled at, eight times


def replayed_ms(row: PublishedLatency, parameters: CostParameters) -> float:
    """Return the latency that the model predicts for `row`, in milliseconds.

    Without a CUDA graph the CPU enqueues kernel after kernel, and the GPU waits for it where it is the faster.
    """
    works = works_of_row(row)
    device = row.profile
    assert device is not None
    effect = parameters.software.get(row.program, SoftwareEffect())
    latency = latency_of(works, machine_of(device), parameters)
    enqueued = sum(work.count for work in works) * effect.enqueue_us / 1e3
    return max(latency.ms, enqueued) + effect.start_us / 1e3


@cache
def works_of_row(row: PublishedLatency) -> tuple[Work, ...]:
    """The kernels of the model of `row` at its batch, in its precision and sparsity."""
    assert row.works is not None
    batch, works = read_works(row.works, row.number)
    if row.is_demo:
        works = tuple(_without_moves(works))
    if row.is_int8_throughout:
        works = tuple(_halved(work) if work.kind in ("pointwise", "attention") else work for work in works)
    if row.pruned:
        works = pruned(works)
    factor = (row.batch or 1) if row.rows is None else row.rows / _MLP_ROWS
    return tuple(work.scaled(factor / batch) for work in works)


def _without_moves(works: tuple[Work, ...]) -> Iterator[Work]:
    """The kernels without those that bring Q, K and V, or what attention writes, into another order.

    The plugin reads what the product before it writes, and writes what the one behind it reads.
    """
    attentions = [work for work in works if work.kind == "attention"]
    for work in works:
        moves = work.kind == "pointwise" and any(
            work.count == each.count and work.read in (3 * each.m * each.k * each.groups * 2, each.written)
            for each in attentions
        )
        if not moves:
            yield work


def _halved(work: Work) -> Work:
    number = "int8" if work.kind == "attention" else work.number
    return replace(work, number=number, read=work.read / 2, written=work.written / 2)
