"""The layers of a graph whose weight is a constant, whatever stands in between: MatMul, Gemm, Conv, ConvTranspose.

| operator | weight as the operator reads it | K axis | N axis |
|---|---|---|---|
| MatMul, right | [K, N] | 0 | 1 |
| MatMul, left: y = W·x | [N, K] | 1 | 0 |
| Gemm | [K, N] or [N, K] by transB, or by transA on the left | | |
| Conv | [O, I/group, …] | 1 | 0 |
| ConvTranspose | [I, O/group, …] | 0 | 1 |

A weight may be a float initializer or a quantized one; QuantizeLinear, DequantizeLinear, Cast, Transpose and reshapes
may follow it. An activation may come through QuantizeLinear, DequantizeLinear and Cast. `find_linears` looks through
all of these and reads no values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.constant_view import RESHAPES, ConstantView, view_of
from exporters.module_names import label_of

QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_TRANSPARENT = QDQ | {"Cast"}
WEIGHT_PATH = _TRANSPARENT | RESHAPES | {"Transpose", "Identity"}
_GEMMS = ("MatMul", "Gemm")
_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class Linear:
    """One layer that multiplies by a constant weight: y = x·W, a convolution being a GEMM over its patches.

    Attributes:
        node: the operator.
        weight: the stored weight.
        kind: `gemm` or `conv`.
        k_axis: the axis of the stored weight that the GEMM sums over: of a convolution, its input channels.
        n_axis: the axis of the stored weight with the outputs; None where a reshape splits or merges it.
        k: length of the reduction: of a convolution, I/group times the kernel's size.
        n: number of outputs.
        group: groups of a convolution, each of n/group outputs; 1 for a GEMM.
        activation_input: index of the operator's other input.
        weight_dq: what dequantizes the weight.
        input_q: what quantizes the activation.
    """

    node: ir.Node
    weight: ir.Value
    kind: Literal["gemm", "conv"]
    k_axis: int
    n_axis: int | None
    k: int
    n: int
    group: int
    activation_input: int
    weight_dq: ir.Node | None
    input_q: ir.Node | None

    @property
    def module(self) -> str:
        """The module's name, or the node's where the exporter kept none."""
        return label_of(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stored weight."""
        return array_shape(self.weight)

    @property
    def values(self) -> npt.NDArray[np.generic]:
        """The stored weight, quantized or not; its data is read here, and mapped where it is external."""
        return array_of(self.weight)

    @property
    def weight_type(self) -> str:
        """The type of the weight that the compiler sees: of the stored values."""
        return type_name(self.weight)

    @property
    def activation_type(self) -> str:
        """The type that the GEMM can read: that of the quantizer ahead of it, else the type of the tensor."""
        if self.input_q is not None:
            kind = self.input_q.outputs[0].dtype
            return "float8_e4m3fn" if kind == ir.DataType.FLOAT8E4M3FN else "int8"
        activation = self.node.inputs[self.activation_input]
        assert activation is not None
        return type_name(activation)

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


@dataclass(frozen=True)
class Untraced:
    """A layer with a constant weight that `find_linears` leaves out, and why."""

    node: ir.Node
    why: str

    @property
    def module(self) -> str:
        """The module's name, or the node's where the exporter kept none."""
        return label_of(self.node)


def find_linears(graph: ir.Graph) -> Iterator[Linear]:
    """Yield the layers of `graph` with a constant weight, GEMMs and convolutions, in its order."""
    return (found for found in _weighted(graph) if isinstance(found, Linear))


def find_untraced(graph: ir.Graph) -> Iterator[Untraced]:
    """Yield the layers of `graph` whose weight is a constant but whose K is no axis of it."""
    return (found for found in _weighted(graph) if isinstance(found, Untraced))


