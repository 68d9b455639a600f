"""The ranges of activations that have no trained scale: from a file of scales, or measured on the samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from calibration.collect import CollectOptions, collect
from calibration.histogram import Histogram
from calibration.method_names import LEAST_LOSS
from calibration.methods import Method
from calibration.probes import Feed
from calibration.ranges import measure_amax
from calibration.resume import Resume
from calibration.samples import Samples
from calibration.weight_scales import WeightMethod
from deploy.emulate_nvfp4 import emulate_nvfp4, holds_nvfp4
from deploy.progress import Progress
from deploy.scales_file import Scales
from exporters.passes.place_quantizers import PlaceQuantizers
from exporters.placement import Placement
from exporters.range_choice import choose_methods, summary
from profiles.errors import GpusqError


@dataclass
class Ranging:
    """How ranges are found; what was counted is kept while the work may be cut off, see `resumable`.

    Attributes:
        samples: makes what the model is run on, when that is needed.
        batch: samples a run.
        placement: what is to be quantized, for the choice of a method.
        progress: is told what goes on.
        method: how a range is found from a histogram.
        scales: what was calibrated before; it goes before measuring.
        feed: the samples for a choice by what the model loses.
        weights: the method of the weights' scales, for that choice.
        partial: the file that keeps what was counted when the work is cut off; None: nothing is kept.
        chosen: the method of each tensor, where `least-loss` chose it.
    """

    samples: Callable[[], Samples]
    batch: int
    placement: Placement
    progress: Progress
    method: Method = field(default_factory=Method)
    scales: Scales | None = None
    feed: Feed | None = None
    weights: WeightMethod = "max"
    partial: Path | None = None
    chosen: dict[str, Method] = field(default_factory=dict)
    _resumes: list[Resume] = field(init=False, default_factory=list)

    @property
    def method_name(self) -> str:
        """The method; with `least-loss`, what it chose."""
        return f"{self.method}: {summary(self.chosen)}" if self.chosen else str(self.method)

    @property
    def by(self) -> str:
        """How ranges are found, in words."""
        return self.method_name if self.scales is None else f"{self.scales.method}, from a file of scales"

    def measure(self, model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        """The largest magnitudes of tensors that a scale is made for."""
        if self.scales is not None:
            return self.scales.amax(names)
        return self.amax_of(model, self.histograms(model, names))

    def largest(self, model: ir.Model, names: Sequence[str]) -> dict[str, float]:
        """The largest magnitudes of tensors on the samples, infinite ones too."""
        with self.progress.working("measuring ranges"):
            if holds_nvfp4(model):
                model = model.clone()
                emulate_nvfp4(model)
            return measure_amax(model, names, self.samples().inputs, self.batch, check_finite=False)

    def histograms(self, model: ir.Model, names: Sequence[str]) -> dict[str, Histogram]:
        """What the samples make of tensors; what was counted before the work was cut off is not counted again."""
        options = CollectOptions(self.batch, resume=self._next_resume())
        with self.progress.working("measuring ranges") as advance:
            return collect(model, names, self.samples().inputs, options, progress=advance)

    def amax_of(self, model: ir.Model, histograms: Mapping[str, Histogram]) -> dict[str, float]:
        """The ranges by the method that was asked for; `least-loss` chooses one for each tensor first."""
        if self.method.name == LEAST_LOSS and not histograms.keys() <= self.chosen.keys():
            self._choose(model, histograms)
        return {name: self.method_of(name)(histogram) for name, histogram in histograms.items()}

    def method_of(self, tensor: str) -> Method:
        """How the range of a tensor is found."""
        return self.chosen.get(tensor, self.method)

    def _choose(self, model: ir.Model, histograms: Mapping[str, Histogram]) -> None:
        assert self.feed is not None
        largest = {name: histogram.amax for name, histogram in histograms.items()}
        place = PlaceQuantizers(self.placement, lambda model, names: largest, "float32", self.weights)
        with self.progress.working("choosing methods"):
            self.chosen |= choose_methods(model, histograms, place, self.feed)

    def _next_resume(self) -> Resume | None:
        """Where this measuring is kept: each has its own file, in the order in which they are asked for."""
        if self.partial is None:
            return None
        number = f"-{len(self._resumes) + 1}" if self._resumes else ""
        self._resumes.append(Resume(self.partial.with_name(f"{self.partial.name}{number}"), self.samples().sha256))
        return self._resumes[-1]

    @contextlib.contextmanager
    def resumable(self) -> Iterator[None]:
        """What the block counts is kept where it is cut off; not after its end, nor after an error of the user's."""
        try:
            yield
        except GpusqError:
            self._forget()
            raise
        self._forget()

    def _forget(self) -> None:
        for resume in self._resumes:
            resume.remove()


def partial_of(out: Path) -> Path:
    """Where what was counted for the file `out` is kept when the work is cut off."""
    return out.with_name(f"{out.name}.partial")
