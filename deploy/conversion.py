"""The whole way: a checkpoint goes in, one verified and measured bundle for each device profile comes out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Literal, TypeVar

import onnx
from pydantic import Field

from calibration.methods import Method
from calibration.samples import SampleSource, random_inputs
from deploy import bench, environment, sbom, verify
from deploy import build as building
from deploy.best_placement import BEST, BestPlacement, check_asked
from deploy.build_options import BuildOptions
from deploy.bundle import PARTIAL, staged
from deploy.cache import Answer, Cache
from deploy.cache_key import Key
from deploy.cached_build import CachedBuild
from deploy.costly import TARGET_DROP, advice, costly_layers
from deploy.export import failed_ways
from deploy.finish import seal
from deploy.gates import agreement_missed, missed_gates, sentences_text
from deploy.job import Job, Precision, as_source
from deploy.layers import layers_of, sizes_of, summary
from deploy.lint import check_rules
from deploy.manifest import MODEL_FILE, Manifest, Measurement, Verification
from deploy.placement_choice import Choice
from deploy.progress import Progress
from deploy.report.verdicts import cards
from deploy.requirements import Requirement
from deploy.stages import Prepared, own_code, surgery_key, verify_key
from deploy.timing.engine import model_at
from exporters.checkpoint import LoadOptions
from exporters.improvement import Improvement
from exporters.passes.keep_costly_float import search_of
from exporters.passes.type_floats import IoTypes
from exporters.placement import Placement
from exporters.save_onnx import save_onnx
from exporters.student import Student, sample_specs
from exporters.surgery import Target, surgery
from profiles.device import Device, load_device
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1
SAMPLES_FILE = "samples.sha256"
Made = TypeVar("Made")


class BundleResult(Record):
    """A bundle that was written."""

    path: Path
    manifest: Manifest


class Conversion(Record):
    """What `convert` did; the same is printed by `gpusq convert --json`."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    bundles: tuple[BundleResult, ...]
    stages: tuple[Answer, ...] = Field(default=(), description="What was made, what was taken from the cache, and why.")

    def to_text(self) -> str:
        """The bundles for the terminal: the verdicts of each, and the gates that it missed."""
        return "\n".join(line for bundle in self.bundles for line in _lines(bundle))


def _lines(bundle: BundleResult) -> Iterator[str]:
    yield f"{bundle.path}"
    for card in cards(bundle.manifest):
        yield f"  {card.title}: {card.headline} ({card.origin})"
    if bundle.manifest.placements is not None:
        yield f"  Placement: {bundle.manifest.placements.headline}"
    yield from indent(sentences_text(bundle.manifest.gates_missed, bundle.manifest.plan), "  ").splitlines()
    yield f"  report: {bundle.path / 'report.html'}"


