"""Let the weight of an answering layer take over its bias, where the layer reads a layer normalization.

    LayerNorm(γ, β) ─► W·x + b        →        LayerNorm(γ, β + s·γ) ─► W'·x

    W' = W + u ⊗ 1/γ,    u = (b − s·W·γ) / (Σ β/γ + K·s)

A normalized x̂ sums to 0, so Σ (γ·x̂ + β + s·γ)ᵢ / γᵢ = Σ β/γ + K·s whatever x is: adding u ⊗ 1/γ to the weight adds u
times that number to each output, the bias and what the shift s brings. s = ±1/8, with the sign of Σ β/γ, keeps the
number away from 0; K being hundreds, the weight changes little, and a normalized value of 4 or more has room for 1/8.
In float nothing changes but the rounding. What averages the rows or selects some of them may stand in between.

Behind an INT8 GEMM a bias is a kernel of its own (`exporters.answering_layer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.answering_layer import answering_layers, bias_of, one_scale_is_enough, remove_bias
from exporters.derived_tensor import release
from exporters.linears import Linear
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.passes.placement_rules import activation, kept_float, too_small
from exporters.qdq_scales import constant_of, input_at
from exporters.sparsity import sparsity_of

_SHIFT = 0.125
_MOVES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Gather", "Slice", "ReduceMean"})
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class AbsorbBias:
    """Absorb the biases of the layers that will be quantized and whose product the graph answers."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Absorb them; each that stays is told with the reason."""
        inserter, kept = Inserter(model.graph), kept_float(model.graph)
        changes: list[Change] = []
        left: list[LeftAlone] = []
        for linear in list(answering_layers(model.graph)):
            if linear.weight_dq is not None or bias_of(linear) is None or linear.module in kept or too_small(linear):
                continue
            norm = _normalization(linear)
            if why := _why_not(linear, norm):
                left.append(LeftAlone(linear.module, why))
                continue
            assert norm is not None
            _absorb(linear, norm, inserter)
            changes.append(Change(linear.module, "its bias became a part of its weight"))
        if changes:
            drop_unused_initializers(model.graph)
        return Outcome("absorb biases", len(changes), tuple(left), tuple(changes))


def _normalization(linear: Linear) -> ir.Node | None:
    """The layer normalization whose result, or a selection or mean of whose rows, nothing but the layer reads."""
    value: ir.Value | None = activation(linear)
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None or node.domain:
            return None
        if node.op_type == "LayerNormalization":
            axis = node.attributes.get_int("axis", -1)
            return node if value.shape is not None and axis in (-1, len(value.shape) - 1) else None
        if not _keeps_channels(node, linear.k):
            return None
        value = node.inputs[0]
    return None


def _keeps_channels(node: ir.Node, length: int) -> bool:
    """Whether the last axis of what `node` gives is the last of what it reads, each value or a mean of some."""
    x, y = node.inputs[0], node.outputs[0]
    if node.op_type not in _MOVES or x is None or x.shape is None or y.shape is None or len(x.shape) < 2:
        return False
    if node.op_type == "Gather":
        axes = [node.attributes.get_int("axis", 0)]
    elif node.op_type in ("Slice", "ReduceMean"):
        given = constant_of(input_at(node, 3 if node.op_type == "Slice" else 1))
        axes = [-1] if given is None else [int(axis) for axis in given]  # left out, they may be all
    else:
        axes = []
    last = {-1, len(x.shape) - 1}
    return not last.intersection(axes) and len(y.shape) > 1 and x.shape[-1] == y.shape[-1] == length


def _why_not(linear: Linear, norm: ir.Node | None) -> str:
    bias = bias_of(linear)
    assert bias is not None
    if norm is None:
        return "behind its INT8 GEMM the bias is a kernel: it reads no layer normalization, whose weight could take it"
    if linear.node.inputs[1] is not linear.weight or len(linear.shape) != 2:
        return "its weight is not stored as the layer reads it"
    attributes = linear.node.attributes
    if {attributes.get_float(name, 1.0) for name in ("alpha", "beta")} != {1.0} or attributes.get_int("transA", False):
        return "its product or its bias is multiplied by a number"
    constants = [constant_of(value) for value in (bias, *norm.inputs[1:])]
    lengths = (linear.n, linear.k, linear.k)
    if any(one is None or one.shape != (length,) for one, length in zip(constants, lengths, strict=False)):
        return "its bias or its normalization's is no constant for each channel"
    if sparsity_of(linear, None).pattern != "dense":
        return "its weight is sparse, and would not be with the bias in it"
    changed = _weight(linear)(linear.values, *_constants(linear, norm))
    release(linear.weight.const_value)
    return "" if one_scale_is_enough(changed) else "with the bias in it one scale is not enough for its weight"


def _constants(linear: Linear, norm: ir.Node) -> Iterator[Array]:
    """γ and β of the normalization, and the bias; float64."""
    gamma, beta, bias = (constant_of(value) for value in (norm.inputs[1], input_at(norm, 2), bias_of(linear)))
    assert gamma is not None
    assert bias is not None
    yield gamma.astype(np.float64)
    yield np.zeros(len(gamma)) if beta is None else beta.astype(np.float64)
    yield bias.astype(np.float64)


def _shift(gamma: Array, beta: Array) -> tuple[float, float]:
    """s, and Σ β/γ + K·s; NaN where γ has a 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        total = float((beta / gamma).sum())
    shift = float(np.copysign(_SHIFT, total))
    return shift, total + len(gamma) * shift


def _weight(linear: Linear) -> Callable[[Array, Array, Array, Array], Array]:
    """Makes W' of W as it is stored, γ, β and b."""
    outputs_first = linear.n_axis == 0

    def changed(w: Array, gamma: Array, beta: Array, bias: Array) -> Array:
        shift, total = _shift(gamma, beta)
        with np.errstate(divide="ignore", invalid="ignore"):
            u = (bias - shift * ((w if outputs_first else w.T) @ gamma)) / total
            change = np.outer(u, 1 / gamma) if outputs_first else np.outer(1 / gamma, u)
        return np.asarray(w + change, w.dtype)

    return changed


def _absorb(linear: Linear, norm: ir.Node, inserter: Inserter) -> None:
    gamma, beta, bias = _constants(linear, norm)
    weight, compute = linear.weight, _weight(linear)
    assert weight.dtype is not None
    assert weight.name is not None

    def changed(w: Array) -> Array:
        return compute(w, gamma, beta, bias)

    new = inserter.lazy_initializer(f"{weight.name}_with_bias", [weight], changed, weight.dtype, linear.shape)
    linear.node.replace_input_with(1, new)
    shifted = (beta + _shift(gamma, beta)[0] * gamma).astype(weight.dtype.numpy())
    norm.resize_inputs(3)
    norm.replace_input_with(2, inserter.initializer(f"{norm.name}.shifted_bias", shifted))
    remove_bias(linear)
