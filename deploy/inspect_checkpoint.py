"""Show what a checkpoint holds without building its model: masks, scales and bits, weight by weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from deploy.text_table import text_table
from exporters.checkpoint import WORDS, LoadOptions, config_of, hints_of, load_student
from exporters.kinds import kind_of
from exporters.student import Student
from exporters.zero_pattern import count_zeros
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1
_HEADING = ("weight", "shape", "stored", "bits", "scales", "input scale", "mask", "zeros", "2:4 along K")


class WeightInfo(Record):
    """One weight of two axes or more."""

    name: str
    shape: tuple[int, ...]
    dtype: str = Field(description="The type that it has in the file.")
    bits: int | None = Field(description="Bits of its integers; None where it has no trained scales.")
    scales: str = Field(description="tensor, channel, block N, or nothing.")
    input_scale: float | None
    mask: str = Field(description="Whose mask was folded into it.")
    zeros: float = Field(description="Share of exact zeros.")
    two_of_four: bool = Field(description="Whether at most two of four along its second axis are not zero.")


class CheckpointInspection(Record):
    """What a checkpoint was recognised as."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    file: str
    kind: str
    architecture: str | None = Field(description="What the file itself says of its architecture.")
    parameters: int
    quantized: int = Field(description="Weights with trained scales.")
    masked: int = Field(description="Weights into which a mask was folded.")
    weights: tuple[WeightInfo, ...]
    notes: tuple[str, ...]

    def to_text(self) -> str:
        """The inspection for the terminal."""
        architecture = self.architecture or "not told by the file: name it with --model"
        return "\n".join(
            [
                f"{self.file}: {self.kind}",
                f"architecture: {architecture}",
                f"{self.parameters:,} parameters; trained scales of {self.quantized} weights; {self.masked} masks",
                *self.notes,
                "",
                text_table([_HEADING, *map(_row, self.weights)]),
            ]
        )


def inspect_checkpoint(path: Path, options: LoadOptions | None = None) -> CheckpointInspection:
    """Inspect the checkpoint in `path`; `options` decide what it leaves open about its scales.

    Raises:
        GpusqError: there is no such file, or it cannot be read safely.
    """
    if not path.exists():
        raise GpusqError(f"no such file: {path}", hint="give a checkpoint, an .onnx file or a bundle")
    kind = kind_of(path)
    if kind == "pt2":
        return _whole(path, load_student(path, options))
    from exporters.quantizer import INPUT, Place
    from exporters.scales.taken import widened
    from exporters.student_file import FORMAT
    from exporters.tensors import read_tensors
    from exporters.weights import take_apart

    tensors = read_tensors(path)
    apart = take_apart(tensors, config_of(path), hints_of(options or LoadOptions()))
    masked, taken = apart.masked, apart.taken
    masks = {mask.name: mask.kind for mask in masked.folded}
    own = tensors.metadata.get("format") == FORMAT
    weights = []
    for name, tensor in taken.state.items():
        if tensor.ndim < 2 or not tensor.numel():
            continue
        counted = count_zeros(widened(tensor), 1)
        module, _, parameter = name.rpartition(".")
        quantizer = taken.quantizers.get(Place(module, parameter))
        activation = taken.quantizers.get(Place(module, INPUT))
        weights.append(
            WeightInfo(
                name=name,
                shape=tuple(tensor.shape),
                dtype=_stored(tensors.state, name, tensor),
                bits=None if quantizer is None else quantizer.bits,
                scales=_scales(quantizer),
                input_scale=None if activation is None or activation.scale.ndim else float(activation.scale),
                mask=masks.get(name, ""),
                zeros=counted.zeros,
                two_of_four=counted.fits,
            )
        )
    return CheckpointInspection(
        file=path.name,
        kind=", ".join(part for part in ("gpusq student file" if own else WORDS.get(kind, kind), taken.kind) if part),
        architecture=_architecture(path, tensors.metadata),
        parameters=sum(tensor.numel() for tensor in taken.state.values()),
        quantized=sum(place.is_parameter for place in taken.quantizers),
        masked=len(masked.folded),
        weights=tuple(weights),
        notes=(*tensors.notes, *taken.notes, *_torchao(len(apart.of_torchao))),
    )


def _torchao(count: int) -> tuple[str, ...]:
    return (f"{count} tensors are torchao's own and not shown: its scales are taken with the model",) if count else ()


def _whole(path: Path, student: Student) -> CheckpointInspection:
    """What is known of a whole model: its weights have no names of their own."""
    return CheckpointInspection(
        file=path.name,
        kind=student.kind,
        architecture=student.model,
        parameters=student.parameters,
        quantized=student.quantized,
        masked=0,
        weights=(),
        notes=student.notes,
    )


def _architecture(path: Path, metadata: Any) -> str | None:
    named = metadata.get("model")
    if isinstance(named, str):
        return named
    architectures = config_of(path).get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else None


def _stored(state: Any, name: str, tensor: Any) -> str:
    return str(state.get(name, tensor).dtype).removeprefix("torch.")


def _scales(quantizer: Any) -> str:
    if quantizer is None:
        return ""
    if quantizer.axis is None:
        return "tensor"
    return f"block {quantizer.block}" if quantizer.block else "channel"


def _row(weight: WeightInfo) -> tuple[str, ...]:
    return (
        weight.name,
        "×".join(map(str, weight.shape)),
        weight.dtype,
        "" if weight.bits is None else str(weight.bits),
        weight.scales,
        "" if weight.input_scale is None else f"{weight.input_scale:.4g}",
        weight.mask,
        f"{100 * weight.zeros:.1f} %",
        "yes" if weight.two_of_four else "no",
    )
