"""A checkpoint of any kind → one clean ONNX file, and what was done on the way."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from pydantic import Field

from deploy.bundle import staged_files
from deploy.manifest import Failed
from deploy.progress import Progress
from exporters.checkpoint import LoadOptions, load_student
from exporters.save_onnx import save_onnx
from exporters.to_onnx import OPSET, Exported
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1
_CHECKED_BYTES = 200 * 2**20  # onnx's checker holds the whole file in memory


class Tensor(Record):
    """An input or an output of the graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Export(Record):
    """What `export` did; the same is printed by `gpusq export --json`."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    files: tuple[Path, ...] = Field(description="The ONNX file, and its external data where it has any.")
    kind: str = Field(description="What the checkpoint was taken for.")
    model: str
    parameters: int
    quantized: int = Field(description="Weights with trained scales.")
    opset: int
    nodes: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    way: str = Field(description="How the graph was made.")
    failed: tuple[Failed, ...] = Field(description="The ways that were tried before, and why they failed.")
    notes: tuple[str, ...]

    def to_text(self) -> str:
        """The export for the terminal."""
        lines = [
            f"{self.files[0]}: opset {self.opset}, {self.nodes} nodes, {self.parameters:,} parameters",
            f"from {self.model}, a {self.kind}, by {self.way}",
            *(f"not by {failed.way}: {failed.reason}" for failed in self.failed),
            *(f"input {_text(tensor)}" for tensor in self.inputs),
            *(f"output {_text(tensor)}" for tensor in self.outputs),
        ]
        if self.quantized:
            lines.append(f"trained scales of {self.quantized} weights kept as Q/DQ")
        return "\n".join([*lines, *self.notes])


def export(
    checkpoint: str | Path,
    out: str | Path,
    options: LoadOptions | None = None,
    *,
    opset: int = OPSET,
    progress: Progress | None = None,
) -> Export:
    """Write the student in `checkpoint` to the ONNX file `out`.

    Args:
        checkpoint: a file or a folder of any kind that `exporters.checkpoint` knows.
        out: the file; one that is there is replaced when the new one is whole.
        options: what the checkpoint itself does not say.
        opset: of the graph.
        progress: is told what each stage found.

    Raises:
        GpusqError: something that was given cannot be used. Nothing is left behind then.
    """
    out, progress = Path(out), progress or Progress()
    if out.is_dir():
        raise GpusqError(f"{out} is a folder", hint="give the file to write, such as -o model.onnx")
    with progress.working("reading"):
        student = load_student(Path(checkpoint), options)
    progress.found("checkpoint", f"{student.model}, {student.kind}")
    with progress.working("exporting"):
        exported = student.export(opset=opset)
    model = exported.model
    with staged_files(out) as staged:
        files = save_onnx(model, staged)
        if staged.stat().st_size < _CHECKED_BYTES:
            onnx.checker.check_model(staged, full_check=True)
    return Export(
        files=tuple(out.with_name(file.name) for file in files),
        kind=student.kind,
        model=student.model,
        parameters=student.parameters,
        quantized=student.quantized,
        opset=model.opset_imports[""],
        nodes=model.graph.num_nodes(),
        inputs=tuple(map(_tensor, model.graph.inputs)),
        outputs=tuple(map(_tensor, model.graph.outputs)),
        way=exported.way,
        failed=failed_ways(exported),
        notes=student.notes,
    )


def failed_ways(exported: Exported) -> tuple[Failed, ...]:
    """The ways that were tried before the one that led to `exported`."""
    return tuple(Failed(way=way, reason=reason) for way, reason in exported.failed)


def _tensor(value: ir.Value) -> Tensor:
    shape = value.shape or ()
    dims = tuple(dim if isinstance(dim, int) else str(dim.value or "?") for dim in shape)
    return Tensor(name=value.name or "", dtype="" if value.dtype is None else value.dtype.name.lower(), shape=dims)


def _text(tensor: Tensor) -> str:
    return f"{tensor.name}: {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"
