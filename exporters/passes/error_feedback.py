"""Round each weight so that the error of its products on samples is small, and not that of its values: GPTQ.

    W ─► FakeQuantize s ─► MatMul          →   Q ─► FakeQuantize s ─► MatMul           Q / s are integers already

The scales stay as they were placed, so only how values are rounded changes; calibration/error_feedback.py has the
arithmetic (arXiv 2210.17323). What pruning set to zero stays zero: a 2:4 weight is one after it, too. A layer keeps
plain rounding where feedback does not lower the error on the samples. Weights with trained scales are Q/DQ by now, and
stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.error_feedback import Rounded, round_with_feedback
from calibration.hessians import Product, measure_hessians
from calibration.probes import Feed
from exporters.float_twin import float_twin, is_fake_quantizer
from exporters.linears import Linear, array_of, find_linears
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.passes.placement_rules import activation
from exporters.quantizer import spread

Float = npt.NDArray[np.float32]
_WINDOW = ("strides", "pads", "dilations", "auto_pad")


@dataclass(frozen=True)
class ErrorFeedback:
    """Round the weights that got a quantizer.

    Attributes:
        feed: the samples.
        memory_mib: what the matrices of one run take; more layers than fit are done in several runs.
    """

    feed: Feed
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
            found = _round(layer, quantizers[layer.weight.name], hessian)
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


def _round(linear: Linear, quantizer: ir.Node, hessian: Float) -> Change | LeftAlone:
    """Put the rounded weight in its place, unless that is no gain."""
    weight, scale = quantizer.inputs[:2]
    assert weight is not None
    assert weight.const_value is not None
    assert scale is not None
    values = array_of(weight).astype(np.float32)
    axis, block = quantizer.attributes.get_int("axis", 0), quantizer.attributes.get_int("block_size", 0)
    each = array_of(scale).astype(np.float32)
    spreaded = spread(each, values.shape, axis, block or None) if each.ndim else each
    scales = np.broadcast_to(spreaded, values.shape)
    limits = quantizer.attributes["low"].as_int(), quantizer.attributes["high"].as_int()
    parts = [
        round_with_feedback(w, h, s, *limits)
        for w, h, s in zip(_by_groups(linear, values), hessian, _by_groups(linear, scales), strict=True)
    ]
    error, plain = sum(part.error for part in parts), sum(part.plain_error for part in parts)
    if not error < plain:
        return LeftAlone(linear.module, "feedback does not lower its error on the samples")
    tensor = weight.const_value
    rounded = _stored(linear, parts, values.shape).astype(tensor.dtype.numpy())
    weight.const_value = ir.tensor(rounded, dtype=tensor.dtype, name=tensor.name)
    return Change(linear.module, f"squared error of its products × {error / plain:.2g}")


def _by_groups(linear: Linear, values: Float) -> Float:
    """[groups, K, N], K as the patches have it."""
    if linear.kind == "gemm":
        assert linear.n_axis is not None
        return np.moveaxis(values, (linear.k_axis, linear.n_axis), (0, 1)).reshape(1, linear.k, linear.n)
    return values.reshape(linear.group, -1, prod(values.shape[1:])).transpose(0, 2, 1)


def _stored(linear: Linear, parts: list[Rounded], shape: tuple[int, ...]) -> Float:
    """The inverse of `_by_groups`."""
    found = np.stack([part.values for part in parts])
    if linear.kind == "conv":
        return found.transpose(0, 2, 1).reshape(shape)
    assert linear.n_axis is not None
    moved = np.moveaxis(np.empty(shape, np.float32), (linear.k_axis, linear.n_axis), (0, 1))
    return np.ascontiguousarray(np.moveaxis(found.reshape(moved.shape), (0, 1), (linear.k_axis, linear.n_axis)))


def _quantizes_weight(node: ir.Node) -> bool:
    return is_fake_quantizer(node) and node.inputs[0] is not None and node.inputs[0].is_initializer()
