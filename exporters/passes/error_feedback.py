"""Round each weight so that the error of its products on samples is small, and not that of its values: GPTQ.

    W ─► FakeQuantize s ─► MatMul          →   Q ─► FakeQuantize s ─► MatMul           Q / s are integers already

calibration/error_feedback.py has the arithmetic (arXiv 2210.17323). First each scale becomes the one with the least
squared error, each error counting for the mean square of what the value is multiplied by, the diagonal of XᵀX. What
pruning set to zero stays zero: a 2:4 weight is one after it, too. A layer keeps its scales and plain rounding where
that does not lower the error on the samples. Weights with trained scales are Q/DQ by now, and stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.error_feedback import plain_error, round_with_feedback
from calibration.hessians import Product, measure_hessians
from calibration.probes import Feed
from calibration.weight_scales import weight_amax
from exporters.float_twin import float_twin, is_fake_quantizer
from exporters.linears import Linear, array_of, find_linears
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.passes.place_quantizers import storable_scale
from exporters.passes.placement_rules import activation
from exporters.quantizer import spread
from profiles.device import FloatType

Float = npt.NDArray[np.float32]
_WINDOW = ("strides", "pads", "dilations", "auto_pad")


@dataclass(frozen=True)
class ErrorFeedback:
    """Round the weights that got a quantizer.

    Attributes:
        feed: the samples.
        float_type: what a scale has to be a number of.
        memory_mib: what the matrices of one run take; more layers than fit are done in several runs.
    """

    feed: Feed
    float_type: FloatType = "float32"
    memory_mib: int = 1024

    def __call__(self, model: ir.Model) -> Outcome:
        """Round them; what is left alone is told with the reason.

        Raises:
            GpusqError: an input has no samples.
        """
        twin = float_twin(model)
        quantizers = {node.inputs[0].name: node for node in model.graph if _quantizes_weight(node) and node.inputs[0]}
        left: list[LeftAlone] = []
        layers = list(_layers(twin.graph, set(quantizers), left))
        products = [_product(layer) for layer in layers]
        changes = []
        for index, hessian in measure_hessians(twin, products, self.feed, memory_mib=self.memory_mib):
            layer = layers[index]
            found = _round(layer, quantizers[layer.weight.name], hessian, self.float_type)
            if isinstance(found, Change):
                changes.append(found)
            else:
                left.append(found)
        return Outcome("round with error feedback", len(changes), tuple(left), tuple(changes))


def _layers(graph: ir.Graph, quantized: set[str | None], left: list[LeftAlone]) -> Iterator[Linear]:
    seen: set[ir.Value] = set()
    for linear in find_linears(graph):
        why = _why_not(linear, quantized, seen)
        seen.add(linear.weight)
        if why:
            left.append(LeftAlone(linear.module, why))
        else:
            yield linear


def _why_not(linear: Linear, quantized: set[str | None], seen: set[ir.Value]) -> str:
    if linear.weight_dq is not None:
        return "it has trained scales"
    if linear.weight.name not in quantized:
        return "its weight is not quantized"
    if linear.node.op_type == "ConvTranspose":
        return "it is a transposed convolution"
    if linear.kind == "conv" and linear.node.inputs[1] is not linear.weight:
        return "its weight is not stored as the operator reads it"
    if linear.n_axis is None or activation(linear).shape is None:
        return "its weight is reshaped, or the shape of its input is not known"
    return "another layer reads its weight as well" if linear.weight in seen or len(linear.weight.uses()) > 1 else ""


def _product(linear: Linear) -> Product:
    tensor = str(activation(linear).name)
    if linear.kind == "gemm":
        transposed = linear.node.op_type == "Gemm" and linear.node.attributes.get_int("transA", 0) == 1
        return Product(tensor, linear.k, -1 if (linear.activation_input == 0) != transposed else -2)
    attributes = linear.node.attributes
    window = {name: attributes[name].value for name in _WINDOW if name in attributes}
    return Product(tensor, linear.k, kernel=linear.shape[2:], groups=linear.group, window=window)


def _round(linear: Linear, quantizer: ir.Node, hessian: Float, float_type: FloatType) -> Change | LeftAlone:
    """Put the rounded weight and its scale in their place, unless that is no gain."""
    weight, scale = quantizer.inputs[:2]
    assert weight is not None
    assert weight.const_value is not None
    assert scale is not None
    values = array_of(weight).astype(np.float32)
    placed, fitted = array_of(scale).astype(np.float32), _fitted(linear, quantizer, values, hessian, float_type)
    limits = quantizer.attributes["low"].as_int(), quantizer.attributes["high"].as_int()
    groups, before, after = (
        _by_groups(linear, x) for x in (values, _spread(quantizer, placed, values), _spread(quantizer, fitted, values))
    )
    parts = [round_with_feedback(w, h, s, *limits) for w, h, s in zip(groups, hessian, after, strict=True)]
    plain = sum(plain_error(w, h, s, *limits) for w, h, s in zip(groups, hessian, before, strict=True))
    error = sum(part.error for part in parts)
    if not error < plain:
        return LeftAlone(linear.module, "feedback does not lower its error on the samples")
    _put(weight, _stored(linear, np.stack([part.values for part in parts]), values.shape))
    _put(scale, fitted)
    return Change(linear.module, f"squared error of its products × {error / plain:.2g}")


def _fitted(linear: Linear, quantizer: ir.Node, values: Float, hessian: Float, float_type: FloatType) -> Float:
    """The scales of the quantizer with the least error on the samples, rounding each value by itself."""
    low, high = (quantizer.attributes[name].as_int() for name in ("low", "high"))
    axis = quantizer.attributes["axis"].as_int() if "axis" in quantizer.attributes else None
    diagonal = np.diagonal(hessian, axis1=1, axis2=2)[:, :, None]  # [groups, K, 1]
    counts = _stored(linear, np.broadcast_to(diagonal, _by_groups(linear, values).shape), values.shape)
    block = quantizer.attributes.get_int("block_size", 0)
    amax = weight_amax(values, axis, block, low=low, high=high, method="mse", importance=counts)
    return storable_scale(amax, high, float_type, linear.module)


def _spread(quantizer: ir.Node, scale: Float, values: Float) -> Float:
    """The scales, one for each value."""
    axis, block = quantizer.attributes.get_int("axis", 0), quantizer.attributes.get_int("block_size", 0)
    return np.broadcast_to(spread(scale, values.shape, axis, block or None) if scale.ndim else scale, values.shape)


def _put(value: ir.Value, array: Float) -> None:
    assert value.const_value is not None
    dtype, name = value.const_value.dtype, value.const_value.name
    value.const_value = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)


def _by_groups(linear: Linear, values: Float) -> Float:
    """[groups, K, N], K as the patches have it."""
    if linear.kind == "gemm":
        assert linear.n_axis is not None
        return np.moveaxis(values, (linear.k_axis, linear.n_axis), (0, 1)).reshape(1, linear.k, linear.n)
    return values.reshape(linear.group, -1, prod(values.shape[1:])).transpose(0, 2, 1)


def _stored(linear: Linear, groups: Float, shape: tuple[int, ...]) -> Float:
    """The inverse of `_by_groups`."""
    if linear.kind == "conv":
        return groups.transpose(0, 2, 1).reshape(shape)
    assert linear.n_axis is not None
    moved = np.moveaxis(np.empty(shape, np.float32), (linear.k_axis, linear.n_axis), (0, 1))
    return np.ascontiguousarray(np.moveaxis(groups.reshape(moved.shape), (0, 1), (linear.k_axis, linear.n_axis)))


def _quantizes_weight(node: ir.Node) -> bool:
    return is_fake_quantizer(node) and node.inputs[0] is not None and node.inputs[0].is_initializer()
