"""Give every quantizer an explicit zero-point of 0 in int8, where not one number changes; refuse the rest.

    x ─► Q(s, uint8 128) ─► DQ(s, uint8 128)     x ─► Q(s, int8 0) ─► DQ(s, int8 0)
                                              →
    Wq uint8 ─► DQ(s, z)                         (Wq - z) int8 ─► DQ(s, int8 0)

    saturate(round(x / s) + 128, 0, 255) - 128 = saturate(round(x / s), -128, 127)

For an activation this holds for 128 alone: any other zero-point clamps elsewhere, and so does an unsigned range that
starts at 0 (a zero-point left out means uint8 and 0). Of a weight the integers are known, so any zero-point is shifted
away as long as they fit; 4-bit weights stay 4-bit where they fit. A channel of nothing but zeros whose scale is 0 gets
the scale 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.module_names import MODULE_KEY
from exporters.passes.fold_quantized import FoldQuantized, quantized_type
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.qdq_scales import Array, constant_of, dtype_of, input_at, is_quantizer, spread
from profiles.errors import GpusqError

_INT4, _INT8, _UINT8 = ir.DataType.INT4, ir.DataType.INT8, ir.DataType.UINT8
_FOUR_BIT = (_INT4, ir.DataType.UINT4)
_INTEGERS = (*_FOUR_BIT, _INT8, _UINT8, ir.DataType.INT16, ir.DataType.UINT16)
_MIDDLE = 128
_SHOWN = 3


@dataclass(frozen=True)
class SymmetricQdq:
    """Make every Q/DQ of the graph symmetric."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Make them symmetric.

        Raises:
            GpusqError: a scale is not positive, or quantizers cannot be made symmetric without changing numbers; all of
                these are counted, and but for folded constants nothing is edited then.
        """
        changed = FoldQuantized()(model).changed
        nodes = [node for node in model.graph.all_nodes() if is_quantizer(node)]
        _refuse([(node, why) for node in nodes if (why := _asymmetric(node))])
        inserter = Inserter(model.graph)
        revived: list[LeftAlone] = []
        for node in nodes:
            edits = [_scale_as_scalar(node, inserter), _revive(node, inserter, revived)]
            edits += [_shift_constant(node, inserter), _zero_point(node, inserter)]
            changed += any(edits)
        drop_unused_initializers(model.graph)
        return Outcome("symmetric Q/DQ", changed, tuple(revived))


def _refuse(refused: Sequence[tuple[ir.Node, str]]) -> None:
    if refused:
        shown = "; ".join(f"{_where(node)}: {why}" for node, why in refused[:_SHOWN])
        more = f"; and {len(refused) - _SHOWN} more" if refused[_SHOWN:] else ""
        raise GpusqError(
            f"{len(refused)} Q/DQ nodes cannot become symmetric int8 without changing numbers: {shown}{more}",
            hint="train or calibrate with int8 and zero-point 0 (onnxruntime: activation_type=QuantType.QInt8, "
            "weight_type=QuantType.QInt8, extra_options ActivationSymmetric and WeightSymmetric)",
        )


def _where(node: ir.Node) -> str:
    name, producer = node.name or "", None if node.inputs[0] is None else node.inputs[0].producer()
    if module := node.metadata_props.get(MODULE_KEY):
        return f"{module} ({name})"
    return name if producer is None else f"{name} behind {producer.name}"


def _asymmetric(node: ir.Node) -> str:
    """Why a Q/DQ node cannot get a zero-point of 0 in int8; "" if it can, or if it is no integer quantizer."""
    dtype = _integer_type(node)
    if dtype not in _INTEGERS:
        return ""
    given = input_at(node, 2)
    zero = np.zeros((), np.int32) if given is None else constant_of(given)
    if zero is None:
        return "its zero-point is computed in the graph"
    values = constant_of(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
    if values is not None:
        return _does_not_fit(node, values, zero)
    if dtype in (_INT8, _INT4) and not zero.any():
        return ""
    if dtype != _UINT8 or np.any(zero != _MIDDLE):
        return f"{dtype.name.lower()} with zero-point {', '.join(map(str, np.unique(zero)[:_SHOWN]))}"
    return _stranger(node)


def _integer_type(node: ir.Node) -> ir.DataType | None:
    if node.op_type == "QuantizeLinear":
        return quantized_type(node)
    return dtype_of(input_at(node, 2)) or dtype_of(node.inputs[0])


def _does_not_fit(node: ir.Node, values: Array, zero: Array) -> str:
    low, high = _extent(_shifted(node, values, zero))
    int8 = np.iinfo(np.int8)
    if low >= int8.min and high <= int8.max:
        return ""
    return f"its constant reaches from {low} to {high} around its zero-point, beyond int8"


def _shifted(node: ir.Node, values: Array, zero: Array) -> Array:
    return values.astype(np.int32) - spread(zero, node, values.shape).astype(np.int32)


def _extent(integers: Array) -> tuple[int, int]:
    return int(integers.min(initial=0)), int(integers.max(initial=0))


def _stranger(node: ir.Node) -> str:
    """Who else reads or writes the uint8 integers that are to become int8."""
    if node.op_type == "DequantizeLinear":
        producer = None if node.inputs[0] is None else node.inputs[0].producer()
        if producer is None or not is_quantizer(producer) or not _is_middle(producer):
            name = "" if node.inputs[0] is None else node.inputs[0].name
            return f"its uint8 integers, {name!r}, do not come from a quantizer with zero-point 128"
        return ""
    integers = node.outputs[0]
    if integers.is_graph_output():
        return f"its uint8 integers, {integers.name!r}, are an output of the graph"
    others = [user for user, index in integers.uses() if index or not is_quantizer(user) or not _is_middle(user)]
    return f"its uint8 integers are read by {others[0].name!r} ({others[0].op_type})" if others else ""


def _is_middle(node: ir.Node) -> bool:
    zero = constant_of(input_at(node, 2))
    return zero is not None and zero.dtype == np.uint8 and bool(np.all(zero == _MIDDLE))


def _scale_as_scalar(node: ir.Node, inserter: Inserter) -> bool:
    """A scale of one number is a scalar; the bits stay."""
    scale = constant_of(node.inputs[1])
    if scale is None or scale.size != 1 or not scale.ndim:
        return False
    assert node.inputs[1] is not None
    node.replace_input_with(1, inserter.initializer(f"{node.inputs[1].name}_scalar", scale.reshape(())))
    return True


def _revive(node: ir.Node, inserter: Inserter, revived: list[LeftAlone]) -> bool:
    """Give dead channels, whose scale is 0, the scale 1."""
    scale = constant_of(node.inputs[1])
    if scale is None or np.all(scale != 0):
        return False
    assert node.inputs[1] is not None
    alive = np.where(scale == 0, np.ones((), scale.dtype), scale)
    node.replace_input_with(1, inserter.initializer(f"{node.inputs[1].name}_positive", alive))
    channels = ", ".join(map(str, np.flatnonzero(scale == 0)[:_SHOWN]))
    why = f"{int((scale == 0).sum())} channels (such as {channels}) hold only zeros and had the scale 0: it is 1 now"
    revived.append(LeftAlone(_where(node), why))
    return True


def _shift_constant(node: ir.Node, inserter: Inserter) -> bool:
    """Store the integers of a constant around 0."""
    value, zero = node.inputs[0], constant_of(input_at(node, 2))
    values = constant_of(value) if node.op_type == "DequantizeLinear" else None
    dtype = dtype_of(value)
    if value is None or values is None or dtype not in _INTEGERS:
        return False
    if dtype in (_INT4, _INT8) and (zero is None or not zero.any()):
        return False
    integers = _shifted(node, values, np.zeros((), np.int32) if zero is None else zero)
    low, high = _extent(integers)
    four_bit = dtype in _FOUR_BIT and low >= -8 and high <= 7
    dtype = _INT4 if four_bit else _INT8
    name = f"{(value.name or '').removesuffix('_quantized')}_{dtype.name.lower()}"
    node.replace_input_with(0, inserter.initializer(name, integers.astype(np.int8).astype(dtype.numpy())))
    return True


def _zero_point(node: ir.Node, inserter: Inserter) -> bool:
    """Make the zero-point an explicit 0 of the integers' type and the scale's shape."""
    old = input_at(node, 2)
    if _integer_type(node) not in _INTEGERS:
        return False
    constant = node.op_type == "DequantizeLinear" and constant_of(node.inputs[0]) is not None
    dtype = (dtype_of(node.inputs[0]) if constant else None) or _INT8
    scale = constant_of(node.inputs[1])
    zero = np.zeros(() if scale is None else scale.shape, dtype.numpy())
    held = constant_of(old)
    if held is not None and held.dtype == zero.dtype and held.shape == zero.shape and not held.any():
        return False
    # One for each scale: onnxruntime's QDQS8ToU8Transformer cannot load a graph in which several share one.
    name = f"{_name(node.inputs[1])}_zero_point_{dtype.name.lower()}"
    new = inserter.initializer(name, zero)
    if old is None:
        node.resize_inputs(3)
    node.replace_input_with(2, new)
    if node.op_type == "QuantizeLinear":
        node.attributes.pop("output_dtype", None)
        node.outputs[0].type = ir.TensorType(dtype)
    return True


def _name(value: ir.Value | None) -> str:
    return ("" if value is None else value.name or "").removesuffix("_scale")
