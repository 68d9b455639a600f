"""Choose how the range of each tensor is found by what the model loses: `least-loss`.

1. One tensor is quantized at a time, with the weights of the layers that read it and nothing else, by each method of
   TRIED: the one with the least error of the model's first output is the tensor's.
2. Everything is quantized, with those ranges, and with those of one method for all tensors, each of CHOICES. What has
   the least error is taken; of equals the first, and max is the first: on these samples nothing loses more than by max.

What that costs is bounded, whatever the number of tensors: of step 1 by _TRIALS samples that are run in all, on up to
_FEW for each trial, and of step 2 by _MANY for each method. With more tensors than that allows one sample for, each
trial has one all the same.

All ranges come from the same histograms. Tried and left out, since it loses more: for each tensor the method with the
least error of what the layers compute that read it, Σ ‖(Q(x) − x)·W‖². On MiniLM the error of the output was 0.053 of
its power so, by max 0.051, by mse 0.037, and 0.021 by step 1: huge values that a normalization divides away decide
that sum, and the output knows better.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.histogram import Histogram
from calibration.methods import CHOICES, Method
from calibration.output_loss import Tally
from calibration.probes import Feed
from exporters.passes.outcome import Pass
from exporters.switched_graph import SwitchedGraph, switched_graph

TRIED = (Method(), Method("percentile"), Method("mse"))
_FEW, _MANY = 8, 64  # samples to judge a tensor by, at most, and the whole
_TRIALS = 512


def choose_methods(
    model: ir.Model, histograms: Mapping[str, Histogram], place: Pass, feed: Feed, *, for_each: bool = True
) -> dict[str, Method]:
    """Return the method for each tensor of `histograms`.

    Args:
        model: the float graph.
        histograms: of its activations, by name.
        place: places the quantizers, with any ranges.
        feed: the samples to judge by; at most 64 of them are used.
        for_each: whether each tensor may have its own; else all have the same.
    """
    placed = model.clone()
    place(placed)
    judge = _Judge(switched_graph(model, placed, feed), histograms)
    candidates = [dict.fromkeys(histograms, method) for method in CHOICES]
    if for_each:
        few = min(max(_TRIALS // (len(TRIED) * len(histograms)), 1), _FEW)
        candidates.append({name: judge.best_for(name, few) for name in histograms})
    errors = [judge.error(judge.graph.units, candidate, _MANY) for candidate in candidates]
    best = candidates[int(np.argmin(errors))]
    feed.tell(f"ranges {summary(best)}: error {min(errors):.3g} of the output's power, by max {errors[0]:.3g}")
    return best


def summary(chosen: Mapping[str, Method]) -> str:
    """`20 by max, 5 by mse`; `by max` where that is true of all."""
    names = [str(method) for method in chosen.values()]
    counts = {str(method): names.count(str(method)) for method in CHOICES if str(method) in names}
    if len(counts) == 1:
        return f"by {names[0]}"
    return ", ".join(f"{count} by {name}" for name, count in counts.items())


@dataclass
class _Judge:
    """Tells the error of the output; the float graph's answers are kept."""

    graph: SwitchedGraph
    histograms: Mapping[str, Histogram]
    _reference: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def error(self, on: Collection[str], methods: Mapping[str, Method], count: int) -> float:
        """The error on `count` samples with the units `on` quantized, as a share of the output's power."""
        if not self._reference:
            self._reference = list(self.graph.answers((), _MANY))
        tally, amax = Tally(), {name: method(self.histograms[name]) for name, method in methods.items()}
        for expected, found in zip(self._reference, self.graph.answers(on, count, amax), strict=False):
            tally.add(expected[: len(found)], found)
        return tally.loss.error

    def best_for(self, tensor: str, count: int) -> Method:
        """The method whose range of `tensor` costs the least where nothing else is quantized, on `count` samples."""
        units = self.graph.readers(tensor)
        errors = [self.error(units, {tensor: method}, count) for method in TRIED]
        return TRIED[int(np.argmin(errors))]
