"""Turn the quantizers of a traced module into Q/DQ, with the scales that they have.

    x ─► FakeQuantize ─► MatMul            x ─► Q ─► DQ ─► MatMul
                          ▲          →                      ▲
    W [N, K] ─► FakeQ ─► Transpose         W int [K, N] ─► DQ

    q = saturate(round_half_even(x / scale)),  x ≈ q · scale

The rules of TensorRT's explicit quantization that this keeps: symmetric with an explicit int8 zero-point (without one,
ONNX means uint8), no Transpose between an integer constant and its DQ (the integers are stored as the node reads them).
Where several layers read one tensor with one scale, they share its Q and each has a DQ of its own; so they share the
integers of one weight. A range narrower
than the type's becomes a Clip before the Q, except where it only leaves out −128, which costs one step at the most.

8-bit floats go the same way, with E4M3 in the place of int8; `exporters.passes.lower_nvfp4` has the 4-bit ones.

Integers of four bits or fewer are stored as INT4 where only the weight is quantized, as INT8 beside a quantized
activation: no GEMM multiplies INT8 by INT4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.linears import array_of, array_shape
from exporters.module_names import MODULE_KEY
from exporters.passes import lower_nvfp4
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.outcome import Outcome
from exporters.quantizer import DOMAIN, INT4, INT8, OPERATOR, Grid, Quantizer

# Operators whose output is never negative.
_NOT_NEGATIVE = frozenset({"Relu", "Sigmoid", "Softmax", "HardSigmoid", "Abs"})


@dataclass(frozen=True)
class LowerFakeQuantize:
    """Replace every `gpusq::FakeQuantize`."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Replace them."""
        graph = model.graph
        inserter = Inserter(graph)
        shared: dict[tuple[ir.Value, bytes, int, int], ir.Value] = {}
        stored: dict[tuple[object, ...], ir.Value] = {}
        found = [node for node in graph if node.domain == DOMAIN and node.op_type == OPERATOR]
        for node in found:
            x = node.inputs[0]
            assert x is not None
            if not x.is_initializer() and _grid(node) == "nvfp4":
                _replace(inserter, node, lower_nvfp4.lower_activation(inserter, node, x, node))
            elif x.is_initializer():
                _lower_weight(inserter, node, x, stored)
            else:
                _lower_activation(inserter, node, x, shared)
        drop_unused_initializers(graph)
        model.opset_imports.pop(DOMAIN, None)
        if any(lower_nvfp4.is_dynamic_quantize(node) for node in graph):
            model.opset_imports[lower_nvfp4.TRT_DOMAIN] = 1
        return Outcome("lower fake quantizers", len(found))


def _lower_weight(inserter: Inserter, node: ir.Node, x: ir.Value, stored: dict[tuple[object, ...], ir.Value]) -> None:
    quantizer = quantizer_of(node)
    replaced, perm = _absorbed_transpose(node)
    axis = quantizer.axis
    if quantizer.grid == "nvfp4":
        assert axis is not None
        _replace(inserter, replaced, lower_nvfp4.lower_weight(inserter, node, stored, axis, perm, replaced), node)
        return
    scale = quantizer.scale
    if perm is not None:
        axis = None if axis is None else perm.index(axis % len(perm))
        scale = np.ascontiguousarray(scale.transpose(perm)) if quantizer.block else scale
    kind = _stored_type(quantizer, beside_quantized=_reads_quantized(replaced))
    name = _place(node, x.name or "weight")
    key = (x, kind, tuple(perm or ()), axis, quantizer.low, quantizer.high, scale.tobytes())
    if key not in stored:
        stored[key] = _integers(inserter, f"{name}_{kind.name.lower()}", x, quantizer, kind, perm)
    output = inserter.node(
        "DequantizeLinear",
        [
            stored[key],
            inserter.initializer(f"{name}_scale", scale),
            inserter.initializer(f"{name}_zero_point", np.zeros(scale.shape, kind.numpy())),
        ],
        dtype=ir.DataType.FLOAT,
        module=node.metadata_props.get(MODULE_KEY, ""),
        attributes=_attributes(axis, quantizer.block),
        before=replaced,
        shape=stored[key].shape,
    )
    _replace(inserter, replaced, output, node)


def _replace(inserter: Inserter, replaced: ir.Node, output: ir.Value, node: ir.Node | None = None) -> None:
    """Put `output` in the place of `replaced`, and remove the quantizer `node` ahead of it."""
    inserter.replace(replaced, output)
    if node is not None and replaced is not node:
        inserter.graph.remove(node, safe=True)


def _integers(
    inserter: Inserter, name: str, x: ir.Value, quantizer: Quantizer, kind: ir.DataType, perm: list[int] | None
) -> ir.Value:
    """The integers of a weight as its DQ reads them, worked out when they are read."""
    order = perm or list(range(len(array_shape(x))))

    def integers(values: npt.NDArray[Any]) -> npt.NDArray[np.generic]:
        return np.ascontiguousarray(quantizer.stored(values, kind.numpy()).transpose(order))

    return inserter.lazy_initializer(name, [x], integers, kind, [array_shape(x)[index] for index in order])


