"""Tensors whose channels can be divided by factors where they are made and multiplied where they are read.

    LayerNorm(γ, β) ─► x ─► MatMul W               →   LayerNorm(γ/s, β/s) ─► x/s ─► MatMul s·W
    Conv(V, b) ─► ReLU ─► x ─► Conv W              →   Conv(V/s, b/s) ─► ReLU ─► x/s ─► Conv s·W
    Conv V ─► x ─┬─► Conv W ─► … ─► Conv U ─► Add  →   V/s, s·W, U/s: all that is added up has the same factors
                 └───────────────────────────► Add

From a tensor that a layer reads the group grows both ways through operators f with f(x/s) = f(x)/s for s > 0: ReLU,
pooling, sums, adding a constant (which is divided as well), and products, one side of which takes the factors. A Clip
from 0 is one of them as long as nothing reaches its upper bound. It ends at layers and at constants of a normalization;
where it comes to anything else, no tensor of it can be scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.derived_tensor import derived_tensor, release
from exporters.linears import WEIGHT_PATH, Linear, array_shape, find_linears
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import LeftAlone
from exporters.passes.placement_rules import activation
from exporters.passes.products import scalar
from exporters.qdq_scales import input_at

Kind = Literal["gemm", "conv"]
Float = npt.NDArray[np.float32]
_NORMALIZATIONS = frozenset({"LayerNormalization", "RMSNormalization"})
_SCALES_WITH_ITS_INPUT = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Clip"})


@dataclass
class Group:
    """Tensors whose channels share their factors.

    Attributes:
        axis: of the channels, 1 or −1.
        count: how many channels there are.
        readers: the layers whose weights are multiplied, by what they read.
        layers: the layers whose outputs are divided.
        constants: the node and the input of each constant that is divided: scales, biases.
        ceilings: the upper bound of each Clip, by its output.
        why: what keeps it from being scaled.
    """

    axis: int
    count: int
    readers: dict[ir.Value, list[Linear]] = field(default_factory=dict)
    layers: list[Linear] = field(default_factory=list)
    constants: list[tuple[ir.Node, int]] = field(default_factory=list)
    ceilings: dict[ir.Value, float] = field(default_factory=dict)
    why: str = ""

    @property
    def modules(self) -> list[str]:
        """The names of the layers that read it."""
        return [reader.module for readers in self.readers.values() for reader in readers]

    @property
    def measured(self) -> dict[str, int]:
        """The tensors whose channels have to be known, with their axis."""
        return {str(value.name): self.axis for value in (*self.readers, *self.ceilings)}


def find_groups(
    graph: ir.Graph, kind: Kind, not_quantized: Callable[[Linear], str], left: list[LeftAlone]
) -> Iterator[Group]:
    """Yield the groups whose readers are of `kind` and get quantizers; the others go to `left` with the reason."""
    linears = {linear.node: linear for linear in find_linears(graph)}
    seen: set[ir.Value] = set()
    for linear in linears.values():
        if linear.kind != kind or activation(linear) in seen:
            continue
        group = _Growth(linears, kind, not_quantized).group_of(activation(linear), linear, seen)
        if group.why:
            left += [LeftAlone(module, group.why) for module in group.modules]
        else:
            yield group


def scale_group(group: Group, s: Float, inserter: Inserter) -> None:
    """Divide the channels by `s` [C] where they are made, and multiply the weights that read them by it."""
    for reader in (reader for readers in group.readers.values() for reader in readers):
        _multiply(reader.weight, _along_inputs(reader, s))
    for layer in group.layers:
        assert layer.n_axis is not None
        _multiply(
            layer.weight, (1 / s).reshape([-1 if axis == layer.n_axis else 1 for axis in range(len(layer.shape))])
        )
    for node, index in group.constants:
        _divide_constant(node, index, s, inserter)


@dataclass(frozen=True)
class _Growth:
    """Grows one group at a time."""

    linears: Mapping[ir.Node, Linear]
    kind: Kind
    not_quantized: Callable[[Linear], str]

    def group_of(self, start: ir.Value, first: Linear, seen: set[ir.Value]) -> Group:
        """The group of what `first` reads; its tensors are added to `seen`."""
        group = Group(-1, first.k) if self.kind == "gemm" else Group(1, _channels(first))
        todo = [start]
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            if value.is_graph_output():
                group.why = group.why or "the graph answers it"
            todo += self._made(group, value)
            for use in value.uses():
                todo += self._read(group, value, use.node, use.idx)
        if any(value.shape is None for value in (*group.readers, *group.ceilings)):
            group.why = group.why or "its shape is not known"
        return group

    def _made(self, group: Group, value: ir.Value) -> list[ir.Value]:
        """Take in what makes `value`; return the other tensors that get the same factors then."""
        node = value.producer()
        if node is None or node.domain:
            return _refuse(group, "an input of the graph takes no factors" if node is None else _no_factors(node))
        if node in self.linears:
            group.why = group.why or _unfit_maker(self.linears[node], group)
            group.layers.append(self.linears[node])
            group.constants += [(node, 2)] if input_at(node, 2) is not None else []
            return []
        if node.op_type in _NORMALIZATIONS:
            return _take_constants(group, node)
        if node.op_type in ("Add", "Mul"):
            return self._arithmetic(group, node)
        if node.op_type not in _SCALES_WITH_ITS_INPUT or node.inputs[0] is None:
            return _refuse(group, _no_factors(node))
        if node.op_type == "Clip":
            _take_clip(group, node)
        return [node.inputs[0]]

    def _arithmetic(self, group: Group, node: ir.Node) -> list[ir.Value]:
        """A sum of tensors, all of which take the factors; a product, one side of which does; a constant of either."""
        inputs = [value for value in node.inputs if value is not None]
        for index, value in enumerate(inputs):
            if _is_channels(value, group):
                group.constants.append((node, index))
                return [] if node.op_type == "Mul" else [inputs[1 - index]]
        if any(value.is_initializer() for value in inputs):
            return _refuse(group, _no_factors(node))
        if node.op_type == "Add":
            return inputs
        return [next((value for value in inputs if value.producer() in self.linears), inputs[0])]

    def _read(self, group: Group, value: ir.Value, node: ir.Node, index: int) -> list[ir.Value]:
        """Take in what reads `value`; return the other tensors that get the same factors then."""
        linear = self.linears.get(node)
        if linear is not None:
            group.why = group.why or self._unfit_reader(linear, index, group)
            group.readers.setdefault(value, []).append(linear)
            return []
        other = node.inputs[1 - index] if node.op_type in ("Add", "Mul") and not node.domain else None
        if node.domain or (node.op_type not in _SCALES_WITH_ITS_INPUT and other is None):
            return _refuse(group, f"{node.op_type} reads it as well")
        if node.op_type == "Add" and other is not None and other.is_initializer() and not _is_channels(other, group):
            return _refuse(group, f"{node.op_type} reads it as well")
        return [node.outputs[0]]

    def _unfit_reader(self, linear: Linear, index: int, group: Group) -> str:
        """Why a weight cannot be multiplied; "" if it can."""
        if linear.weight_dq is not None or linear.input_q is not None:
            return "a layer that reads it has trained scales"
        if linear.kind != self.kind or index != 0 or linear.activation_input != 0:
            return "a layer reads it otherwise"
        if (linear.k if self.kind == "gemm" else _channels(linear)) != group.count:
            return "a layer reads it in another shape"
        if self.kind == "conv" and linear.node.inputs[1] is not linear.weight:
            return "its weight is not stored as the operator reads it"
        return self.not_quantized(linear) or _shared(linear)


def _refuse(group: Group, why: str) -> list[ir.Value]:
    group.why = group.why or why
    return []


def _no_factors(node: ir.Node) -> str:
    return f"{node.op_type} before it takes no factors"


def _unfit_maker(layer: Linear, group: Group) -> str:
    if layer.weight_dq is not None or layer.input_q is not None:
        return "the layer before it has trained scales"
    kind = "gemm" if group.axis == -1 else "conv"
    if layer.kind != kind or layer.node.op_type == "ConvTranspose" or layer.activation_input != 0:
        return _no_factors(layer.node)
    if layer.n_axis is None or layer.n != group.count:
        return "the weight before it is reshaped"
    bias = input_at(layer.node, 2)
    if bias is not None and (not _is_constant(bias) or array_shape(bias) != (layer.n,)):
        return "the bias before it is no constant for each output"
    return _shared(layer)


def _shared(layer: Linear) -> str:
    return "" if _is_alone(layer.weight, layer.node) else "another layer reads its weight as well"


def _take_constants(group: Group, node: ir.Node) -> list[ir.Value]:
    """The scale and the bias of a normalization over the last axis."""
    found = [(node, index) for index in (1, 2) if input_at(node, index) is not None]
    if not found or not all(_is_channels(node.inputs[index], group) for _, index in found):
        return _refuse(group, "the normalization before it is over several axes")
    group.constants += found
    return []


def _take_clip(group: Group, node: ir.Node) -> None:
    low, high = (scalar(input_at(node, index)) for index in (1, 2))
    if low != 0:
        group.why = group.why or "the Clip before it does not start at 0"
    elif high is not None:
        group.ceilings[node.outputs[0]] = high


def _is_channels(value: ir.Value | None, group: Group) -> bool:
    """Whether a value is a constant with one number for each channel, along their axis."""
    if value is None or not _is_constant(value):
        return False
    shape = array_shape(value)
    if group.axis == -1:
        return shape[-1:] == (group.count,) and all(length == 1 for length in shape[:-1])
    return len(shape) >= 3 and shape[-3] == group.count and int(np.prod(shape)) == group.count


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def _is_alone(weight: ir.Value, node: ir.Node) -> bool:
    """Whether `node` is all that reads a weight, on whatever way."""
    value = weight
    while len(value.uses()) == 1 and not value.is_graph_output() and not value.is_graph_input():
        (use,) = value.uses()
        if use.node is node:
            return True
        if use.node.op_type not in WEIGHT_PATH:
            return False
        value = use.node.outputs[0]
    return False


def _channels(conv: Linear) -> int:
    return conv.shape[conv.k_axis] * (conv.group if conv.node.op_type == "Conv" else 1)


def _along_inputs(layer: Linear, s: Float) -> Float:
    """The factors of the channels that a layer reads, so that they broadcast with its stored weight."""
    shape = layer.shape
    if layer.node.op_type != "Conv":
        return s.reshape([-1 if axis == layer.k_axis else 1 for axis in range(len(shape))])
    groups = layer.group
    rows = np.broadcast_to(s.reshape(groups, 1, shape[1]), (groups, shape[0] // groups, shape[1]))
    return rows.reshape(*shape[:2], *[1] * (len(shape) - 2))


def _multiply(weight: ir.Value, factors: npt.NDArray[np.floating]) -> None:
    tensor = weight.const_value
    assert tensor is not None
    shape = array_shape(weight)

    def scaled(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return np.asarray((values.astype(np.float32, copy=False) * factors).astype(values.dtype))

    weight.const_value = derived_tensor([tensor], scaled, tensor.dtype, shape, weight.name)


def _divide_constant(node: ir.Node, index: int, s: Float, inserter: Inserter) -> None:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    array = np.asarray(value.const_value.numpy())
    release(value.const_value)
    divided = (array.astype(np.float32) / s.reshape([-1 if length == s.size else 1 for length in array.shape])).astype(
        array.dtype
    )
    node.replace_input_with(index, inserter.initializer(f"{value.name}_scaled", divided))
