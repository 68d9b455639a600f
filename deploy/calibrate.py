"""Calibrate: a model and samples go in, the scales of what has none come out, in a file that `--scales` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from pydantic import Field, field_serializer

from calibration.compare_ranges import RangeComparison, compare_ranges
from calibration.histogram import Histogram
from calibration.methods import Method
from calibration.samples import SampleSource
from deploy.bundle import hash_checkpoint, staged_files
from deploy.cache import Cache
from deploy.job import Job, as_source
from deploy.progress import Progress
from deploy.ranging import partial_of
from deploy.scales_file import Scales, TensorScale
from exporters.checkpoint import LoadOptions
from exporters.placement import Placement
from exporters.surgery import surgery
from profiles.device import Device, load_device
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1
PLACEMENT: Placement = "w8a8-linear"
_LEVELS = 127


class Calibrated(Record):
    """What `calibrate` did; the same is printed by `gpusq calibrate --json`."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    file: Path
    scales: Scales
    against: RangeComparison | None = Field(description="How far the ranges are from those of other samples.")

    @field_serializer("against")
    def _plain(self, against: RangeComparison | None) -> dict[str, Any] | None:
        return None if against is None else against.to_json()

    def to_text(self) -> str:
        """The calibration for the terminal."""
        made, samples = self.scales, self.scales.samples
        clipped = sum(tensor.amax < tensor.largest for tensor in made.tensors)
        lines = [
            f"{self.file}: {len(made.tensors)} scales by {made.method}, {clipped} of them clip",
            f"measured on {samples.count} of {samples.available} samples of {samples.source}",
            *samples.notes,
        ]
        return "\n".join(lines if self.against is None else [*lines, self.against.to_text()])


def calibrate(
    model: str | Path,
    out: str | Path,
    data: str | Path | SampleSource,
    *,
    profile: str = "a100",
    placement: Placement = PLACEMENT,
    method: Method | None = None,
    options: LoadOptions | None = None,
    against: str | Path | SampleSource | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Measure the ranges of the activations that `placement` quantizes and that have no trained scale.

    A run that was interrupted goes on where it ended, with the same result: what it counted lies beside `out`, in a
    file whose name ends in `.partial`, until it is complete.

    Args:
        model: a checkpoint of any kind, or an ONNX file.
        out: the file of the scales; one that is there is replaced when the new one is whole.
        data: the samples.
        profile: the device whose graph it is.
        placement: what is to be quantized.
        method: how a range is found.
        options: what the checkpoint does not say about itself.
        against: other samples, whose ranges are compared with those of `data`.
        cache: remembers what searches have found out.
        progress: is told what each stage found.

    Raises:
        GpusqError: something that was given cannot be used, or nothing is left to calibrate.
    """
    out, progress, method = Path(out), progress or Progress(), method or Method()
    if out.is_dir():
        raise GpusqError(f"{out} is a folder", hint="give the file to write, such as -o scales.json")
    device = load_device(profile)

    def load(source: str | Path | SampleSource | None) -> Job:
        job = Job(
            checkpoint=Path(model),
            options=options or LoadOptions(),
            precision="int8",
            asked_placement=placement,
            data=as_source(source),
            baseline=None,
            out=out.parent,
            progress=progress,
            method=method,
            partial=None if source is against else partial_of(out),
        )
        job.load([device])
        return job

    job = load(data)
    other = None if against is None else load(against)
    with job.ranging.resumable():
        found, others = _histograms(job, other, device)
        if not found:
            raise GpusqError(
                f"{model} has no activation without a scale that {placement} quantizes", hint="it needs no calibration"
            )
        scales = _scales(job, device, found)
        compared = None if other is None else _compared(scales, other, others, job)
        with staged_files(out) as staged:
            staged.write_text(scales.to_json(), encoding="utf-8")
    return Calibrated(file=out, scales=scales, against=compared)


def _histograms(job: Job, other: Job | None, device: Device) -> tuple[dict[str, Histogram], dict[str, Histogram]]:
    """What the surgery for `device` would measure, in the graph's order; and the same on the samples of `other`."""
    found: dict[str, Histogram] = {}
    others: dict[str, Histogram] = {}

    def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        found.update(job.ranging.histograms(model, names))
        if other is not None:
            others.update(other.ranging.histograms(model, names))
        return job.ranging.amax_of(model, found)

    surgery(job.exported.model, job.target(device), measure)
    return found, others


def _scales(job: Job, device: Device, found: Mapping[str, Histogram]) -> Scales:
    assert job.sample_set is not None
    return Scales(
        model=job.student.model,
        sha256=hash_checkpoint(job.checkpoint),
        profile=device.name,
        placement=job.placement,
        method=job.ranging.method_name,
        samples=job.sample_set,
        tensors=tuple(
            _tensor(name, histogram, job.ranging.method_of(name)(histogram)) for name, histogram in found.items()
        ),
    )


def _tensor(name: str, histogram: Histogram, amax: float) -> TensorScale:
    return TensorScale(tensor=name, amax=amax, scale=amax / _LEVELS, largest=histogram.amax, rms=histogram.rms)


def _compared(scales: Scales, other: Job, others: Mapping[str, Histogram], job: Job) -> RangeComparison:
    own = {tensor.tensor: tensor.amax for tensor in scales.tensors}
    ranges = {name: job.ranging.method_of(name)(histogram) for name, histogram in others.items()}
    return compare_ranges(own, ranges, of=scales.samples.source, to=other.samples.source)
