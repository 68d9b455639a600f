"""Quantize what has no quantizer yet, by a named placement; `lower_fake_quantize` turns the quantizers into Q/DQ.

    x ─► MatMul              x ─► FakeQuantize, s = amax(x) / 127 ─► MatMul
          ▲            →                                              ▲
    W ────┘                  W ─► FakeQuantize, s[n] = amax(W[:, n]) / 127

| placement | quantizes |
|---|---|
| w8a8-linear | both inputs of linear layers and convolutions, weights per output channel, activations per tensor |
| w8a8-mha | also both products of each attention: q, k, the softmax with scale 1/127, v |
| sparse-int8 | also the outputs of linear layers: NVIDIA reports sparse INT8 kernels chosen only there |
| w4 | weights alone, to 4 bits in blocks of 128 or 64 along K |

What is left alone, from NVIDIA's documentation of explicit quantization and Model Optimizer's ONNX heuristics: layers
with K or N below 16 and products of one row, slower in INT8; convolutions with fewer than 16 channels but for the first
one; biases; the sums of a transformer's residual stream. The sum of a CNN is quantized on the branch that ends in no
convolution, so that it stays the other convolution's epilogue. What is quantized already stays as it is.

A scale is rounded up to a float16 number where the graph will be float16: it then survives typing bit for bit, and an
INT8 GEMM writes Half and not Float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.linears import Linear, array_shape, find_linears
from exporters.module_names import MODULE_KEY
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.quantizer import DOMAIN, INT4, INT8, OPERATOR
from profiles.device import FloatType

Measure = Callable[[ir.Model, Sequence[str]], Mapping[str, float]]
"""Returns amax of each of the named tensors of a graph."""

SMALLEST = 16  # of K and N
BLOCKS = (128, 64)
_DEAD = 1.0  # amax of what is nothing but zeros
_MHA_HEAD_SIZES = (16, 32, 64)
_MHA_TOKENS = 512


@dataclass(frozen=True)
class PlaceQuantizers:
    """Quantize by `placement`; `measure` is asked once, for the tensors that need a scale."""

    placement: str
    measure: Measure
    float_type: FloatType

    def __call__(self, model: ir.Model) -> Outcome:
        """Insert the quantizers."""
        inserter = Inserter(model.graph)
        left: list[LeftAlone] = []
        weights = list(self._weights(model.graph, left))
        found = [] if self.placement == "w4" else self._activations(model.graph, weights)
        by_place = {(read.node, read.index): read for read in found if not _is_dequantized(read.value)}
        reads = list(by_place.values())
        amax = self.measure(model, list(dict.fromkeys(_name(read.value) for read in reads if read.amax is None)))
        changes = [self._quantize_activation(inserter, read, amax) for read in reads]
        changes += [self._quantize_weight(inserter, linear) for linear in weights]
        if weights or reads:
            model.opset_imports[DOMAIN] = 1
        return Outcome(f"place quantizers ({self.placement})", len(changes), tuple(left), tuple(changes))

    def _weights(self, graph: ir.Graph, left: list[LeftAlone]) -> Iterator[Linear]:
        for linear in find_linears(graph):
            if linear.weight_dq is not None:
                continue
            why = _no_block(linear) if self.placement == "w4" else _too_small(linear)
            if why:
                left.append(LeftAlone(linear.module, why))
            else:
                yield linear

    def _activations(self, graph: ir.Graph, linears: Sequence[Linear]) -> Iterator[_Read]:
        for linear in linears:
            x = _activation(linear)
            if linear.input_q is None:
                yield _Read(x, linear.node, linear.activation_input, f"{linear.module}.input")
        yield from _residuals(graph)
        if self.placement == "sparse-int8":
            yield from _outputs(linears)
        if self.placement == "w8a8-mha":
            yield from _attention_products(graph)

    def _quantize_activation(self, inserter: Inserter, read: _Read, amax: Mapping[str, float]) -> Change:
        largest = amax[_name(read.value)] if read.amax is None else read.amax
        scale = self._scale(np.asarray(largest, np.float32), INT8[1])
        quantized = self._insert(inserter, read.value, scale, read.node, read.place)
        read.node.replace_input_with(read.index, quantized)
        known = "" if read.amax is None else ", known without measuring"
        return Change(read.place, f"int8, scale {float(scale):.6g}, amax {largest:.6g}{known}")

    def _quantize_weight(self, inserter: Inserter, linear: Linear) -> Change:
        values = np.abs(np.asarray(linear.values, np.float32))
        axis: int | None
        if self.placement == "w4":
            axis, block, (low, high) = linear.k_axis, _block(linear), INT4
            split = np.moveaxis(values, axis, -1)
            largest = np.moveaxis(split.reshape(*split.shape[:-1], -1, block).max(axis=-1), -1, axis)
        else:
            axis, block, (low, high) = linear.n_axis, 0, INT8
            largest = values.max(axis=None if axis is None else _all_but(axis, values.ndim))
        reader, index = _reader(linear)
        place = f"{linear.module}.weight"
        scale = self._scale(largest, high)
        quantized = self._insert(inserter, linear.weight, scale, reader, place, axis, block, low, high)
        reader.replace_input_with(index, quantized)
        shared = f"blocks of {block} along K" if block else "output channel" if axis is not None else "whole weight"
        return Change(place, f"int{4 if block else 8}, one scale for each {shared}")

    def _scale(self, amax: npt.NDArray[np.float32], high: int) -> npt.NDArray[np.float32]:
        """The scale amax / high, rounded up to what the graph's type can hold."""
        scale = np.asarray(np.where(amax > 0, amax, _DEAD) / high, np.float32)
        if self.float_type != "float16":
            return scale
        rounded = scale.astype(np.float16)
        higher = np.nextafter(rounded, np.float16(np.inf))
        return np.where(rounded.astype(np.float32) < scale, higher, rounded).astype(np.float32)

    def _insert(
        self,
        inserter: Inserter,
        value: ir.Value,
        scale: npt.NDArray[np.float32],
        before: ir.Node,
        place: str,
        axis: int | None = None,
        block: int = 0,
        low: int = INT8[0],
        high: int = INT8[1],
    ) -> ir.Value:
        attributes: dict[str, int | str] = {"low": low, "high": high, "place": place}
        attributes |= ({} if axis is None else {"axis": axis}) | ({"block_size": block} if block else {})
        return inserter.node(
            OPERATOR,
            [value, inserter.initializer(f"{place}_scale", scale)],
            dtype=value.dtype or ir.DataType.FLOAT,
            module=before.metadata_props.get(MODULE_KEY, ""),
            attributes=attributes,
            before=before,
            shape=value.shape,
            domain=DOMAIN,
        )


