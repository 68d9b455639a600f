"""The whole way: a checkpoint goes in, one verified and measured bundle for each device profile comes out."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir
from pydantic import Field

from calibration.samples import Samples, load_samples, random_samples
from deploy import bench, environment, verify
from deploy import build as building
from deploy.build import MODEL_FILE
from deploy.bundle import hash_checkpoint, staged
from deploy.export import failed_ways
from deploy.finish import seal
from deploy.gates import missed_gates
from deploy.layers import layers_of, sizes_of, summary
from deploy.manifest import Manifest, Measurement, Source
from deploy.progress import Progress, tell_all
from exporters.checkpoint import LoadOptions, load_student
from exporters.graph_student import GraphStudent
from exporters.lint import lint
from exporters.save_onnx import save_onnx
from exporters.student import ModuleStudent, Student, sample_specs
from exporters.surgery import Target, surgery
from exporters.to_onnx import Exported
from profiles.device import Device, FloatType, load_device
from profiles.errors import GpusqError
from profiles.record import Record

Precision = Literal["auto", "fp32", "fp16", "int8"]
RANDOM_SAMPLES = 64
SCHEMA = 1


class BundleResult(Record):
    """A bundle that was written."""

    path: Path
    manifest: Manifest


class Conversion(Record):
    """What `convert` did; the same is printed by `gpusq convert --json`."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    bundles: tuple[BundleResult, ...]


