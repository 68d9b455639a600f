"""Mark the layers that cost the accuracy, so that a placement leaves them float.

    MatMul   →   MatMul {gpusq.precision: "float: quantized alone, …"}          no quantizer is placed there

The quantizers are placed on a copy, with all that makes them lose less, and `calibration.costly_layers` looks for the
fewest layers that have to stay float so that no more than the target is lost on the samples. What a point is, is in
`calibration.output_loss`; what a layer costs is its share of the products. The mark stays in the graph: another surgery
on the result leaves the same layers float.

Everything but the last word is judged in float32, with rounding to the quantizers' grids, on the first output.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.costly_layers import Costly, Found, Search
from calibration.output_loss import Loss, Tally
from calibration.probes import Feed
from calibration.search_memory import SearchMemory
from exporters.module_names import label_of
from exporters.passes.outcome import Change, Outcome, Pass
from exporters.placement import KEPT_FLOAT
from exporters.switched_graph import SwitchedGraph, switched_graph

_FEW = 16  # samples that the error of one layer is measured on
_READ_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Kept(Outcome):
    """What the pass did, and what the search found."""

    found: Found | None = None


@dataclass(frozen=True)
class KeepCostlyFloat:
    """Mark what `place` must leave float so that no more than `target_drop` points are lost.

    Attributes:
        target_drop: in points.
        place: the passes that place quantizers, and those that make them lose less; they run on copies here.
        feed: the samples to judge by.
        context: what the passes depend on besides the graph, for `feed.memory`.
    """

    target_drop: float
    place: Sequence[Pass]
    feed: Feed
    context: str = ""

    def __call__(self, model: ir.Model) -> Kept:
        """Search, and mark what was found."""
        trials = _Trials(model, self.place, self.feed, _remembered(model, self.feed, self.context))
        search = Search(trials.units, trials.alone, trials.rest, block_of_module, self.feed.tell)
        found = search(self.target_drop)
        changes = [Change(one.name, _evidence(one)) for one in found.left]
        by_name = {change.where: change.what for change in changes}
        for node in model.graph:
            if label_of(node) in by_name:
                node.metadata_props[KEPT_FLOAT] = f"float: {by_name[label_of(node)]}"
        return Kept("keep costly layers float", len(changes), (), tuple(changes), found)


def search_of(passes: Iterable[Outcome]) -> Found | None:
    """What the search found in a surgery; None where none was asked for."""
    return next((step.found for step in passes if isinstance(step, Kept)), None)


def block_of_module(name: str) -> str:
    """The block of a module: `blocks.0` of `blocks.0.mlp.fc1`; the name itself where it has no number."""
    found = re.match(r".*?[./]?\d+(?=[./]|$)", name)
    return found.group() if found else name


def _evidence(one: Costly) -> str:
    error = 10 * np.log10(1 / one.error) if one.error > 0 else np.inf
    return f"quantized alone, the output is at {error:.1f} dB; {100 * one.cost:.1f} % of the products"


@dataclass
class _Trials:
    """Answers what is lost, from memory where it is known; the graph is loaded when the first is not."""

    model: ir.Model
    place: Sequence[Pass]
    feed: Feed
    memory: SearchMemory
    _reference: list[npt.NDArray[Any]] = field(default_factory=list)

    @property
    def units(self) -> Mapping[str, float]:
        """What each unit costs."""
        if not self.memory.units:
            self.memory.keep_units(self._graph.units)
        return self.memory.units

    def alone(self, on: Collection[str]) -> Loss:
        """The loss with the units `on` quantized and nothing else, on the first samples."""
        return self._loss([name for name in self.units if name not in on], min(_FEW, self._count))

    def rest(self, left: Collection[str]) -> Loss:
        """The loss with everything but `left` quantized, on all samples."""
        return self._loss(left, self._count)

    @property
    def _count(self) -> int:
        return min((len(rows) for rows in self.feed.samples.values()), default=1)

    @cached_property
    def _graph(self) -> SwitchedGraph:
        placed = self.model.clone()
        for step in self.place:
            step(placed)
        return switched_graph(self.model, placed, self.feed)

    def _loss(self, left: Collection[str], count: int) -> Loss:
        known = self.memory.loss(left, count)
        if known is None:
            known = self._measured(left, count)
            self.memory.keep(left, count, known)
        return known

    def _measured(self, left: Collection[str], count: int) -> Loss:
        tally, start = Tally(), 0
        if not self._reference:
            self._reference = list(self._graph.answers(()))
        on = [name for name in self.units if name not in left]
        for expected, found in zip(self._reference, self._graph.answers(on, count), strict=False):
            rows = min(len(found), count - start)
            labels = None if self.feed.labels is None else self.feed.labels[start : start + rows]
            tally.add(expected[:rows], found[:rows], labels)
            start += rows
        return tally.loss


def _remembered(model: ir.Model, feed: Feed, context: str) -> SearchMemory:
    """What was found before for the same graph, the same samples and the same passes."""
    if feed.memory is None:
        return SearchMemory(None)
    import onnxruntime

    digest = hashlib.sha256(repr((context, feed.memory.context, feed.batch, onnxruntime.__version__)).encode())
    with tempfile.TemporaryDirectory() as folder:
        ir.save(model.clone(), Path(folder) / "model.onnx", external_data="weights")
        for path in sorted(Path(folder).iterdir()):
            with path.open("rb") as file:
                while part := file.read(_READ_AT_ONCE):
                    digest.update(part)
    return SearchMemory(feed.memory.folder / f"{digest.hexdigest()}.jsonl")