def convert(
    checkpoint: str | Path,
    *,
    profiles: Sequence[str],
    out: str | Path,
    options: LoadOptions | None = None,
    precision: Precision = "auto",
    placement: Placement | Literal["best"] | None = None,
    data: str | Path | SampleSource | None = None,
    baseline: str | Path | None = None,
    repair_sparsity: bool = False,
    share_concat_scales: bool = False,
    io_types: IoTypes = "keep",
    method: Method | None = None,
    scales: str | Path | None = None,
    improve: Sequence[Improvement] = (),
    target_drop: float | None = None,
    for_batch: int = 1,
    cache: Cache | None = None,
    build: BuildOptions | None = None,
    required: Sequence[Requirement] = (),
    parts_list: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a trained student for each of `profiles` and write the bundles `out/PROFILE`.

    Args:
        checkpoint: the student, a file or a folder of any kind that `exporters.checkpoint` knows.
        profiles: names, aliases or paths of device profiles.
        out: the folder for the bundles; new, empty, or holding bundles, which are replaced.
        options: what the checkpoint does not say about itself.
        precision: `auto` keeps what was trained; `int8` asks for it, or quantizes a float student by what its
            activations are on `data`; `fp16`, `bf16` and `fp32` drop the trained quantization.
        placement: which quantizers layers get that have none; by default those of `w8a8-linear` where `precision`
            asks for int8 and nothing was trained so, else none. `best` takes the one that is predicted fastest on
            each profile and loses no more than `target_drop` on `data`.
        data: samples to verify and to measure with, a path or `module:function`, or with what is to be said about
            them; random inputs without it.
        baseline: a dense checkpoint to measure against, in FP32.
        repair_sparsity: prune the layers that are 2:4 but for a few groups, and report the error that this makes.
        share_concat_scales: give the inputs of a concatenation the largest of their trained scales, and report it.
        io_types: `keep` leaves inputs and outputs float32, behind casts; `graph` gives them the graph's type.
        method: how the range of an activation is found on the samples; by default what loses least.
        scales: the file of `gpusq calibrate`, instead of measuring.
        improve: what is done so that less is lost by the quantizers that are placed; most need `data`.
        target_drop: points of accuracy that may be lost on `data`; the layers that cost more stay float. None: all that
            the placement quantizes is. With `best`, which placements are refused; None is half a point then.
        for_batch: the batch that `best` is chosen for.
        cache: takes what was made before of the same parts, and keeps what is made; nothing is kept without one.
        build: what is asked of the builders of engines.
        required: what the engines must come to, beside what is required by default.
        parts_list: write `sbom.cdx.json` into each bundle, CycloneDX.
        progress: is told what each stage found.

    Raises:
        GpusqError: something that was given cannot be used. Nothing is left behind then.
    """
    devices = _devices(profiles)
    if parts_list:
        sbom.require_library()
    best = BestPlacement(_written, for_batch, target_drop, tuple(improve)) if placement == BEST else None
    if best is not None:
        check_asked(list(devices.values()), precision, samples=data is not None, scales=scales is not None)
    job = Job(
        checkpoint=Path(checkpoint),
        options=options or LoadOptions(),
        precision=precision,
        asked_placement=None if placement == BEST else placement,
        data=as_source(data),
        baseline=None if baseline is None else Path(baseline),
        out=Path(out),
        progress=progress or Progress(),
        repair_sparsity=repair_sparsity,
        share_concat_scales=share_concat_scales,
        io_types=io_types,
        method=method,
        scales_file=None if scales is None else Path(scales),
        improve=() if best else tuple(improve),
        target_drop=None if best else target_drop,
        build=build or BuildOptions(),
        required=tuple(required),
        cache=cache or Cache(None),
        partial=Path(out) / PARTIAL,
        parts_list=parts_list,
    )
    job.load(devices.values())
    job.note_sources()
    with staged(job.out, list(devices)) as staging, job.ranging.resumable():
        manifests = []
        for name, device in devices.items():
            placed, choice = (job, None) if best is None else best(job, device)
            manifests.append(_convert_for(device, staging / name, placed, choice))
    bundles = tuple(
        BundleResult(path=job.out / name, manifest=manifest) for name, manifest in zip(devices, manifests, strict=True)
    )
    return Conversion(bundles=bundles, stages=tuple(job.cache.answers))


def _convert_for(device: Device, bundle: Path, job: Job, choice: Choice | None) -> Manifest:
    bundle.mkdir()
    said = f"{bundle.name}:"
    progress = job.progress
    prepared = _cached(job, surgery_key(job, device), bundle, lambda: _prepare(device, bundle, job), Prepared)
    job.ranging.chosen = prepared.chosen
    progress.found("surgery", f"{said} {', '.join(f'{step.name} {step.changed}' for step in prepared.passes)}")
    progress.found("sparsity", f"{said} {summary(prepared.layers)}")
    how = CachedBuild(bundle.name, device, job.build, job.cache, progress)
    built = how.everything(bundle, name=str(job.out / bundle.name))
    progress.found("build", f"{said} {building.summary(built)}")
    if built.plan:
        progress.found("plan", f"{said} {building.plan_summary(built.plan)}")
    verified = _cached(job, verify_key(job, bundle / MODEL_FILE), bundle, lambda: _verify(bundle, job), Verification)
    progress.found("verify", f"{said} {verify.summary(verified)}")
    measured = _measure(device, bundle, job)
    if measured:
        progress.found("bench", f"{said} {bench.summary(measured)}")

    missed = missed_gates(
        built.plan,
        verified,
        given_samples=job.data is not None,
        float_type=job.float_type(device),
        placement=job.placement,
        engines=built.engines,
        required=job.required,
    )
    if agreement_missed(verified, given_samples=job.data is not None):
        missed = (*missed, *_costing(job, device))
    for gate in missed:
        progress.found("gate missed", f"{said} {gate}")

    manifest = Manifest(
        gpusq=environment.versions().get("gpusq", "unknown"),
        created=_now(),
        profile=device.name,
        device=device.title,
        device_profile=device,
        student=job.source.model_copy(update={"way": prepared.way, "failed": prepared.failed}),
        baseline=job.teacher_source if measured else None,
        samples=job.sample_set,
        precision_asked=job.precision,
        precision=job.precision_name(device),
        float_type=job.float_type(device),
        opset=prepared.opset,
        host=environment.host(),
        versions=environment.versions(),
        layers=prepared.layers,
        sizes=prepared.sizes,
        passes=prepared.passes,
        ranges_by=prepared.ranges_by,
        mixed_precision=prepared.mixed_precision,
        placements=choice,
        engines=built.engines,
        missing=built.missing,
        plan=built.plan,
        verified=verified,
        measured=measured,
        required=job.required_on_device,
        gates_missed=missed,
        files={},
    )
    if job.data is not None:
        (bundle / SAMPLES_FILE).write_text(job.samples.listing, encoding="utf-8")
    with progress.working("writing the report"):
        manifest = seal(manifest, bundle, parts_list=job.parts_list)
    progress.found("report", str(job.out / bundle.name / "report.html"))
    return manifest


def _cached(job: Job, key: Key, bundle: Path, make: Callable[[], Made], kind: type[Made]) -> Made:
    """What `make` makes in `bundle`, or made before; what the user's own code decides is always made."""
    if own_code(job):
        job.cache.note(key, bundle.name, "the architecture is your own code, whose changes no key would show")
        return make()
    return job.cache.fetch(key, bundle, make, kind, bundle=bundle.name)


def _written(job: Job, device: Device, folder: Path) -> None:
    """Write `model.onnx` into `folder`, or take the one that was made before."""
    _cached(job, surgery_key(job, device), folder, lambda: _prepare(device, folder, job), Prepared)


def _prepare(device: Device, bundle: Path, job: Job) -> Prepared:
    """Write `model.onnx`."""
    model = job.exported.model.clone()
    passes = surgery(model, job.target(device), job.measure, job.ranges, job.feed)
    check_rules(model, device)
    save_onnx(model, bundle / MODEL_FILE)
    onnx.checker.check_model(bundle / MODEL_FILE, full_check=True)
    return Prepared(
        passes=tuple(passes),
        layers=layers_of(model, device),
        sizes=sizes_of(model),
        opset=model.opset_imports[""],
        ranges_by=job.ranges_by,
        way=job.exported.way,
        failed=failed_ways(job.exported),
        mixed_precision=search_of(passes),
        chosen=job.ranging.chosen,
    )


def _verify(bundle: Path, job: Job) -> Verification:
    with job.progress.working("verifying") as advance:
        return verify.verify(bundle / MODEL_FILE, job.reference, job.samples, batch=job.batch, progress=advance)


def _costing(job: Job, device: Device) -> Iterator[str]:
    """What cost the agreement, where that can be mended."""
    found = costly_layers(job, device, TARGET_DROP)
    if found is not None and found.left:
        yield advice(found)


def _measure(device: Device, bundle: Path, job: Job) -> Measurement | None:
    """Time the engine where this host is the device: on its CPU."""
    if device.runtime != "onnxruntime":
        return None
    batch = job.fixed_batch or 1
    feed = random_inputs(sample_specs(job.student), batch)
    models = [model_at(bundle / "engine.onnx", job.checkpoint.name, job.precision_name(device), feed)]
    if job.teacher is not None and job.baseline is not None:
        file = _baseline(device, bundle, job.teacher)
        models.append(model_at(file, job.baseline.name, "fp32", feed))
    say = partial(job.progress.found, "bench")
    return bench.bench(*models, batch=batch, raw=bundle / bench.RAW_FILE, progress=job.progress, say=say)


def _baseline(device: Device, bundle: Path, teacher: Student) -> Path:
    """The dense checkpoint in FP32, beside the bundles: it is measured, not delivered."""
    model = teacher.export(scales=False).model
    surgery(model, Target(device, "float32"))
    file = bundle.parent / "baseline.onnx"
    save_onnx(model, file)
    return file


def _devices(profiles: Sequence[str]) -> dict[str, Device]:
    """The profiles by the name of their bundle."""
    devices: dict[str, Device] = {}
    for profile in profiles:
        name = Path(profile).stem if profile.endswith(".toml") else profile
        if name in devices:
            raise GpusqError(f"two profiles would write the bundle '{name}'", hint="convert them into two folders")
        devices[name] = load_device(profile)
    if not devices:
        raise GpusqError("no device profile was given", hint="give --profile, such as --profile a100")
    return devices


def _now() -> str:
    """The time of the conversion, or SOURCE_DATE_EPOCH for builds that must repeat (reproducible-builds.org)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.now(timezone.utc) if epoch is None else datetime.fromtimestamp(int(epoch), timezone.utc)
    return moment.isoformat(timespec="seconds")