def _weighted(graph: ir.Graph) -> Iterator[Linear | Untraced]:
    for node in graph:
        if node.domain or node.op_type not in _GEMMS + _CONVOLUTIONS:
            continue
        for weight_input in (1, 0) if node.op_type in _GEMMS else (1,):
            found = _layer(node, weight_input)
            if found is not None:
                yield found
                break


def _layer(node: ir.Node, weight_input: int) -> Linear | Untraced | None:
    """The layer that `node` is if its input `weight_input` is a weight; None where it is none."""
    weight, through = trace_weight(node.inputs[weight_input])
    activation, before = trace_back(node.inputs[1 - weight_input])
    if weight is None or not weight.is_initializer() or activation is None or activation.is_initializer():
        return None
    view = view_of(array_shape(weight), through[::-1])
    if view is None:
        return Untraced(node, "the shape in which it reads its weight is not known")
    if 0 in view.shape:
        return Untraced(node, "its weight is empty")
    reading = _reading(node, weight_input, view)
    if reading is None or isinstance(reading, str):
        return None if reading is None else Untraced(node, reading)
    k_axis = view.axes[reading.k_axis]
    if k_axis is None:
        return Untraced(node, "a reshape of its weight splits or merges K")
    return Linear(
        node=node,
        weight=weight,
        kind="conv" if node.op_type in _CONVOLUTIONS else "gemm",
        k_axis=k_axis,
        n_axis=view.axes[reading.n_axis],
        k=reading.k,
        n=reading.n,
        group=reading.group,
        activation_input=1 - weight_input,
        weight_dq=next((n for n in through if n.op_type == "DequantizeLinear"), None),
        input_q=next((n for n in before if n.op_type == "QuantizeLinear"), None),
    )


@dataclass(frozen=True)
class _Reading:
    """How an operator reads its weight: axes of the weight as it sees it, and the lengths of its GEMM."""

    k_axis: int
    n_axis: int
    k: int
    n: int
    group: int = 1


def _reading(node: ir.Node, weight_input: int, view: ConstantView) -> _Reading | str | None:
    """How `node` reads a weight of `view`; a sentence where it cannot be told, None where it is no weight."""
    shape = view.shape
    if node.op_type in _CONVOLUTIONS:
        return _convolution(node, shape) if len(shape) > 2 else None
    if len(shape) < 2 or (node.op_type == "Gemm" and len(shape) != 2):
        return None
    if prod(shape[:-2]) != 1:
        return f"its weight is a stack of {prod(shape[:-2])} matrices"
    if weight_input == 0 and 1 in shape[-2:]:
        return None  # an outer product or a weighted sum, such as rotary frequencies: no layer
    transposed = bool(node.attributes.get_int("transB" if weight_input else "transA", 0))
    k_axis = len(shape) - 2 + (transposed if weight_input else not transposed)
    n_axis = 2 * len(shape) - 3 - k_axis
    return _Reading(k_axis, n_axis, k=shape[k_axis], n=shape[n_axis])


def _convolution(node: ir.Node, shape: tuple[int, ...]) -> _Reading:
    group = max(node.attributes.get_int("group", 1), 1)
    if node.op_type == "Conv":
        return _Reading(1, 0, k=prod(shape[1:]), n=shape[0], group=group)
    return _Reading(0, 1, k=shape[0] // group * prod(shape[2:]), n=shape[1] * group, group=group)


def trace_back(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """Follow `value` back through casts and Q/DQ; return where it comes from and the nodes passed on the way."""
    return _trace(value, _TRANSPARENT)


def trace_weight(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """Follow `value` back through transposes and reshapes as well."""
    return _trace(value, WEIGHT_PATH)


def _trace(value: ir.Value | None, through: frozenset[str]) -> tuple[ir.Value | None, list[ir.Node]]:
    passed: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None and node.op_type in through:
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


def type_name(value: ir.Value) -> str:
    """The type as numpy calls it; "unknown" where it is not declared."""
    return "unknown" if value.dtype is None else value.dtype.numpy().name
