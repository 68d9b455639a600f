"""Write an Einsum that is a product of matrices as MatMul, which is what compilers fuse.

    Einsum("bhid,bhjd->bhij", q, k)    →    MatMul(q, Transpose(k))
    Einsum("bihd,bjhd->bhij", q, k)    →    MatMul(Transpose(q), Transpose(k))
    Einsum("bhij,bhjd->bihd", p, v)    →    Transpose(MatMul(p, v))
    Einsum("bhwc,hkc->bhwk", x, r)     →    MatMul(x, Transpose(r))

Each letter is an axis: of both operands and the output (batch), of the first and the output (rows), of the second and
the output (columns), or of both operands alone (summed over, one of them). MatMul broadcasts, so further rows stand
ahead of the batch. A·B and (Bᵀ·Aᵀ)ᵀ are both tried, and the one that takes fewer transposes is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from exporters.module_names import MODULE_KEY, label_of
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.passes.put_in_place import drop_unused, put_in_place

_TWO_OPERANDS = re.compile(r"([A-Za-z]+),([A-Za-z]+)(?:->([A-Za-z]*))?")


@dataclass(frozen=True)
class LowerEinsum:
    """Write them as MatMul."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Write them so; any other Einsum is left alone with the reason."""
        inserter, changed, left = Inserter(model.graph), 0, []
        for node in [node for node in model.graph if node.op_type == "Einsum" and not node.domain]:
            typed = all(value is not None and value.dtype is not None for value in node.inputs)
            product = _product(node.attributes["equation"].as_string()) if typed else "its types are not known"
            if isinstance(product, str):
                left.append(LeftAlone(label_of(node), product))
                continue
            _write(product, node, inserter)
            changed += 1
        if changed:
            drop_unused(model)
        return Outcome("lower Einsum", changed, tuple(left))


@dataclass(frozen=True)
class _Product:
    """A product of matrices, each axis a letter.

    Attributes:
        operands: the axes of the operands as they are given.
        wanted: as MatMul takes them: rows, batch, row, summed and batch, summed, column.
        made: as MatMul makes them.
        output: as they are to be.
        swapped: whether the second operand comes first.
    """

    operands: tuple[str, str]
    wanted: tuple[str, str]
    made: str
    output: str
    swapped: bool

    @property
    def transposes(self) -> int:
        return (self.operands[0] != self.wanted[0]) + (self.operands[1] != self.wanted[1]) + (self.made != self.output)


def _product(equation: str) -> _Product | str:
    """The product with the fewest transposes that is this equation; the reason where it is none."""
    match = _TWO_OPERANDS.fullmatch(equation.replace(" ", ""))
    if match is None:
        return "it has an ellipsis, or not two operands"
    first, second, given = match.groups()
    both = first + second
    output = "".join(sorted(axis for axis in set(both) if both.count(axis) == 1)) if given is None else given
    if any(len(set(axes)) < len(axes) for axes in (first, second, output)):
        return "it takes a diagonal"
    found = [_arranged(first, second, output, swapped=False), _arranged(second, first, output, swapped=True)]
    products = [product for product in found if isinstance(product, _Product)]
    return min(products, key=lambda product: product.transposes) if products else str(found[0])


def _arranged(first: str, second: str, output: str, *, swapped: bool) -> _Product | str:
    summed = [axis for axis in first if axis in second and axis not in output]
    batch = [axis for axis in output if axis in first and axis in second]
    rows = [axis for axis in output if axis in first and axis not in second]
    columns = [axis for axis in output if axis in second and axis not in first]
    if len({*summed, *batch, *rows, *columns}) < len({*first, *second}):
        return "it sums over an axis of one operand"
    if len(summed) != 1:
        return f"it sums over {len(summed)} axes"
    if not rows or not columns:
        return "it multiplies a matrix by a vector"
    if len(columns) != 1:
        return "it has several axes for its rows and for its columns"
    before, row, column = "".join(rows[:-1] + batch), rows[-1], columns[0]
    wanted = (before + row + summed[0], "".join(batch) + summed[0] + column)
    return _Product((first, second), wanted, before + row + column, output, swapped)


def _write(product: _Product, node: ir.Node, inserter: Inserter) -> None:
    values = [value for value in node.inputs if value is not None]
    if product.swapped:
        values.reverse()
    sizes = dict(pair for axes, value in zip(product.operands, values, strict=True) for pair in _sizes(axes, value))
    operands = []
    for value, given, wanted in zip(values, product.operands, product.wanted, strict=True):
        shape = _shape(wanted, sizes)
        operands.append(value if given == wanted else _transposed(value, given, wanted, shape, node, inserter))
    if product.made == product.output:
        made = put_in_place(inserter, node, "MatMul", operands)
        made.shape = made.shape or _shape(product.made, sizes)
        return
    dtype, module = values[0].dtype, node.metadata_props.get(MODULE_KEY, "")
    assert dtype is not None
    made = inserter.node("MatMul", operands, dtype=dtype, module=module, before=node, shape=_shape(product.made, sizes))
    out = put_in_place(inserter, node, "Transpose", [made], {"perm": _perm(product.made, product.output)})
    out.shape = out.shape or _shape(product.output, sizes)


def _transposed(
    value: ir.Value, given: str, wanted: str, shape: ir.Shape | None, node: ir.Node, inserter: Inserter
) -> ir.Value:
    assert value.dtype is not None
    perm, module = _perm(given, wanted), node.metadata_props.get(MODULE_KEY, "")
    return inserter.node(
        "Transpose", [value], dtype=value.dtype, module=module, attributes={"perm": perm}, before=node, shape=shape
    )


def _perm(given: str, wanted: str) -> list[int]:
    return [given.index(axis) for axis in wanted]


def _sizes(axes: str, value: ir.Value) -> Sequence[tuple[str, int | ir.SymbolicDim]]:
    return [] if value.shape is None else list(zip(axes, value.shape, strict=True))


def _shape(axes: str, sizes: dict[str, int | ir.SymbolicDim]) -> ir.Shape | None:
    return ir.Shape([sizes[axis] for axis in axes]) if all(axis in sizes for axis in axes) else None