@dataclass(frozen=True)
class _Read:
    """An activation that a node reads; `amax` where it is known without measuring."""

    value: ir.Value
    node: ir.Node
    index: int
    place: str
    amax: float | None = None


def _is_dequantized(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _too_small(linear: Linear) -> str:
    if linear.kind == "conv":
        return _conv_too_small(linear)
    for letter, length in (("K", linear.k), ("N", linear.n)):
        if length < SMALLEST:
            return f"{letter} = {length} is below {SMALLEST}: slower in INT8"
    shape = _activation(linear).shape
    rows = [] if shape is None else list(shape)[:-1]
    if rows and all(row == 1 for row in rows):
        return "it multiplies a single row: slower in INT8"
    return ""


def _conv_too_small(linear: Linear) -> str:
    shape = array_shape(linear.weight)
    outputs, inputs, kernel = shape[0], shape[1], shape[2:]
    if linear.group > 1:
        few = outputs % 8 != 0 or min(kernel) < 3
        return "a grouped convolution with few channels or a small kernel" if few else ""
    first = _activation(linear).is_graph_input()
    if min(outputs, inputs) >= SMALLEST:
        return ""
    fits = (outputs % 8 == 0 or inputs % 8 == 0) and (first or max(outputs, inputs) >= SMALLEST)
    return "" if fits and len(set(kernel)) == 1 else f"a convolution of {inputs} to {outputs} channels: slower in INT8"


def _activation(linear: Linear) -> ir.Value:
    value = linear.node.inputs[linear.activation_input]
    assert value is not None
    return value


def _reader(linear: Linear) -> tuple[ir.Node, int]:
    """What reads the stored weight on the way to the layer: the layer itself, or a Transpose or reshape of it."""
    node, index = linear.node, 1 - linear.activation_input
    while (value := node.inputs[index]) is not linear.weight:
        assert value is not None
        producer = value.producer()
        assert producer is not None
        node, index = producer, 0
    return node, index


def _all_but(axis: int, rank: int) -> tuple[int, ...]:
    return tuple(index for index in range(rank) if index != axis)


def _no_block(linear: Linear) -> str:
    if linear.kind == "conv":
        return "4-bit weights are for linear layers"
    if linear.k < SMALLEST or linear.n < SMALLEST:
        return f"K or N is below {SMALLEST}"
    return "" if _block(linear) else f"K = {linear.k} is no multiple of {BLOCKS[-1]}"


def _block(linear: Linear) -> int:
    return next((block for block in BLOCKS if linear.k % block == 0), 0)


def _residuals(graph: ir.Graph) -> Iterator[_Read]:
    """The identity branch of each sum that ends a convolution's branch."""
    for node in graph:
        if node.op_type != "Add" or node.domain or None in node.inputs:
            continue
        first, second = node.inputs
        if first is None or second is None or first.is_initializer() or second.is_initializer():
            continue
        for index, (branch, identity) in enumerate(((second, first), (first, second))):
            producer = branch.producer()
            if producer is not None and producer.op_type == "Conv" and len(branch.uses()) == 1:
                module = node.metadata_props.get(MODULE_KEY) or node.name or ""
                yield _Read(identity, node, index, f"{module}.identity")
                break


def _outputs(linears: Sequence[Linear]) -> Iterator[_Read]:
    """What reads each linear layer's result, bias included."""
    for linear in linears:
        value = linear.node.outputs[0]
        users = [user for user, _ in value.uses()]
        if len(users) == 1 and users[0].op_type == "Add" and any(_is_bias(x) for x in users[0].inputs):
            value = users[0].outputs[0]
        for user, index in list(value.uses()):
            yield _Read(value, user, index, f"{linear.module}.output")


def _is_bias(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and len(array_shape(value)) == 1


def _attention_products(graph: ir.Graph) -> Iterator[_Read]:
    """The four inputs of the two products of each attention that INT8 can fuse."""
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        product = next((user for user, _ in softmax.outputs[0].uses() if user.op_type == "MatMul"), None)
        scores = _producer_through(softmax.inputs[0], "MatMul")
        if product is None or scores is None or not _int8_fuses(scores):
            continue
        module = softmax.metadata_props.get(MODULE_KEY) or softmax.name or ""
        names = (("q", scores, 0, None), ("k", scores, 1, None), ("softmax", product, 0, 1.0), ("v", product, 1, None))
        for name, node, index, amax in names:
            value = node.inputs[index]
            assert value is not None
            yield _Read(value, node, index, f"{module}.{name}", amax)


def _producer_through(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Add", "Cast"):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _int8_fuses(scores: ir.Node) -> bool:
    """Whether an INT8 attention of this size is one kernel (TensorRT: head size 16, 32 or 64, at most 512 tokens)."""
    q = scores.inputs[0]
    tokens, size = (0, 0) if q is None or q.shape is None else tuple(q.shape)[-2:]
    return size in _MHA_HEAD_SIZES and isinstance(tokens, int) and tokens <= _MHA_TOKENS


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
