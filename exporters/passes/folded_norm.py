"""A layer normalization whose scale is multiplied into the root first, as TensorFlow writes it.

    r = γ / √(mean((x − m)²) + ε);   x · r + (β − m · r)   =   (x − m) / √(mean((x − m)²) + ε) · γ + β,   m = mean(x)

`tf.nn.batch_normalization`, which its layer normalization calls, has this form. Without γ, r is the inverse root;
without β, m · r is subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from exporters.passes.normalization import inverse_root, mean_of, mean_square
from exporters.passes.products import made_by, plus_any, product


@dataclass(frozen=True)
class Folded:
    """A layer normalization of `value` over `axes`, counted from the last (−1) on."""

    value: ir.Value
    axes: tuple[int, ...]
    epsilon: float
    scale: ir.Value | None
    bias: ir.Value | None


def folded(node: ir.Node) -> Folded | None:
    """The layer normalization that `node`, an Add or Sub, is the end of; None where it is none."""
    if node.domain or node.op_type not in ("Add", "Sub"):
        return None
    first, second = node.inputs
    pairs = [(first, second)] if node.op_type == "Sub" else [(first, second), (second, first)]
    for scaled, rest in pairs:
        shift = made_by(rest, "Sub")
        bias = None if node.op_type == "Sub" else (shift.inputs[0] if shift is not None else None)
        moved = rest if node.op_type == "Sub" else (shift.inputs[1] if shift is not None else None)
        for x, root in _factors(scaled):
            for mean, other in _factors(moved):
                if other is root and (found := _normalized(x, mean, root, bias)) is not None:
                    return found
    return None


def _factors(value: ir.Value | None) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The two operands of a Mul, in both orders."""
    node = made_by(value, "Mul")
    first, second = (None, None) if node is None else node.inputs
    if first is not None and second is not None:
        yield first, second
        yield second, first


def _normalized(x: ir.Value, mean: ir.Value, root: ir.Value, bias: ir.Value | None) -> Folded | None:
    of = mean_of(mean)
    if of is None or of.value is not x:
        return None
    for inverse, scale in [(root, None), *_factors(root)]:
        variance = inverse_root(inverse)
        if variance is None or (difference := _squared(variance)) is None:
            continue
        found, centered = mean_square(difference, variance), made_by(difference, "Sub")
        if found is not None and centered is not None and found.axes == of.axes and centered.inputs == (x, mean):
            return Folded(x, of.axes, found.epsilon, scale, bias)
    return None


def _squared(variance: ir.Value) -> ir.Value | None:
    """The d of mean(d²) + ε."""
    shifted = plus_any(variance)
    mean = None if shifted is None else mean_of(shifted[0])
    return None if mean is None else next(iter(product(mean.value).factors), None)
