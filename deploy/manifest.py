"""`manifest.json`: what a bundle is made of, and what is known about it.

Three origins of a figure are kept apart: `verified` and `measured` were found on the host named here, `predicted` was
computed. A bundle without an entry has nothing of that kind; nothing is implied.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from calibration.costly_layers import Found
from deploy.placement_choice import Choice
from exporters.passes.outcome import Outcome
from exporters.sparsity import Sparsity
from profiles.device import Device
from profiles.errors import GpusqError
from profiles.record import Record, first_problem

SCHEMA = 1
FILE_NAME = "manifest.json"
MODEL_FILE = "model.onnx"
SIGNATURE_NAME = "manifest.json.sig"


class FileEntry(Record):
    """A file of the bundle."""

    sha256: str
    bytes: int


class Failed(Record):
    """A way to a graph that did not lead there."""

    way: str
    reason: str


class Source(Record):
    """The checkpoint that a model came from."""

    file: str = Field(description="The file's name, without its folder.")
    sha256: str = Field(description="Of the file; of several, of their list as sha256sum writes it, sorted by name.")
    model: str = Field(description="The factory that builds the architecture.")
    parameters: int
    card: dict[str, Any] = Field(description="What the training wrote about itself.")
    kind: str = Field(default="", description="What the checkpoint was taken for; empty in older manifests.")
    notes: tuple[str, ...] = Field(default=(), description="What was folded, assumed or left out while it was read.")
    way: str = Field(default="", description="How its graph was made; empty where that was not written down.")
    failed: tuple[Failed, ...] = Field(default=(), description="The ways that were tried before, and why they failed.")


class SampleSet(Record):
    """The samples that ranges were measured on and the model was verified with."""

    source: str = Field(description="The file's or folder's name, or the Python function.")
    count: int
    available: int = Field(description="How many there were to choose from.")
    seed: int | None = Field(description="Of the choice; None where all were taken.")
    sha256: str = Field(description="Of their own hashes, one a line, in the order of the bundle's samples.sha256.")
    preprocessing: dict[str, Any] | None = Field(description="How images became inputs; None where none did.")
    notes: tuple[str, ...] = Field(description="What was converted, and what may be wrong with them.")


class Layer(Record):
    """One layer of `model.onnx` with a constant weight: a GEMM, or a convolution as the GEMM over its patches."""

    module: str
    kind: Literal["gemm", "conv"] = "gemm"
    k: int = Field(description="Length of the reduction; of a convolution, input channels per group × kernel.")
    n: int = Field(description="Number of outputs.")
    group: int = 1
    weight_type: str
    activation_type: str
    input_scale: float | None
    weight_scale_min: float | None
    weight_scale_max: float | None
    sparsity: Sparsity


class Sizes(Record):
    """Bytes of the weights, computed from the real tensors.

    `compressed` stores a 2:4 group as two values and two 2-bit indices (GPUSQ-ViT, section 3.1) and a dense weight as
    it is.
    """

    pruned_fp32: int
    pruned_compressed: int
    pruned_ratio: float
    scales: int = Field(description="Bytes of the pruned layers' scales, FP32; not part of `pruned_compressed`.")
    total_fp32: int = Field(description="Bytes of every parameter in FP32: neither scales, zero-points nor shapes.")
    total_compressed: int = Field(description="The same with the pruned layers compressed, the scales counted.")
    total_ratio: float


class Kernel(Record):
    """One compiled kernel."""

    name: str
    kind: str = Field(description="gemm, convolution, fused-gemm, attention, pooling, pointwise or other.")
    types: tuple[str, ...] = Field(description="The types of its inputs.")
    modules: tuple[str, ...] = Field(description="The modules whose operators it computes.")
    outputs: tuple[str, ...] = Field(default=(), description="The types of its outputs.")
    operands: tuple[str, ...] = Field(
        default=(), description="Types of a GEMM's or convolution's operands: activation, then weight."
    )
    bytes_in: int | None = Field(default=None, description="Of its distinct inputs and constants, for Plan.sizes.")
    bytes_out: int | None = Field(default=None, description="Of its outputs, for Plan.sizes.")


class BlockAttention(Record):
    """Whether one attention became one kernel."""

    module: str
    fused: bool
    node: str = Field(default="", description="Its node, where a module has several.")


class CompiledLayer(Record):
    """A layer with a constant weight as it was asked for and as it was compiled."""

    module: str
    asked: tuple[str, str] = Field(description="ONNX types of its operands: activation, then weight; int8 by Q/DQ.")
    compiled: tuple[str, ...] = Field(description="The compiler's types of its kernel's; empty where it is no GEMM.")
    kernel: str = Field(description="The kernel that computes it; empty where none was found.")
    sparse: bool = Field(default=False, description="Whether that is a kernel for sparse weights, by its name.")
    judged: bool = Field(
        default=True,
        description="False where this compiler has no such kernel for its target, and TensorRT on the device has.",
    )


class Plan(Record):
    """The compiled kernels, read back from the compiler."""

    source: str
    target: str
    kernels: tuple[Kernel, ...]
    gemms_by_type: dict[str, int]
    convolutions_by_type: dict[str, int] = Field(default={}, description="Kernels; a 1×1 may have become a GEMM.")
    linear_gemms: int = Field(description="Linear layers whose GEMM was found in the plan.")
    linear_gemms_int8: int
    convolutions: int | None = Field(default=None, description="Convolutions whose kernel was found in the plan.")
    convolutions_int8: int | None = None
    attentions: tuple[BlockAttention, ...]
    kernels_per_block: dict[str, int] = Field(description="Kernels whose first module lies in the block.")
    weights_bytes: int | None = None
    scratch_bytes: int | None = None
    bytes_moved: int | None = Field(
        default=None, description="Each kernel's distinct inputs, constants and outputs: an upper bound, caches aside."
    )
    sizes: dict[str, tuple[int, ...]] = Field(default={}, description="The inputs' shapes that the bytes hold for.")
    layers: tuple[CompiledLayer, ...] = Field(default=(), description="Empty in older manifests, and for a CPU.")
    sparse_kernels: int | None = Field(default=None, description="Kernels for sparse weights, by their names.")


class Engine(Record):
    """An engine in the bundle."""

    file: str
    runtime: str
    runtime_version: str
    target: str
    nearest: bool = Field(description="True where it was compiled for a relative of the device.")
    note: str
    built_on: str | None = Field(default=None, description="The GPU, driver and JetPack that built it; None for a CPU.")
    sparse_eligible: int | None = Field(default=None, description="Layers that TensorRT's log calls eligible.")
    sparse_chosen: int | None = Field(default=None, description="Layers for which it chose a sparse kernel.")
    dla_fallbacks: tuple[str, ...] = Field(default=(), description="Layers that the DLA left to the GPU.")
    tactics_skipped: int = Field(default=0, description="Kernels that were not tried, for want of memory.")
    options: dict[str, Any] = Field(default={}, description="The build options that were not the default.")


class Missing(Record):
    """A step that this host could not do, and how to do it."""

    what: str
    why: str
    how: str


class Interval(Record):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Float16Check(Record):
    """The graph with every operator rounded to float16, by ONNX's reference evaluator.

    onnxruntime computes float16 operators in float32 on a CPU, so it would not see an overflow.
    """

    count: int
    finite: bool
    agreement: float | None
    max_abs_difference: float | None = Field(description="None where a logit is not finite.")


class Verification(Record):
    """`model.onnx` on onnxruntime against the PyTorch student, on the same samples."""

    origin: Literal["verified"] = "verified"
    samples: str = Field(description="Where the samples come from.")
    samples_sha256: str
    count: int
    labelled: bool
    runtime: str
    student_top1: float | None
    onnx_top1: float | None
    agreement: float | None = Field(description="Share of samples with the same top-1 class; None without classes.")
    max_abs_difference: float = Field(description="Largest difference between two values of the first output.")
    relative_difference: float | None = Field(
        default=None, description="The same as a share of the largest value of the student's output."
    )
    drop: Interval | None = Field(description="Top-1 of the student less that of the model; exact interval.")
    float16: Float16Check | None = Field(description="None for a float32 graph.")


class Timing(Record):
    """Latency of one model, in milliseconds."""

    name: str
    precision: str
    p50_ms: Interval
    p99_ms: Interval
    throughput_qps: Interval | None = Field(default=None, description="Batches per second, back to back.")


class Measurement(Record):
    """Latency of the student beside its baseline, interleaved in one process."""

    origin: Literal["measured"] = "measured"
    device: str
    runtime: str
    threads: int
    batch: int
    pairs: int
    student: Timing
    baseline: Timing | None
    speedup: Interval | None = Field(description="Median over pairs of baseline / student latency.")
    verdict: Literal["faster", "slower", "inconclusive", "no baseline"]
    noise_floor: float | None = Field(default=None, description="By how much equals may differ here, as a share.")
    broken: tuple[str, ...] = Field(default=(), description="Conditions that did not hold: there is no verdict then.")
    raw: str = Field(description="The bundle's file that holds every sample.")


class Prediction(Record):
    """A figure that was computed, not measured."""

    origin: Literal["predicted"] = "predicted"
    what: str
    value: float
    unit: str
    how: str


class Manifest(Record):
    """Everything that is known about a bundle."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    gpusq: str
    created: str
    profile: str = Field(description="The profile's name.")
    device: str = Field(description="The device's title.")
    device_profile: Device = Field(description="The profile itself, as it was.")
    student: Source
    baseline: Source | None
    samples: SampleSet | None = Field(default=None, description="None where the user gave none.")
    precision_asked: str
    precision: str
    float_type: str
    opset: int
    host: dict[str, str]
    versions: dict[str, str]
    layers: tuple[Layer, ...]
    sizes: Sizes
    passes: tuple[Outcome, ...]
    ranges_by: str | None = Field(
        default=None,
        description="How ranges of activations were found; None where none were, or in older manifests.",
    )
    mixed_precision: Found | None = Field(
        default=None,
        description="Layers that stay float to keep the accuracy, and the evidence; None if not asked.",
    )
    placements: Choice | None = Field(
        default=None,
        description="The placements that were tried, where the best was asked for; latencies are predicted.",
    )
    engines: tuple[Engine, ...]
    missing: tuple[Missing, ...]
    plan: Plan | None
    verified: Verification | None
    measured: Measurement | None
    predicted: tuple[Prediction, ...] = ()
    required: tuple[str, ...] = Field(default=(), description="What the engine on the device must come to.")
    gates_missed: tuple[str, ...] = Field(description="What is less than was asked for; empty where nothing is.")
    files: dict[str, FileEntry]


def is_bundle(folder: Path) -> bool:
    """Whether gpusq wrote `folder`, this release or another."""
    return _schema_of(folder / FILE_NAME) is not None


def read_manifest(bundle: Path) -> Manifest:
    """Read the manifest of the bundle in folder `bundle`.

    Raises:
        GpusqError: there is none, it is damaged, or a newer gpusq wrote it.
    """
    path = bundle / FILE_NAME
    schema = _schema_of(path)
    if schema is None:
        raise GpusqError(f"{bundle} is not a bundle: it has no {FILE_NAME}", hint="`gpusq convert` writes bundles")
    if schema > SCHEMA:
        raise GpusqError(f"{path} has schema {schema}, this gpusq reads {SCHEMA}", hint="update gpusq")
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise GpusqError(
            f"{path}: {first_problem(error)}", hint="it was changed: convert the checkpoint again"
        ) from None


def _schema_of(path: Path) -> int | None:
    """The schema of a manifest of gpusq's; None for anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(fields, dict) or not {"schema", "gpusq", "profile"} <= fields.keys():
        return None
    return fields["schema"] if isinstance(fields["schema"], int) else None