def _lower_activation(
    inserter: Inserter, node: ir.Node, x: ir.Value, shared: dict[tuple[ir.Value, bytes, int, int], ir.Value]
) -> None:
    quantizer = quantizer_of(node)
    module = node.metadata_props.get(MODULE_KEY, "")
    attributes = _attributes(quantizer.axis, quantizer.block)
    name = _place(node, f"{module}.input" if module else "input")
    scale = inserter.initializer(f"{name}_scale", quantizer.scale)
    kind = ir.DataType.FLOAT8E4M3FN if quantizer.grid == "e4m3" else ir.DataType.INT8
    zero_name = f"zero_point_{kind.name.lower()}" if quantizer.scale.ndim == 0 else f"{name}_zero_point"
    zero = inserter.initializer(zero_name, np.zeros(quantizer.scale.shape, kind.numpy()))
    key = (x, quantizer.scale.tobytes(), quantizer.low, quantizer.high)
    if key not in shared:
        shared[key] = inserter.node(
            "QuantizeLinear",
            [_clipped(inserter, node, x, quantizer, name), scale, zero],
            dtype=kind,
            module=module,
            attributes=attributes,
            before=node,
            shape=x.shape,
        )
    output = inserter.node(
        "DequantizeLinear",
        [shared[key], scale, zero],
        dtype=ir.DataType.FLOAT,
        module=module,
        attributes=attributes,
        before=node,
        shape=x.shape,
    )
    inserter.replace(node, output)


def _clipped(inserter: Inserter, node: ir.Node, x: ir.Value, quantizer: Quantizer, name: str) -> ir.Value:
    """`x` within the range of a quantizer that is narrower than its type."""
    producer = x.producer()
    bounded_below = quantizer.low == 0 and producer is not None and producer.op_type in _NOT_NEGATIVE
    if (quantizer.low <= INT8[0] + 1 or bounded_below) and quantizer.high >= INT8[1]:
        return x
    low = inserter.initializer(f"{name}_low", np.asarray(quantizer.scale * np.float32(quantizer.low), np.float32))
    high = inserter.initializer(f"{name}_high", np.asarray(quantizer.scale * np.float32(quantizer.high), np.float32))
    return inserter.node(
        "Clip",
        [x, low, high],
        dtype=ir.DataType.FLOAT,
        module=node.metadata_props.get(MODULE_KEY, ""),
        before=node,
        shape=x.shape,
    )


def quantizer_of(node: ir.Node) -> Quantizer:
    """What a `gpusq::FakeQuantize` says."""
    scale = node.inputs[1]
    assert scale is not None
    return Quantizer(
        scale=np.asarray(array_of(scale), np.float32),
        axis=node.attributes["axis"].as_int() if "axis" in node.attributes else None,
        block=node.attributes["block_size"].as_int() if "block_size" in node.attributes else None,
        low=node.attributes["low"].as_int(),
        high=node.attributes["high"].as_int(),
        grid=_grid(node),
    )


def _grid(node: ir.Node) -> Grid:
    return node.attributes["grid"].as_string() if "grid" in node.attributes else "integers"  # type: ignore[return-value]


def _absorbed_transpose(node: ir.Node) -> tuple[ir.Node, list[int] | None]:
    """The node whose place the DQ takes, and the perm of the Transpose behind the quantizer that it makes up for."""
    users = [user for user, _ in node.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Transpose" and "perm" in users[0].attributes:
        return users[0], list(users[0].attributes["perm"].as_ints())
    return node, None


def _reads_quantized(node: ir.Node) -> bool:
    """Whether a layer that reads this weight also reads a quantized activation."""
    for user, _ in node.outputs[0].uses():
        for value in user.inputs:
            producer = None if value is None or value is node.outputs[0] else value.producer()
            if producer is not None and producer.op_type in (OPERATOR, "DequantizeLinear"):
                return True
    return False


def _stored_type(quantizer: Quantizer, *, beside_quantized: bool) -> ir.DataType:
    if quantizer.grid == "e4m3":
        return ir.DataType.FLOAT8E4M3FN
    four_bits = quantizer.low >= INT4[0] and quantizer.high <= INT4[1] and not beside_quantized
    return ir.DataType.INT4 if four_bits else ir.DataType.INT8


def _attributes(axis: int | None, block: int | None) -> dict[str, int]:
    return ({} if axis is None else {"axis": axis}) | ({} if block is None else {"block_size": block})


def _place(node: ir.Node, otherwise: str) -> str:
    """`blocks.0.attn.qkv.input`: where the quantizer was attached."""
    return node.attributes["place"].as_string() if "place" in node.attributes else otherwise
