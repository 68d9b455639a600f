"""The graph surgery on its own: an ONNX file or a checkpoint goes in, the graph for one device comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from calibration.costly_layers import Found
from calibration.methods import Method
from calibration.samples import SampleSource
from deploy.best_placement import BEST, BestPlacement, check_asked
from deploy.bundle import staged_files
from deploy.cache import Cache
from deploy.job import Job, Precision, as_source
from deploy.lint import check_rules
from deploy.manifest import MODEL_FILE, SampleSet
from deploy.placement_choice import Choice
from deploy.progress import Progress
from deploy.ranging import partial_of
from exporters.checkpoint import LoadOptions
from exporters.improvement import Improvement
from exporters.passes.keep_costly_float import search_of
from exporters.passes.outcome import Outcome
from exporters.passes.type_floats import IoTypes
from exporters.placement import Placement
from exporters.save_onnx import save_onnx
from exporters.surgery import surgery
from profiles.device import Device, load_device
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1
_SHOWN = 3  # places of one pass on the terminal; --json tells them all


class Surgery(Record):
    """What `operate` did; the same is printed by `gpusq surgery --json`."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    files: tuple[Path, ...] = Field(description="The ONNX file, and its external data where it has any.")
    profile: str
    placement: Placement
    precision: str
    opset: int
    nodes_before: int
    nodes: int
    samples: SampleSet | None = Field(default=None, description="None where the user gave none.")
    passes: tuple[Outcome, ...]
    ranges_by: str | None = Field(default=None, description="How ranges of activations were found; None without any.")
    mixed_precision: Found | None = Field(default=None, description="What stays float to keep the accuracy, and why.")
    placements: Choice | None = Field(default=None, description="What was tried, where the best was asked for.")

    def to_text(self) -> str:
        """The surgery for the terminal."""
        return "\n".join(
            [
                f"{self.files[0]}: {self.nodes} nodes of {self.nodes_before}, opset {self.opset}, {self.precision}",
                *([] if self.placements is None else [self.placements.to_text()]),
                *([] if self.mixed_precision is None else [self.mixed_precision.to_text()]),
                *(line for step in self.passes for line in _lines(step)),
            ]
        )


def operate(
    model: str | Path,
    out: str | Path,
    *,
    profile: str,
    options: LoadOptions | None = None,
    precision: Precision = "auto",
    placement: Placement | Literal["best"] | None = None,
    data: str | Path | SampleSource | None = None,
    repair_sparsity: bool = False,
    share_concat_scales: bool = False,
    io_types: IoTypes = "keep",
    method: Method | None = None,
    scales: str | Path | None = None,
    improve: Sequence[Improvement] = (),
    target_drop: float | None = None,
    for_batch: int = 1,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Surgery:
    """Write the graph of `model` that the compiler of `profile` fuses best to `out`.

    Args:
        model: an ONNX file, or a checkpoint of any kind.
        out: the ONNX file; one that is there is replaced when the new one is whole.
        profile: name, alias or path of a device profile.
        options: what the checkpoint does not say about itself.
        precision: as of `convert`.
        placement: as of `convert`.
        data: samples to measure activations on, as of `convert`.
        repair_sparsity: as of `convert`.
        share_concat_scales: as of `convert`.
        io_types: `keep` leaves inputs and outputs float32, behind casts; `graph` gives them the graph's type.
        method: as of `convert`.
        scales: as of `convert`.
        improve: as of `convert`.
        target_drop: as of `convert`.
        for_batch: as of `convert`.
        cache: remembers what searches have found out, and trials of placements.
        progress: is told what each stage found.

    Raises:
        GpusqError: something that was given cannot be used. Nothing is left behind then.
    """
    out, progress = Path(out), progress or Progress()
    if out.is_dir():
        raise GpusqError(f"{out} is a folder", hint="give the file to write, such as -o model.onnx")
    device = load_device(profile)
    best = BestPlacement(write_graph, for_batch, target_drop, tuple(improve)) if placement == BEST else None
    if best is not None:
        check_asked([device], precision, samples=data is not None, scales=scales is not None)
    job = Job(
        checkpoint=Path(model),
        options=options or LoadOptions(),
        precision=precision,
        asked_placement=None if placement == BEST else placement,
        data=as_source(data),
        baseline=None,
        out=out.parent,
        progress=progress,
        repair_sparsity=repair_sparsity,
        share_concat_scales=share_concat_scales,
        io_types=io_types,
        method=method,
        scales_file=None if scales is None else Path(scales),
        improve=() if best else tuple(improve),
        target_drop=None if best else target_drop,
        cache=cache or Cache(None),
        partial=partial_of(out),
    )
    job.load([device])
    if best is not None:
        job.note_sources()
    with job.ranging.resumable():
        job, choice = (job, None) if best is None else best(job, device)
        graph = job.exported.model
        nodes_before = len(graph.graph)
        passes = surgery(graph, job.target(device), job.measure, job.ranges, job.feed)
        check_rules(graph, device)
        with staged_files(out) as staged:
            files = save_onnx(graph, staged)
    return Surgery(
        files=tuple(out.parent / file.name for file in files),
        profile=device.name,
        placement=job.placement,
        precision=job.precision_name(device),
        opset=graph.opset_imports[""],
        nodes_before=nodes_before,
        nodes=len(graph.graph),
        samples=job.sample_set,
        passes=tuple(passes),
        ranges_by=job.ranges_by,
        mixed_precision=search_of(passes),
        placements=choice,
    )


def write_graph(job: Job, device: Device, folder: Path) -> None:
    """Write the graph of a job for a device into `folder`, as `model.onnx`."""
    graph = job.exported.model.clone()
    surgery(graph, job.target(device), job.measure, job.ranges, job.feed)
    save_onnx(graph, folder / MODEL_FILE)


def _lines(step: Outcome) -> Iterator[str]:
    if not step.changed and not step.left_alone:
        return
    yield f"{step.name}: {step.changed}"
    yield from _some([f"  {change.where}: {change.what}" for change in step.changes])
    yield from _some([f"  left alone, {left.where}: {left.why}" for left in step.left_alone])


def _some(lines: list[str]) -> Iterator[str]:
    yield from lines[:_SHOWN]
    if lines[_SHOWN:]:
        yield f"  and {len(lines) - _SHOWN} more"
