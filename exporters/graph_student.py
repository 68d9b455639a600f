"""A student that came as an ONNX file: already a graph, its Q/DQ brought into the one form that all stages know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.samples import InputSpec
from exporters.linears import QDQ
from exporters.onnx_file import custom_operators, input_infos, read_onnx
from exporters.passes.qoperator_to_qdq import QOperatorToQdq
from exporters.passes.set_opset import SetOpset
from exporters.passes.symmetric_qdq import SymmetricQdq
from exporters.signature import Input
from exporters.to_onnx import OPSET, Exported
from profiles.errors import GpusqError

_EXAMPLE = 1  # the length of a dynamic axis in an example


@dataclass(frozen=True)
class GraphStudent:
    """A student that is an ONNX graph.

    Attributes:
        path: the file, as it was given.
        graph: cleaned.
        inputs: what it takes; dynamic axes keep their names.
        notes: what was brought into another form.
    """

    path: Path
    graph: ir.Model
    inputs: tuple[Input, ...]
    notes: tuple[str, ...] = ()
    preprocessing: Mapping[str, InputSpec] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "ONNX file"

    @property
    def model(self) -> str:
        """The graph's own name."""
        return self.graph.graph.name or "a graph without a name"

    @property
    def parameters(self) -> int:
        """Number of weights: constants of more than one element that are no scales."""
        return sum(_size(value) for value in self.graph.graph.initializers.values() if not _is_scale(value))

    @property
    def quantized(self) -> int:
        """Number of constants behind a DequantizeLinear."""
        dqs = (node for node in self.graph.graph if node.op_type == "DequantizeLinear")
        return sum((value := node.inputs[0]) is not None and value.is_initializer() for node in dqs)

    def export(self, *, scales: bool = True, opset: int = OPSET) -> Exported:
        """Return a copy of the graph, at `opset` or the older one that it has.

        Raises:
            GpusqError: `scales` is false though the graph has Q/DQ, or it needs a newer opset.
        """
        if not scales and any(node.op_type in QDQ for node in self.graph.graph):
            raise GpusqError(
                f"{self.path} is quantized, and its float weights are not in it",
                hint="convert the float model, or keep the quantization: --precision auto",
            )
        model = self.graph.clone()
        SetOpset(opset)(model)
        return Exported(model, "the file itself")


def read_graph(path: Path) -> GraphStudent:
    """Return the student in the ONNX file `path`.

    Raises:
        GpusqError: the file is damaged, or its quantization cannot be made symmetric exactly.
    """
    model = read_onnx(path)
    steps = [step(model) for step in (QOperatorToQdq(), SymmetricQdq())]
    notes = [f"{step.name}: {step.changed}" for step in steps if step.changed]
    notes += [f"{left.where}: {left.why}" for step in steps for left in step.left_alone]
    notes += [f"{count} × {name}: not an operator of ONNX" for name, count in custom_operators(model).items()]
    inputs = []
    for name, info in input_infos(model).items():
        if info.shape is None:
            raise GpusqError(f"{path}: input {name!r} has no shape", hint="export the model with shapes")
        dynamic = {axis: str(dim or f"{name}_axis{axis}") for axis, dim in enumerate(info.shape) if not _fixed(dim)}
        shape = tuple(dim if isinstance(dim, int) and dim > 0 else _EXAMPLE for dim in info.shape)
        inputs.append(Input(name, shape, info.dtype, dynamic))
    return GraphStudent(path, model, tuple(inputs), tuple(notes))


def _fixed(dim: int | str | None) -> bool:
    return isinstance(dim, int) and dim > 0


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None or value.const_value.size == 1 else value.const_value.size


def _is_scale(value: ir.Value) -> bool:
    return all(node.op_type in QDQ and index > 0 for node, index in value.uses())
