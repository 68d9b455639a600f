"""Fold a batch normalization into the weights of the layer before it.

    BatchNormalization(W·x + b)   →   (s·W)·x + (b − μ)·s + β        s = γ / √(σ² + ε), one for each output channel

The layer is a Conv, ConvTranspose, Gemm or MatMul (arXiv 1502.03167, section 3.1). Zeros of W stay zeros, so 2:4
sparsity is kept. W and what is made of it are read when the graph is written, not before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.derived_tensor import derived_tensor
from exporters.linears import array_shape
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.passes.put_in_place import drop_unused, put_in_place
from exporters.qdq_scales import Array, constant_of, input_at

_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


@dataclass(frozen=True)
class FoldBatchNorm:
    """Fold every batch normalization behind a layer that nothing else reads."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Fold them; what cannot be folded is left alone with the reason."""
        inserter, changed, left = Inserter(model.graph), 0, []
        for node in [node for node in model.graph if node.op_type == "BatchNormalization" and not node.domain]:
            if why := _why_not(node):
                left.append(LeftAlone(node.name or "", why))
                continue
            _fold(node, inserter)
            changed += 1
        if changed:
            drop_unused(model)
        return Outcome("fold batch normalization", changed, tuple(left))


def _why_not(node: ir.Node) -> str:
    layer = None if node.inputs[0] is None else node.inputs[0].producer()
    if node.attributes.get_int("training_mode", 0):
        return "it is in training mode"
    if any(constant_of(value) is None or (value and value.is_graph_input()) for value in node.inputs[1:]):
        return "its parameters are computed in the graph"
    if layer is None or layer.op_type not in _LAYERS or layer.domain:
        return "no linear layer is before it"
    if len(layer.outputs[0].uses()) != 1 or layer.outputs[0].is_graph_output():
        return "something else reads what it normalizes"
    weight = layer.inputs[1]
    if weight is None or not weight.is_initializer() or weight.is_graph_input() or weight.dtype not in _FLOATS:
        return "the weight before it is quantized or computed"
    return _bias_trouble(layer, node) or _axis_trouble(layer, weight)


def _bias_trouble(layer: ir.Node, node: ir.Node) -> str:
    bias = input_at(layer, 2)
    if bias is None:
        return ""
    values, scale = constant_of(bias), constant_of(node.inputs[1])
    if values is None or bias.is_graph_input() or scale is None:
        return "the bias before it is computed in the graph"
    fits = values.size in (1, scale.size) and values.ndim <= 2 and (values.ndim == 0 or values.shape[-1] == values.size)
    return "" if fits else "the bias before it is no number for each channel"


def _axis_trouble(layer: ir.Node, weight: ir.Value) -> str:
    if layer.op_type == "MatMul" and (len(array_shape(weight)) != 2 or _rank(layer.outputs[0]) != 2):
        return "its channels are not the columns of the matrix product before it"
    return ""


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _fold(node: ir.Node, inserter: Inserter) -> None:
    layer = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert layer is not None
    weight, bias = layer.inputs[1], input_at(layer, 2)
    assert weight is not None
    assert weight.dtype is not None
    scale, shift = _scale_and_shift(node, bias, layer.attributes.get_float("beta", 1.0))
    layer.replace_input_with(1, _scaled(layer, weight, scale, inserter))
    name = f"{weight.name}_bias" if bias is None else f"{bias.name}_folded"
    shifted = inserter.initializer(name, shift.astype(weight.dtype.numpy()))
    if layer.op_type == "MatMul":
        put_in_place(inserter, node, "Add", [layer.outputs[0], shifted])
        return
    layer.resize_inputs(3)
    layer.replace_input_with(2, shifted)
    layer.attributes.pop("beta", None)
    name_of_both = node.outputs[0].name
    inserter.replace(node, layer.outputs[0])
    layer.outputs[0].name = name_of_both


def _scale_and_shift(node: ir.Node, bias: ir.Value | None, beta: float) -> tuple[Array, Array]:
    """The factor of each output channel and its new bias, float64."""
    gamma, offset, mean, variance = (np.asarray(constant_of(value), np.float64) for value in node.inputs[1:5])
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    old = np.float64(0) if bias is None else beta * np.asarray(constant_of(bias), np.float64).reshape(-1)
    return scale, (old - mean) * scale + offset


def _scaled(layer: ir.Node, weight: ir.Value, scale: Array, inserter: Inserter) -> ir.Value:
    """The weight times the factor of its output channel, computed when it is read; beside it, if others read it."""
    tensor = weight.const_value
    assert tensor is not None
    shape = array_shape(weight)
    factors = _along_outputs(layer, scale, shape)

    def scaled(values: Array) -> Array:
        wide = np.promote_types(values.dtype, np.float32)
        return np.asarray((values.astype(wide) * factors.astype(wide)).astype(values.dtype))

    if len(weight.uses()) > 1:
        return inserter.lazy_initializer(f"{weight.name}_folded", [weight], scaled, tensor.dtype, shape)
    weight.const_value = derived_tensor([tensor], scaled, tensor.dtype, shape, weight.name)
    return weight


def _along_outputs(layer: ir.Node, scale: Array, shape: tuple[int, ...]) -> Array:
    """The factors so that they broadcast with a weight of `shape`."""
    if layer.op_type == "Conv":
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    if layer.op_type == "ConvTranspose":  # [C, M / groups, …]: the rows of a group make that group's outputs
        groups = layer.attributes.get_int("group", 1)
        rows = np.repeat(scale.reshape(groups, shape[1]), shape[0] // groups, axis=0)
        return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))
    return scale.reshape(-1, 1) if layer.attributes.get_int("transB", 0) else scale.reshape(1, -1)
