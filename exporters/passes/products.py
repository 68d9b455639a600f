"""Arithmetic as it is meant, whatever order and operators it was written in.

    Mul(Mul(x, 0.5), e) · Mul(x, Mul(e, 0.5)) · Div(Mul(x, e), 2)       all are the product  0.5 · x · e

A product goes through Mul, Neg, Div by a constant and Pow by a small whole number. It stops at a value that is read
more than once: that one is named by the formula, such as the x in x · sigmoid(x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.qdq_scales import constant_of, input_at

_LARGEST_POWER = 4
_CLOSE = 1e-5  # what the constants of float32 graphs are rounded to when they are written with six digits


@dataclass(frozen=True)
class Product:
    """`constant` times all of `factors`; a factor that is squared is there twice."""

    constant: float
    factors: tuple[ir.Value, ...]

    def without(self, value: ir.Value) -> tuple[ir.Value, ...] | None:
        """The factors but one occurrence of `value`; None where it is none of them."""
        if value not in self.factors:
            return None
        index = self.factors.index(value)
        return self.factors[:index] + self.factors[index + 1 :]


def product(value: ir.Value) -> Product:
    """What `value` is the product of; of itself alone where no operator above applies."""
    node = value.producer()
    if node is None or node.domain:
        return _term(value)
    operands = [operand for operand in node.inputs if operand is not None]
    if node.op_type == "Mul":
        return _times(_part(operands[0]), _part(operands[1]))
    if node.op_type == "Neg":
        return _times(Product(-1.0, ()), _part(operands[0]))
    divisor = scalar(input_at(node, 1))
    if node.op_type == "Div" and divisor:
        return _times(Product(1 / divisor, ()), _part(operands[0]))
    if node.op_type == "Pow" and divisor in range(1, _LARGEST_POWER + 1):
        return _power(operands[0], int(divisor or 0))
    return _term(value)


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of the standard domain that makes `value`, if it is of this type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and not node.domain else None


def plus(value: ir.Value | None, constant: float) -> ir.Value | None:
    """The y of `value` = y + constant; None where it is nothing like it."""
    found = plus_any(value)
    return found[0] if found is not None and close(found[1], constant, found[0]) else None


def plus_any(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """The y and the scalar constant of `value` = y + constant, in either order."""
    node = made_by(value, "Add")
    if node is None:
        return None
    for operand, other in (node.inputs, node.inputs[::-1]):
        constant = scalar(other)
        if operand is not None and constant is not None and scalar(operand) is None:
            return operand, constant
    return None


def scalar(value: ir.Value | None) -> float | None:
    """The only element of a constant of at most one axis, which raises no rank; None for anything else, unread."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1 or len(tensor.shape) > 1 or tensor.dtype == ir.DataType.STRING:
        return None
    if value is not None and value.is_graph_input():
        return None
    found = constant_of(value)
    return None if found is None else float(found.item())


def close(found: float, wanted: float, like: ir.Value) -> bool:
    """Whether a constant is `wanted`, as exactly as the type of the value `like` can say it."""
    half = {ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}
    return math.isclose(found, wanted, rel_tol=half.get(like.dtype or ir.DataType.FLOAT, _CLOSE))


def _part(value: ir.Value) -> Product:
    shared = len(value.uses()) != 1 or value.is_graph_output()
    return _term(value) if shared else product(value)


def _term(value: ir.Value) -> Product:
    constant = scalar(value)
    return Product(1.0, (value,)) if constant is None else Product(constant, ())


def _times(left: Product, right: Product) -> Product:
    return Product(left.constant * right.constant, left.factors + right.factors)


def _power(value: ir.Value, exponent: int) -> Product:
    base = _part(value)
    return Product(float(np.power(base.constant, exponent)), base.factors * exponent)
