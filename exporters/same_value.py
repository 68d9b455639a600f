"""Whether two values are the same for every input, as a compiler that merges equal nodes sees it.

a = Transpose(Relu(x))      b = Identity(Transpose(Relu(x)))      two chains of nodes, and one value
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_SMALL = 1 << 10  # elements of constants that are compared; larger ones are weights, and not read


def same_value(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether both are made by the same operators from the same inputs and constants."""
    compared: set[tuple[ir.Value, ir.Value]] = set()
    ahead = [(first, second)]
    while ahead:
        left, right = (_behind_identity(value) for value in ahead.pop())
        if left is right or left is None or right is None:
            if left is not right:
                return False
            continue
        if (left, right) in compared:
            continue
        compared.add((left, right))
        one, other = left.producer(), right.producer()
        if one is None or other is None or one.op_type == "Constant":
            if not _same_constant(left, right):
                return False
        elif left.index() != right.index() or not _same_operator(one, other):
            return False
        else:
            ahead += zip(one.inputs, other.inputs, strict=True)
    return True


def _behind_identity(value: ir.Value | None) -> ir.Value | None:
    while value is not None and (node := value.producer()) is not None and node.op_identifier() == ("", "Identity", ""):
        value = node.inputs[0]
    return value


def _same_operator(first: ir.Node, second: ir.Node) -> bool:
    """Whether two nodes do the same with their inputs; one that draws random numbers has none."""
    return (
        first.op_identifier() == second.op_identifier()
        and len(first.inputs) == len(second.inputs) > 0
        and {name: str(attribute.value) for name, attribute in first.attributes.items()}
        == {name: str(attribute.value) for name, attribute in second.attributes.items()}
    )


def _same_constant(first: ir.Value, second: ir.Value) -> bool:
    one, other = (ir.convenience.get_const_tensor(value) for value in (first, second))
    if one is None or other is None or one.size > _SMALL or one.dtype != other.dtype:
        return False
    return np.array_equal(one.numpy(), other.numpy())