def convert(
    checkpoint: str | Path,
    *,
    profiles: Sequence[str],
    out: str | Path,
    options: LoadOptions | None = None,
    precision: Precision = "auto",
    data: str | Path | None = None,
    baseline: str | Path | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a trained student for each of `profiles` and write the bundles `out/PROFILE`.

    Args:
        checkpoint: the student, a file or a folder of any kind that `exporters.checkpoint` knows.
        profiles: names, aliases or paths of device profiles.
        out: the folder for the bundles; new, empty, or holding bundles, which are replaced.
        options: what the checkpoint does not say about itself.
        precision: `auto` keeps what was trained; `int8` asks for it; `fp16` and `fp32` drop the trained quantization.
        data: samples to verify with, an .npz or a folder of them; random inputs without it.
        baseline: a dense checkpoint to measure against, in FP32.
        progress: is told what each stage found.

    Raises:
        GpusqError: something that was given cannot be used. Nothing is left behind then.
    """
    devices = _devices(profiles)
    job = _Job(
        checkpoint=Path(checkpoint),
        options=options or LoadOptions(),
        precision=precision,
        data=None if data is None else Path(data),
        baseline=None if baseline is None else Path(baseline),
        out=Path(out),
        progress=progress or Progress(),
    )
    job.load(devices.values())
    with staged(job.out, list(devices)) as staging:
        manifests = [_convert_for(device, staging / name, job) for name, device in devices.items()]
    bundles = tuple(
        BundleResult(path=job.out / name, manifest=manifest) for name, manifest in zip(devices, manifests, strict=True)
    )
    return Conversion(bundles=bundles)


@dataclass
class _Job:
    """What all bundles of one conversion share; each part is made when it is first asked for."""

    checkpoint: Path
    options: LoadOptions
    precision: Precision
    data: Path | None
    baseline: Path | None
    out: Path
    progress: Progress
    student: Student = field(init=False)
    source: Source = field(init=False)
    teacher: Student | None = field(init=False, default=None)
    teacher_source: Source | None = field(init=False, default=None)
    samples: Samples = field(init=False)

    def load(self, devices: Collection[Device]) -> None:
        """Read everything that the user gave, so that a mistake is found before any work is done."""
        self.student, self.source = _load(self.checkpoint, self.options)
        if self.precision == "int8" and not self.student.quantized:
            raise GpusqError(
                f"{self.checkpoint} has no trained scales, so it cannot be converted to int8",
                hint="use --precision fp16, or give a student that was trained quantized",
            )
        if self.baseline is not None:
            self._load_baseline(self.baseline, devices)
        if self.data is None:
            self.samples = random_samples(sample_specs(self.student), RANDOM_SAMPLES)
        else:
            self.samples = load_samples(self.data, sample_specs(self.student))
        kept = f"{self.student.quantized} quantized weights" if self.student.quantized else "float"
        self.progress.found("checkpoint", f"{self.student.model.rpartition(':')[2]}, {kept}, {self.student.kind}")
        tell_all(self.progress, "checkpoint", self.student.notes)
        if self.teacher is not None:
            tell_all(self.progress, "baseline", self.teacher.notes)

    def _load_baseline(self, baseline: Path, devices: Collection[Device]) -> None:
        if all(device.runtime != "onnxruntime" for device in devices):
            raise GpusqError(
                "a baseline is measured on this host's CPU, and no profile asks for that",
                hint="add --profile cpu, or leave out --baseline",
            )
        self.teacher, self.teacher_source = _load(baseline, self.options)
        if sample_specs(self.teacher) != sample_specs(self.student):
            raise GpusqError(
                f"{baseline} takes other inputs than {self.checkpoint}", hint="a baseline answers the same question"
            )

    @property
    def quantized(self) -> bool:
        """Whether the trained quantization is kept."""
        return self.precision in ("auto", "int8") and self.student.quantized > 0

    def float_type(self, device: Device) -> FloatType:
        """The type of what is not quantized."""
        asked: dict[str, FloatType] = {"fp32": "float32", "fp16": "float16"}
        return asked.get(self.precision, device.onnx.float_type)

    @cached_property
    def exported(self) -> Exported:
        """The graph of the student, its trained scales as Q/DQ where they are kept, and how it was come by."""
        with self.progress.working("exporting"):
            exported = self.student.export(scales=self.quantized)
        model = exported.model
        self.progress.found("export", f"opset {model.opset_imports['']}, {len(model.graph)} nodes, by {exported.way}")
        for way, reason in exported.failed:
            self.progress.found("export", f"not by {way}: {reason}")
        return exported

    @cached_property
    def reference(self) -> verify.Array:
        """The PyTorch student's logits on the samples."""
        return verify.outputs(self._predict(), self.samples, self.fixed_batch or verify.BATCH)

    @property
    def fixed_batch(self) -> int | None:
        """The number of samples that the model takes at once, where that is fixed."""
        return next((spec.shape[0] for spec in self.student.inputs if 0 not in spec.dynamic), None)

    def _predict(self) -> verify.Predict:
        """The student as training left it: in PyTorch, or the ONNX file that it came as."""
        if isinstance(self.student, GraphStudent):
            return verify.session_of(self.student.path)
        assert isinstance(self.student, ModuleStudent)
        return functools.partial(self.student.predict, scales=self.quantized)


def _convert_for(device: Device, bundle: Path, job: _Job) -> Manifest:
    bundle.mkdir()
    said = f"{bundle.name}:"
    progress = job.progress
    model = job.exported.model.clone()
    target = Target(device, job.float_type(device))
    passes = surgery(model, target)
    _check(model, device)
    save_onnx(model, bundle / MODEL_FILE)
    onnx.checker.check_model(bundle / MODEL_FILE, full_check=True)
    layers = layers_of(model, device)
    progress.found("surgery", f"{said} {', '.join(f'{step.name} {step.changed}' for step in passes)}")
    progress.found("sparsity", f"{said} {summary(layers)}")

    with progress.working(f"building for {device.title}"):
        built = building.build(bundle, device, name=str(job.out / bundle.name))
    progress.found("build", f"{said} {building.summary(built)}")
    if built.plan:
        progress.found("plan", f"{said} {building.plan_summary(built.plan)}")
    with progress.working("verifying") as advance:
        verified = verify.verify(
            bundle / MODEL_FILE, job.reference, job.samples, batch=job.fixed_batch or verify.BATCH, progress=advance
        )
    progress.found("verify", f"{said} {verify.summary(verified)}")
    measured = _measure(device, bundle, job)
    if measured:
        progress.found("bench", f"{said} {bench.summary(measured)}")

    missed = missed_gates(
        layers, built.plan, verified, given_samples=job.data is not None, float_type=target.float_type
    )
    for sentence in missed:
        progress.found("gate missed", f"{said} {sentence}")

    manifest = Manifest(
        gpusq=environment.versions().get("gpusq", "unknown"),
        created=_now(),
        profile=device.name,
        device=device.title,
        device_profile=device,
        student=job.source.model_copy(update={"way": job.exported.way, "failed": failed_ways(job.exported)}),
        baseline=job.teacher_source if measured else None,
        precision_asked=job.precision,
        precision=_precision_name(job.quantized, target.float_type),
        float_type=target.float_type,
        opset=model.opset_imports[""],
        host=environment.host(),
        versions=environment.versions(),
        layers=layers,
        sizes=sizes_of(model),
        passes=tuple(passes),
        engines=built.engines,
        missing=built.missing,
        plan=built.plan,
        verified=verified,
        measured=measured,
        gates_missed=missed,
        files={},
    )
    with progress.working("writing the report"):
        manifest = seal(manifest, bundle)
    progress.found("report", str(job.out / bundle.name / "report.html"))
    return manifest


def _check(model: ir.Model, device: Device) -> None:
    """Refuse a graph that breaks a hard rule of TensorRT."""
    found = lint(model)
    if found:
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        raise GpusqError(f"{device.title}: {found[0]}{more}", hint=found[0].rule.cure)


def _measure(device: Device, bundle: Path, job: _Job) -> Measurement | None:
    """Time the engine where this host is the device: on its CPU."""
    if device.runtime != "onnxruntime":
        return None
    student = bench.Contender(
        job.checkpoint.name, _precision_name(job.quantized, job.float_type(device)), bundle / "engine.onnx"
    )
    with job.progress.working("measuring") as advance:
        baseline = (
            None
            if job.teacher is None or job.baseline is None
            else _baseline(device, bundle, job.teacher, job.baseline)
        )
        return bench.bench(
            student,
            baseline,
            random_samples(sample_specs(job.student), job.fixed_batch or 1).inputs,
            bundle / bench.RAW_FILE,
            progress=advance,
        )


def _baseline(device: Device, bundle: Path, teacher: Student, path: Path) -> bench.Contender:
    """The dense checkpoint in FP32, beside the bundles: it is measured, not delivered."""
    model = teacher.export(scales=False).model
    surgery(model, Target(device, "float32"))
    file = bundle.parent / "baseline.onnx"
    save_onnx(model, file)
    return bench.Contender(path.name, "fp32", file)


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


def _load(path: Path, options: LoadOptions) -> tuple[Student, Source]:
    """A checkpoint, and where it came from; the hash is that of what was just read."""
    student = load_student(path, options)
    return student, Source(
        file=path.name,
        sha256=hash_checkpoint(path),
        model=student.model,
        parameters=student.parameters,
        card=dict(student.card),
        kind=student.kind,
        notes=student.notes,
    )


def _precision_name(quantized: bool, float_type: FloatType) -> str:
    return "int8" if quantized else {"float32": "fp32", "float16": "fp16"}[float_type]


def _now() -> str:
    """The time of the conversion, or SOURCE_DATE_EPOCH for builds that must repeat (reproducible-builds.org)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.now(timezone.utc) if epoch is None else datetime.fromtimestamp(int(epoch), timezone.utc)
    return moment.isoformat(timespec="seconds")
