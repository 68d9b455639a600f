"""An NVFP4 graph for a runtime without TensorRT's operator for it: the same arithmetic in float32.

    x ─► TRT_FP4DynamicQuantize ─► DQ of the scales ─► DQ        x ─► Nvfp4(g)
    W FP4, E4M3 scales, g ─► DQ of the scales ─► DQ         →    W, a float32 constant

`Nvfp4` is a function in the model, of ONNX's operators alone; `exporters.small_floats` has its arithmetic. Products are
summed in float32, as a tensor core sums them. How a GPU rounds the scale of a block is not documented: to the nearest
E4M3 number is what is computed here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import onnx_ir as ir

from exporters.linears import array_shape
from exporters.passes.inserter import Inserter
from exporters.passes.lower_nvfp4 import is_dynamic_quantize
from exporters.passes.put_in_place import drop_unused
from exporters.quantizer import spread
from exporters.small_floats import BLOCK

_DOMAIN = "gpusq.emulate"
_FUNCTION = """
    <domain: "gpusq.emulate", opset_import: ["": %d]>
    Nvfp4 (x, g) => (y) {
        float = Cast<to=1>(x)
        rows = Constant<value_ints=[-1, 16]>()
        blocks = Reshape(float, rows)
        magnitudes = Abs(blocks)
        last = Constant<value_ints=[-1]>()
        amax = ReduceMax<keepdims=1>(magnitudes, last)
        six = Constant<value_float=6.0>()
        reach = Mul(g, six)
        wanted = Div(amax, reach)
        smallest = Constant<value_float=0.001953125>()
        largest = Constant<value_float=448.0>()
        clipped = Clip(wanted, smallest, largest)
        e4m3 = Cast<to=17>(clipped)
        scale = Cast<to=1>(e4m3)
        s = Mul(scale, g)
        ratio = Div(blocks, s)
        minus = Neg(six)
        q = Clip(ratio, minus, six)
        size = Abs(q)
        two = Constant<value_float=2.0>()
        four = Constant<value_float=4.0>()
        half = Constant<value_float=0.5>()
        one = Constant<value_float=1.0>()
        small = Less(size, two)
        middle = Less(size, four)
        wide = Where(middle, one, two)
        step = Where(small, half, wide)
        steps = Div(q, step)
        whole = Round(steps)
        e2m1 = Mul(whole, step)
        real = Mul(e2m1, s)
        shape = Shape(x)
        y = Reshape(real, shape)
    }
"""


def holds_nvfp4(model: ir.Model) -> bool:
    """Whether the main graph quantizes to FP4 as it runs."""
    return any(is_dynamic_quantize(node) for node in model.graph)


def emulate_nvfp4(model: ir.Model) -> None:
    """Rewrite the main graph of `model`, in place."""
    graph, inserter = model.graph, Inserter(model.graph)
    for node in list(graph):
        data = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if data is None or node.attributes.get_int("block_size", 0) != BLOCK:
            continue
        producer = data.producer()
        if producer is not None and is_dynamic_quantize(producer):
            inputs = [value for value in producer.inputs if value is not None]
            new = inserter.node(
                "Nvfp4", inputs, dtype=ir.DataType.FLOAT, module="", before=node, shape=data.shape, domain=_DOMAIN
            )
            _replace(inserter, node, new)
        elif data.dtype == ir.DataType.FLOAT4E2M1 and data.is_initializer():
            _replace(inserter, node, _dequantized(node, data, inserter))
    drop_unused(model)
    opset = model.opset_imports[""]
    function = ir.serde.deserialize_function(onnx.parser.parse_function(_FUNCTION % opset))
    model.functions[function.identifier()] = function
    model.opset_imports[_DOMAIN] = 1


def _replace(inserter: Inserter, node: ir.Node, new: ir.Value) -> None:
    """Put `new` in the place of the output of `node`, under its name, by which it is measured."""
    name = node.outputs[0].name
    inserter.replace(node, new)
    if new.is_initializer():
        del inserter.graph.initializers[str(new.name)]
    new.name = name
    if new.const_value is not None:
        inserter.graph.register_initializer(new)


def _dequantized(node: ir.Node, data: ir.Value, inserter: Inserter) -> ir.Value:
    """The weight in float32; the scales of its blocks are dequantized by a node of their own."""
    scale = node.inputs[1]
    dq = None if scale is None else scale.producer()
    assert dq is not None
    blocks, g = dq.inputs
    assert blocks is not None
    assert g is not None
    axis = node.attributes.get_int("axis", -1)

    def floats(codes: npt.NDArray[Any], scales: npt.NDArray[Any], g: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        steps = scales.astype(np.float32) * g
        return np.asarray(codes.astype(np.float32) * spread(steps, codes.shape, axis, BLOCK), np.float32)

    return inserter.lazy_initializer(
        f"{data.name}_float", [data, blocks, g], floats, ir.DataType.FLOAT, array_shape(data)
    )
