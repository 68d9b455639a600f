"""The linear layers of a graph: MatMul and Gemm nodes whose weight is a constant, whatever stands in between.

A weight may be a float initializer or an INT8 one behind DequantizeLinear and Cast; an activation may come through
QuantizeLinear, DequantizeLinear and Cast. `find_linears` looks through all of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.module_names import MODULE_KEY

QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_TRANSPARENT = QDQ | {"Cast"}


@dataclass(frozen=True)
class Linear:
    """One linear layer, y = x·W, with W [K, N] or its transpose as stored."""

    node: ir.Node
    weight: ir.Value
    k_axis: int
    weight_dq: ir.Node | None
    input_q: ir.Node | None

    @property
    def module(self) -> str:
        """The module's name, or the node's where the exporter kept none."""
        return self.node.metadata_props.get(MODULE_KEY) or self.node.name or ""

    @property
    def k(self) -> int:
        """Length of the reduction."""
        return int(self.values.shape[self.k_axis])

    @property
    def n(self) -> int:
        """Number of outputs."""
        return int(self.values.shape[1 - self.k_axis])

    @property
    def values(self) -> npt.NDArray[np.generic]:
        """The stored weight, [K, N] or [N, K], quantized or not."""
        return array_of(self.weight)

    @property
    def weight_type(self) -> str:
        """The type of the weight that the compiler sees: of the stored values."""
        return _type_name(self.weight)

    @property
    def activation_type(self) -> str:
        """The type that the GEMM can read: int8 behind a quantizer, else the type of the tensor."""
        if self.input_q is not None:
            return "int8"
        activation = self.node.inputs[0]
        assert activation is not None
        return _type_name(activation)

    @property
    def int8_output(self) -> bool:
        """Whether a quantizer reads the output, behind nothing but the bias."""
        output = self.node.outputs[0]
        users = [node for node, _ in output.uses()]
        if len(users) == 1 and users[0].op_type == "Add":
            users = [node for node, _ in users[0].outputs[0].uses()]
        return bool(users) and all(node.op_type == "QuantizeLinear" for node in users)

    @property
    def weight_scale(self) -> npt.NDArray[np.generic] | None:
        """Scales of the output channels, [N]; None for a float weight."""
        return None if self.weight_dq is None else scale_of(self.weight_dq)

    @property
    def input_scale(self) -> float | None:
        """Scale of the activation; None where it is not quantized."""
        scale = None if self.input_q is None else scale_of(self.input_q)
        return None if scale is None else float(scale)


def find_linears(graph: ir.Graph) -> Iterator[Linear]:
    """Yield the linear layers of `graph` in its order."""
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm") or node.domain:
            continue
        weight, through = trace_back(node.inputs[1])
        if weight is None or not weight.is_initializer() or len(array_shape(weight)) != 2:
            continue
        _, before = trace_back(node.inputs[0])
        transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
        yield Linear(
            node=node,
            weight=weight,
            k_axis=1 if transposed else 0,
            weight_dq=next((n for n in through if n.op_type == "DequantizeLinear"), None),
            input_q=next((n for n in before if n.op_type == "QuantizeLinear"), None),
        )


def trace_back(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """Follow `value` back through casts and Q/DQ; return where it comes from and the nodes passed on the way."""
    passed: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None and node.op_type in _TRANSPARENT:
        passed.append(node)
        value = node.inputs[0]
    return value, passed


def array_of(value: ir.Value) -> npt.NDArray[np.generic]:
    """The constant's values."""
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def array_shape(value: ir.Value) -> tuple[int, ...]:
    """The constant's shape, without reading its values."""
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def scale_of(node: ir.Node) -> npt.NDArray[np.generic] | None:
    """The scale of a QuantizeLinear or DequantizeLinear node; None where it is computed in the graph."""
    scale, _ = trace_back(node.inputs[1])
    constant = None if scale is None else ir.convenience.get_const_tensor(scale)
    return None if constant is None else np.asarray(constant.numpy())


def _type_name(value: ir.Value) -> str:
    return "unknown" if value.dtype is None else value.dtype.numpy().name
