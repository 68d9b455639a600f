"""Turn an NVFP4 quantizer into the nodes of which TensorRT makes 4-bit GEMMs.

    x ─► FakeQuantize g ─►          x ─► TRT_FP4DynamicQuantize(g) ─► FP4 ───────────► DQ, blocks of 16 ─►
                                              └─► E4M3 scales ─► DQ(g) ─► float32 ─────┘
    W ─► FakeQuantize g ─►          W FP4 ───────────────────────────────────────────► DQ, blocks of 16 ─►
                                    E4M3 scales of its blocks ─► DQ(g) ─► float32 ─────┘

The scales of an activation's blocks are found as it runs; g alone is calibrated. TRT_FP4DynamicQuantize is an operator
of TensorRT's parser (onnx-tensorrt, TRT_custom_ops.md), as there is none of ONNX. Scales stay float32, whatever the
type of the graph: products of an E4M3 number and g may be too small for float16.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.linears import array_of, array_shape
from exporters.module_names import MODULE_KEY
from exporters.passes.float_islands import KEPT_KEY
from exporters.passes.inserter import Inserter
from exporters.small_floats import BLOCK, block_scales, fp4_codes

Stored = dict[tuple[object, ...], ir.Value]
TRT_DOMAIN, DYNAMIC_QUANTIZE = "trt", "TRT_FP4DynamicQuantize"
_F32, _F8, _F4 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1
_REASON = "the scales of NVFP4 blocks are float32"


def lower_weight(
    inserter: Inserter, node: ir.Node, stored: Stored, axis: int, perm: list[int] | None, before: ir.Node
) -> ir.Value:
    """The dequantized weight, in blocks along `axis` of it, stored with its axes in the order `perm`.

    What is stored of a weight in one way is in `stored` afterwards, and taken from there.
    """
    x, scale = node.inputs[:2]
    assert x is not None
    assert scale is not None
    order = perm or list(range(len(array_shape(x))))
    at, key = order.index(axis), (x, "nvfp4", axis, tuple(order))
    codes, scales = (*key, "codes"), (*key, "scales")
    if codes not in stored:
        stored[codes], stored[scales] = _stored(inserter, node, x, float(array_of(scale)), order, at)
    return _dequantized(inserter, node, stored[codes], stored[scales], scale, at, before)


def _stored(
    inserter: Inserter, node: ir.Node, x: ir.Value, g: float, order: list[int], at: int
) -> tuple[ir.Value, ir.Value]:
    """The constants that stand for `x`: its codes and the scales of their blocks."""
    name = node.attributes["place"].as_string() if "place" in node.attributes else str(x.name)
    shape = [array_shape(x)[index] for index in order]
    codes = inserter.lazy_initializer(
        f"{name}_fp4", [x], lambda values: fp4_codes(values.transpose(order), g, at), _F4, shape
    )
    blocks = [length // BLOCK if index == at else length for index, length in enumerate(shape)]
    scales = inserter.lazy_initializer(
        f"{name}_block_scale", [x], lambda values: block_scales(values.transpose(order), g, at), _F8, blocks
    )
    return codes, scales


def lower_activation(inserter: Inserter, node: ir.Node, x: ir.Value, before: ir.Node) -> ir.Value:
    """`x` quantized as it runs, in blocks along its last axis, and dequantized."""
    scale = node.inputs[1]
    assert scale is not None
    rank = 0 if x.shape is None else len(x.shape)
    codes, scales = inserter.nodes(
        DYNAMIC_QUANTIZE,
        [x, scale],
        dtype=_F4,
        module=node.metadata_props.get(MODULE_KEY, ""),
        attributes={"axis": rank - 1 if rank else -1, "block_size": BLOCK, "scale_type": int(_F8)},
        before=before,
        outputs=2,
        domain=TRT_DOMAIN,
    )
    codes.shape, scales.type = x.shape, ir.TensorType(_F8)
    if x.shape is not None and isinstance(x.shape[-1], int):
        scales.shape = ir.Shape([*list(x.shape)[:-1], x.shape[-1] // BLOCK])
    return _dequantized(inserter, node, codes, scales, scale, rank - 1 if rank else -1, before)


def is_dynamic_quantize(node: ir.Node | None) -> bool:
    """Whether a node quantizes to FP4 as it runs."""
    return node is not None and node.domain == TRT_DOMAIN and node.op_type == DYNAMIC_QUANTIZE


def _dequantized(
    inserter: Inserter, node: ir.Node, codes: ir.Value, scales: ir.Value, g: ir.Value, axis: int, before: ir.Node
) -> ir.Value:
    value = scales
    for data, scale, attributes in ((scales, g, {}), (codes, None, {"axis": axis, "block_size": BLOCK})):
        value = inserter.node(
            "DequantizeLinear",
            [data, value if scale is None else scale],
            dtype=_F32,
            module=node.metadata_props.get(MODULE_KEY, ""),
            attributes=attributes,
            before=before,
            shape=data.shape,
        )
        producer = value.producer()
        assert producer is not None
        producer.metadata_props[KEPT_KEY] = _REASON
    return value
