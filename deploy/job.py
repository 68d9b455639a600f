"""What all bundles of one conversion share: what the user gave, read once, and what is made of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from calibration.image_input import image_preprocessing
from calibration.method_names import LEAST_LOSS
from calibration.methods import Method
from calibration.probes import Feed
from calibration.samples import SYNTHETIC, ModelFacts, Samples, SampleSource, load_samples, random_samples
from calibration.search_memory import Memory
from deploy import verify
from deploy.build_options import BuildOptions
from deploy.bundle import hash_checkpoint, hash_file
from deploy.cache import Cache
from deploy.cache_key import code_digest
from deploy.manifest import SampleSet, Source
from deploy.progress import Progress, tell_all
from deploy.ranging import Ranging
from deploy.requirements import Requirement
from deploy.scales_file import Scales, read_scales
from exporters.checkpoint import LoadOptions, load_student
from exporters.graph_student import GraphStudent
from exporters.improvement import Improvement, check_improvable, measures_samples
from exporters.passes.place_quantizers import Measure
from exporters.passes.type_floats import IoTypes
from exporters.placement import Placement, check_supported, format_of, measures, places, rounds_to_integers
from exporters.sample_facts import sample_facts
from exporters.student import ModuleStudent, Student, sample_specs
from exporters.surgery import Target
from exporters.to_onnx import Exported
from profiles.device import Device, FloatType
from profiles.errors import GpusqError

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8"]
_FLOAT_TYPES: dict[str, FloatType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
RANDOM_SAMPLES = 64
_SEARCHES = "searches"
_CHANGE_ACTIVATIONS: frozenset[Improvement] = frozenset({"auto", "smooth-quant", "equalize"})


@dataclass
class Job:
    """What all bundles of one conversion share; each part is made when it is first asked for."""

    checkpoint: Path
    options: LoadOptions
    precision: Precision
    asked_placement: Placement | None
    data: SampleSource | None
    baseline: Path | None
    out: Path
    progress: Progress
    repair_sparsity: bool = False
    share_concat_scales: bool = False
    io_types: IoTypes = "keep"
    method: Method | None = None
    scales_file: Path | None = None
    improve: tuple[Improvement, ...] = ()
    target_drop: float | None = None
    build: BuildOptions = field(default_factory=BuildOptions)
    required: tuple[Requirement, ...] = ()
    cache: Cache = field(default_factory=lambda: Cache(None))
    partial: Path | None = None
    parts_list: bool = False
    student: Student = field(init=False)
    teacher: Student | None = field(init=False, default=None)
    source: Source = field(init=False)
    teacher_source: Source | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Settle the precision; raises GpusqError where the placement contradicts it."""
        self.precision = _settled_precision(self.precision, self.asked_placement)

    def load(self, devices: Collection[Device]) -> None:
        """Read everything that the user gave, so that a mistake is found before any work is done."""
        for device in devices:
            self.float_type(device)
            if self.asked_placement is not None:
                check_supported(self.asked_placement, device)
        self.student = load_student(self.checkpoint, self.options)
        check_improvable(self.placement, self.improve, target_drop=self.target_drop, method=self.range_method.name)
        if self.improve or self.target_drop is not None:
            self._check_improvable()
        if not self.student.quantized and measures(self.placement):
            self._check_measurable()
        if self.baseline is not None:
            self._load_baseline(self.baseline, devices)
        if self.data is not None:
            self._load_samples(self.data)
        kept = f"{self.student.quantized} quantized weights" if self.student.quantized else "float"
        self.progress.found("checkpoint", f"{self.student.model.rpartition(':')[2]}, {kept}, {self.student.kind}")
        tell_all(self.progress, "checkpoint", self.student.notes)
        if self.teacher is not None:
            tell_all(self.progress, "baseline", self.teacher.notes)
        if self.data is not None:
            self.progress.found("samples", f"{len(self.samples)} of {self.samples.available} in {self.samples.source}")
            tell_all(self.progress, "samples", self.samples.notes)

    def placed(self, placement: Placement, improve: tuple[Improvement, ...] = ()) -> Job:
        """The same with another placement, and with what was read; what it counts is not kept if it is cut off."""
        job = copy.copy(self)
        job.asked_placement, job.improve, job.partial = placement, improve, None
        job.precision = _settled_precision(self.precision, placement)
        made = ["ranging"] if job.quantized == self.quantized else ["ranging", "exported", "reference"]
        for name in made:
            job.__dict__.pop(name, None)
        return job

    def note_sources(self) -> None:
        """Keep where the student and the baseline came from, by the hashes of what was just read."""
        self.source = _source_of(self.checkpoint, self.student)
        if self.baseline is not None and self.teacher is not None:
            self.teacher_source = _source_of(self.baseline, self.teacher)

    @cached_property
    def samples(self) -> Samples:
        """What was given, or random inputs."""
        return random_samples(sample_specs(self.student), RANDOM_SAMPLES)

    def _load_samples(self, data: SampleSource) -> None:
        facts = sample_facts(self.student, self.checkpoint)
        if data.source == SYNTHETIC and not Path(SYNTHETIC).exists():
            self.samples = self._synthesize(data, facts)
            return
        with self.progress.working("reading samples") as advance:
            self.samples = load_samples(data, sample_specs(self.student), facts, advance)

    def _synthesize(self, data: SampleSource, facts: ModelFacts) -> Samples:
        from calibration.synthetic.graph_module import graph_module
        from calibration.synthetic.synthesize import synthesize

        specs = sample_specs(self.student)
        how = image_preprocessing(data, specs, facts)
        network = (
            graph_module(self.student.graph) if isinstance(self.student, GraphStudent) else _module_of(self.student)
        )
        with self.progress.working("making samples") as advance:
            return synthesize(
                network,
                specs,
                data.count or RANDOM_SAMPLES,
                seed=data.seed,
                steps=None if how is None else how.steps,
                batch=self.fixed_batch,
                advance=advance,
            )

    @property
    def sample_set(self) -> SampleSet | None:
        """Which samples were used; None where none were given."""
        if self.data is None:
            return None
        samples = self.samples
        return SampleSet(
            source=samples.source,
            count=len(samples),
            available=samples.available,
            seed=self.data.seed if len(samples) < samples.available else None,
            sha256=samples.sha256,
            preprocessing=None if samples.preprocessing is None else samples.preprocessing.model_dump(mode="json"),
            notes=samples.notes,
        )

    def _load_baseline(self, baseline: Path, devices: Collection[Device]) -> None:
        if all(device.runtime != "onnxruntime" for device in devices):
            raise GpusqError(
                "a baseline is measured on this host's CPU, and no profile asks for that",
                hint="add --profile cpu, or leave out --baseline",
            )
        self.teacher = load_student(baseline, self.options)
        if sample_specs(self.teacher) != sample_specs(self.student):
            raise GpusqError(
                f"{baseline} takes other inputs than {self.checkpoint}", hint="a baseline answers the same question"
            )

    @property
    def quantized(self) -> bool:
        """Whether the trained quantization is kept."""
        return self.precision in ("auto", "int8") and self.student.quantized > 0

    @property
    def placement(self) -> Placement:
        """Which quantizers layers get that have none."""
        if self.asked_placement is not None:
            return self.asked_placement
        return "w8a8-linear" if self.precision == "int8" and not self.student.quantized else "as-trained"

    @property
    def range_method(self) -> Method:
        """How the range of an activation is found: as asked, or what loses least where integers are to hold it."""
        return self.method or Method(LEAST_LOSS if rounds_to_integers(self.placement) else "max")

    @property
    def required_on_device(self) -> tuple[str, ...]:
        """What the engine that is built on the device must come to: what was asked, and what the placement is for."""
        sparse = [Requirement("sparse", 1)] if self.placement == "sparse-int8" else []
        asked = {requirement.what for requirement in self.required}
        return tuple(map(str, (*self.required, *(each for each in sparse if each.what not in asked))))

    def target(self, device: Device) -> Target:
        """What the graph is made for on `device`."""
        return Target(
            device,
            self.float_type(device),
            self.placement,
            self.repair_sparsity,
            self.io_types,
            self.improve,
            self.target_drop,
            self.share_concat_scales,
        )

    @property
    def feed(self) -> Feed | None:
        """The samples for what looks at what the model does on them; None without samples."""
        if self.data is None:
            return None
        return Feed(
            self.samples.inputs,
            self.batch,
            self.samples.labels,
            self._memory,
            lambda text: self.progress.found("search", text),
        )

    @property
    def can_leave_float(self) -> bool:
        """Whether layers get integers here that could stay float, and samples were given to judge that by."""
        return rounds_to_integers(self.placement) and self.data is not None and self.target_drop is None

    @property
    def _memory(self) -> Memory | None:
        """Where searches are remembered: beside the finished stages."""
        if self.cache.root is None:
            return None
        scales = None if self.scales_file is None else hash_file(self.scales_file).sha256
        labels = None if self.samples.labels is None else self.samples.labels.tolist()
        context = repr((code_digest(), str(self.range_method), scales, self.samples.sha256, labels))
        return Memory(self.cache.root / _SEARCHES, context)

    @cached_property
    def ranging(self) -> Ranging:
        """How the ranges of activations are found that have no trained scale."""
        return Ranging(
            samples=lambda: self.samples,
            batch=self.batch,
            placement=self.placement,
            progress=self.progress,
            method=self.range_method,
            scales=self.scales,
            feed=self.feed,
            weights="mse" if "mse-weights" in self.improve else "max",
            partial=self.partial,
        )

    @property
    def ranges_by(self) -> str | None:
        """How ranges were found; None where there are none to find."""
        return self.ranging.by if measures(self.placement) else None

    def measure(self, model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        """The ranges of tensors that get a scale.

        Raises:
            GpusqError: there are tensors to measure, and neither scales nor samples were given.
        """
        if names:
            self._check_measurable()
        return self.ranging.measure(model, names)

    @cached_property
    def scales(self) -> Scales | None:
        """What was calibrated before; None where no file of scales was given.

        Raises:
            GpusqError: it is of another checkpoint.
        """
        if self.scales_file is None:
            return None
        scales = read_scales(self.scales_file)
        if scales.sha256 != hash_checkpoint(self.checkpoint):
            raise GpusqError(
                f"{self.scales_file} is of another checkpoint than {self.checkpoint}",
                hint="calibrate this one: gpusq calibrate",
            )
        return scales

    @property
    def ranges(self) -> Measure | None:
        """Tells the largest absolute values of tensors on the samples, infinite ones too; None without samples."""
        return None if self.data is None else self.ranging.largest

    def _check_improvable(self) -> None:
        asked = self.improve[0] if self.improve else "a target for the drop"
        if not places(self.placement):
            raise GpusqError(
                f"{asked} is for what gets quantized, and placement {self.placement} quantizes nothing",
                hint="give a placement such as --placement w8a8-linear, or leave it out",
            )
        if self.target_drop is not None and self.data is None:
            raise GpusqError("there is nothing to judge a drop on", hint="give samples with --data calib.npz")
        if self.scales_file is not None and (changing := _CHANGE_ACTIVATIONS.intersection(self.improve)):
            raise GpusqError(
                f"{', '.join(sorted(changing))} changes the ranges that {self.scales_file} holds",
                hint="give the samples, with --data, and leave out --scales",
            )
        if self.data is None and measures_samples(self.improve):
            raise GpusqError(
                f"{', '.join(self.improve)} looks at what the model does on samples, and there are none",
                hint="give them with --data calib.npz, beside --scales where you have a file of scales",
            )

    def _check_measurable(self) -> None:
        if self.data is None and self.scales is None:
            raise GpusqError(
                f"{self.checkpoint} has layers without trained scales, and there is nothing to measure them on",
                hint="give samples with --data calib.npz or scales with --scales, or use --precision fp16",
            )

    def precision_name(self, device: Device) -> str:
        """What the bundle is called in reports."""
        if places(self.placement) and not self.quantized:
            return format_of(self.placement)
        return _precision_name(self.quantized or places(self.placement), self.float_type(device))

    def float_type(self, device: Device) -> FloatType:
        """The type of what is not quantized.

        Raises:
            GpusqError: the device computes nothing in that type.
        """
        float_type = _FLOAT_TYPES.get(self.precision, device.onnx.float_type)
        if float_type == "bfloat16" and not device.has_bfloat16:
            raise GpusqError(f"{device.name} has no bfloat16 kernels", hint="use --precision fp32 or fp16")
        return float_type

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
        return verify.outputs(self._predict(), self.samples, self.batch)

    @property
    def batch(self) -> int:
        """Samples a run."""
        return self.fixed_batch or verify.BATCH

    @cached_property
    def trained(self) -> verify.Array:
        """What the student answers as training left it, with its scales, whatever the placement."""
        if isinstance(self.student, ModuleStudent):
            predict = functools.partial(self.student.predict, scales=self.student.quantized > 0)
            return verify.outputs(predict, self.samples, self.batch)
        return self.reference

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


def as_source(data: str | Path | SampleSource | None) -> SampleSource | None:
    """Samples as the Python API takes them, with what is said about them."""
    return data if data is None or isinstance(data, SampleSource) else SampleSource(str(data))


def _module_of(student: Student) -> Any:
    assert isinstance(student, ModuleStudent)
    return student.module


def _settled_precision(precision: Precision, placement: Placement | None) -> Precision:
    """The precision that goes with a placement."""
    if placement is None or placement == "as-trained":
        return precision
    if placement == "fp16" and precision in ("auto", "fp16"):
        return "fp16"
    if precision == "auto" or (precision == "int8" and rounds_to_integers(placement)):
        return precision
    raise GpusqError(
        f"placement {placement} and precision {precision} contradict each other", hint="leave out one of the two"
    )


def _source_of(path: Path, student: Student) -> Source:
    return Source(
        file=path.name,
        sha256=hash_checkpoint(path),
        model=student.model,
        parameters=student.parameters,
        card=dict(student.card),
        kind=student.kind,
        notes=student.notes,
    )


def _precision_name(quantized: bool, float_type: FloatType) -> str:
    return "int8" if quantized else next(name for name, known in _FLOAT_TYPES.items() if known == float_type)
