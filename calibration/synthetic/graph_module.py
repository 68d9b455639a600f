"""An ONNX graph as a torch module that autograd can go through: node after node, by `operators`.

onnx2torch, the known converter, ends at opset 16: without the LayerNormalization, Gelu and Attention that today's
exporters write. What is wanted here is little: float graphs, one batch at a time, gradients to the inputs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from calibration.synthetic.operators import OPERATORS
from profiles.errors import GpusqError

_HINT = "give the checkpoint that the graph was exported from, or real samples: --data calib.npz"


class GraphModule(torch.nn.Module):
    """Computes the outputs of `graph`, a tuple; inputs by position."""

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__()
        self._inputs = [_name(value) for value in graph.inputs if not value.is_initializer()]
        self._outputs = [_name(value) for value in graph.outputs]
        self._nodes = list(graph)
        self._constants = {name: _tensor(value.const_value) for name, value in graph.initializers.items()}
        self._last_reads = {_name(value): node for node in graph for value in node.inputs if value is not None}
        for name, tensor in self._constants.items():
            self.register_buffer(f"_{len(self._buffers)}", tensor)
            self._last_reads.pop(name, None)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run every node."""
        values: dict[str, Any] = {**self._constants, **dict(zip(self._inputs, inputs, strict=True))}
        for node in self._nodes:
            arguments = [None if value is None else values[_name(value)] for value in node.inputs]
            results = _run(node, arguments)
            values.update(zip((_name(output) for output in node.outputs if output.name), results, strict=False))
            for value in node.inputs:
                if (
                    value is not None
                    and self._last_reads.get(_name(value)) is node
                    and _name(value) not in self._outputs
                ):
                    values.pop(_name(value), None)
        return tuple(values[name] for name in self._outputs)


def graph_module(model: ir.Model) -> GraphModule:
    """Return the float graph of `model` as a differentiable module.

    Raises:
        GpusqError: it has operators without a differentiable form here, Q/DQ among them.
    """
    unknown = Counter(
        node.op_type for node in model.graph if node.op_type not in OPERATORS and node.op_type != "Constant"
    )
    if unknown:
        found = ", ".join(f"{count} × {name}" for name, count in sorted(unknown.items()))
        raise GpusqError(f"no inputs can be synthesized for this graph: no gradient through {found}", hint=_HINT)
    return GraphModule(model.graph)


def _run(node: ir.Node, arguments: list[Any]) -> tuple[Any, ...]:
    if node.op_type == "Constant":
        return (_tensor(next(iter(node.attributes.values())).value),)
    attributes = {name: _value(attribute) for name, attribute in node.attributes.items()}
    if node.op_type == "Split":
        attributes.setdefault("num_outputs", len(node.outputs))
    try:
        result = OPERATORS[node.op_type](*arguments, **attributes)
    except (NotImplementedError, KeyError, TypeError) as error:
        raise GpusqError(
            f"no inputs can be synthesized for this graph: its node {node.name!r} ({node.op_type}) has no gradient "
            f"here: {error}",
            hint=_HINT,
        ) from error
    return result if isinstance(result, tuple) else (result,)


def _value(attribute: ir.Attr | Any) -> Any:
    return _tensor(attribute.value) if attribute.type == ir.AttributeType.TENSOR else attribute.value


def _tensor(value: Any) -> torch.Tensor:
    array = value.numpy() if hasattr(value, "numpy") else np.asarray(value)
    return torch.from_numpy(np.array(array))


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
