"""Choose among the improvements by what the model loses: `--improve auto`.

    float graph ─► quantized as it is ────────────────────────► error of the first output      0.051
                   channels scaled, quantized ────────────────► the same                       0.060   not kept
                   quantized, rounded with error feedback ────► the same                       0.049   kept
                   and with corrected biases ─────────────────► the same                       0.041   kept

One after the other, in the order in which they act, each on top of those that were kept. What an improvement is fitted
to is three of four samples, and what it is judged on is the fourth, so that none looks good by fitting alone; it is
kept where it lowers the error by 2 % at least. Ranges are those of the one method for all tensors that loses least
(exporters/range_choice.py). The graph is not changed here: the passes behind ask what was kept, and fit it to all
samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.collect import CollectOptions, collect
from calibration.inference import over_batches
from calibration.output_loss import Tally, without_padding
from calibration.probes import Feed
from calibration.rows import chosen as rows_chosen
from exporters.improvement import AUTO_FEWEST, Improvement
from exporters.passes.correct_biases import CorrectBiases
from exporters.passes.error_feedback import ErrorFeedback
from exporters.passes.lower_fake_quantize import LowerFakeQuantize
from exporters.passes.outcome import Change, LeftAlone, Outcome, Pass
from exporters.passes.place_quantizers import PlaceQuantizers
from exporters.passes.scale_channels import ScaleChannels
from exporters.range_choice import choose_methods
from profiles.device import FloatType

Array = npt.NDArray[np.float32]
_SCALING: dict[Improvement, Callable[[Feed, str], Pass]] = {
    "smooth-quant": lambda feed, placement: ScaleChannels("gemm", feed, placement),
    "equalize": lambda feed, placement: ScaleChannels("conv", feed, placement),
}
_FITTING: dict[Improvement, Callable[[Feed, FloatType], Pass]] = {
    "error-feedback": ErrorFeedback,
    "bias-correction": lambda feed, _: CorrectBiases(feed),
}
_JUDGED = 4  # one of so many samples
_MOST = 32  # of those that are judged
_WORTH = 0.98


@dataclass
class ChooseImprovements:
    """Find out which of `candidates` pay.

    Attributes:
        placement: the quantizers that will be placed.
        float_type: the type of what is not quantized.
        feed: the samples.
        candidates: what is tried.
        kept: what pays, once it was called.
    """

    placement: str
    float_type: FloatType
    feed: Feed
    candidates: Collection[Improvement]
    kept: list[Improvement] = field(default_factory=list)

    def __call__(self, model: ir.Model) -> Outcome:
        """Try them on copies of `model`, which stays as it is."""
        self.kept.clear()
        name = "choose improvements"
        count = min((len(rows) for rows in self.feed.samples.values()), default=0)
        if count < AUTO_FEWEST:
            why = f"{count} samples: fewer than {AUTO_FEWEST} tell nothing about others"
            return Outcome(name, 0, tuple(LeftAlone(one, why) for one in self.candidates))
        trial = _Trial(self, model, _every(self.feed, count, judged=False), _every(self.feed, count, judged=True))
        told = [*trial.scaled(), *trial.weights(), *trial.fitted()]
        self.feed.tell(f"improvements: {', '.join(self.kept) or 'none pays'}; {trial.to_text()}")
        changes = tuple(Change(one, what) for one, what in told if one in self.kept)
        left = tuple(LeftAlone(one, what) for one, what in told if one not in self.kept)
        return Outcome(name, len(changes), left, changes)

    def placing(self, place: PlaceQuantizers) -> Pass:
        """`place`, with the scales of the weights that were kept."""
        return lambda model: (replace(place, weight_method="mse") if "mse-weights" in self.kept else place)(model)


@dataclass(frozen=True)
class OnlyIf:
    """Do `step` if `improvement` was kept by `choice`."""

    improvement: Improvement
    choice: ChooseImprovements
    step: Pass

    def __call__(self, model: ir.Model) -> Outcome:
        """Do it, or nothing."""
        if self.improvement in self.choice.kept:
            return self.step(model)
        return Outcome(f"{self.improvement}, which does not pay", 0)


class _Trial:
    """The best graph so far: float with scaled channels, and quantized."""

    def __init__(self, asked: ChooseImprovements, model: ir.Model, fit: Feed, judged: Feed) -> None:
        self.asked, self.fit, self.judged = asked, fit, judged
        self.reference = list(_answers(model, judged))
        self.base = model.clone()
        self.placed = self._place(self.base)
        self.first = self.error = self._error(self.placed)

    def to_text(self) -> str:
        return f"error {self.error:.3g} of the output's power on samples kept apart, {self.first:.3g} without"

    def scaled(self) -> Iterator[tuple[Improvement, str]]:
        """Try to scale channels, and say what came of it."""
        for name, make in _SCALING.items():
            if name in self.asked.candidates:
                base = self.base.clone()
                changed = make(self.fit, self.asked.placement)(base).changed
                said, kept = self._judge(name, self._place(base)) if changed else ("it finds nothing to scale", False)
                self.base = base if kept else self.base
                yield name, said

    def weights(self) -> Iterator[tuple[Improvement, str]]:
        """Try other scales of the weights."""
        if "mse-weights" in self.asked.candidates:
            yield "mse-weights", self._judge("mse-weights", self._place(self.base, mse=True))[0]

    def fitted(self) -> Iterator[tuple[Improvement, str]]:
        """Try what is fitted to samples once quantizers are placed."""
        for name, make in _FITTING.items():
            if name in self.asked.candidates:
                placed = self.placed.clone()
                changed = make(self.fit, self.asked.float_type)(placed).changed
                yield name, self._judge(name, placed)[0] if changed else "it finds nothing to do"

    def _judge(self, name: Improvement, placed: ir.Model) -> tuple[str, bool]:
        error, before = self._error(placed), self.error
        kept = error < _WORTH * before
        if kept:
            self.placed, self.error = placed, error
            self.asked.kept.append(name)
        return f"error {error:.3g} of the output's power, {before:.3g} without", kept

    def _place(self, base: ir.Model, *, mse: bool = False) -> ir.Model:
        placed = base.clone()
        asked = self.asked
        PlaceQuantizers(asked.placement, self._ranges, asked.float_type, "mse" if mse else "max")(placed)
        return placed

    def _ranges(self, model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        found = collect(model, names, self.fit.samples, CollectOptions(self.fit.batch))
        largest = {name: histogram.amax for name, histogram in found.items()}
        place = PlaceQuantizers(self.asked.placement, lambda model, names: largest, "float32")
        quiet = replace(self.judged, tell=lambda text: None)
        methods = choose_methods(model, found, place, quiet, for_each=False)
        return {name: methods[name](histogram) for name, histogram in found.items()}

    def _error(self, placed: ir.Model) -> float:
        lowered = placed.clone()
        LowerFakeQuantize()(lowered)
        tally = Tally()
        for expected, found in zip(self.reference, _answers(lowered, self.judged), strict=True):
            tally.add(expected, found)
        return tally.loss.error


def _answers(model: ir.Model, feed: Feed) -> Iterator[Array]:
    """The first output on each batch."""
    for inputs, arrays in over_batches(model, lambda graph: list(graph.outputs)[:1], feed.samples, feed.batch):
        yield without_padding(arrays[0], inputs)


def _every(feed: Feed, count: int, *, judged: bool) -> Feed:
    """One of `_JUDGED` samples, at most `_MOST`, or the others, at most three times as many."""
    apart = np.arange(_JUDGED - 1, count, _JUDGED)
    rows = apart[:_MOST] if judged else np.setdiff1d(np.arange(count), apart)[: _MOST * (_JUDGED - 1)]
    samples = {name: rows_chosen(array, rows) for name, array in feed.samples.items()}
    return replace(feed, samples=samples, labels=None, memory=None)
