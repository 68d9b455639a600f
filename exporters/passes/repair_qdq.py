"""Leave quantizers where a kernel computes on their integers, and take away those that only cost.

    x ─► Q ─► DQ ─► LayerNorm          x ─► LayerNorm                       no kernel normalizes integers
    x ─► Q ─► DQ ─► Reshape ─► MatMul  x ─► Q ─► Reshape ─► DQ ─► MatMul    moves of integers are exact
    DQ ─► Transpose ─► Q, one scale    Transpose of the integers            Q(DQ(q)) = q
    DQ(constant) ─► Add                the constant, dequantized            the same numbers

Quantizers come from training and from other tools, which put them wherever their rules say. A compiler uses one where
both operands of a product are integers, on what a convolution's sum adds (either branch: TensorRT-RTX makes as many
kernels of a sum whose two branches are quantized as of one that has a single quantizer, and the numbers stay), and on
pooling and concatenation ahead of such layers. An attention uses them if q, k, the softmax and v all have one: a
part of them keeps it from becoming one kernel. Everywhere else the detour through integers rounds and moves data for
nothing; a transformer's residual stream loses most by it. No scale is changed, and each removal is told.

On the output of a layer a quantizer stays where the target's sparse INT8 kernels ask for INT8 outputs and the layer is
2:4, or where the placement that is asked for puts one there itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.linears import QDQ, Linear, find_linears, scale_of, trace_back
from exporters.module_names import MODULE_KEY, label_of
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import Change, Outcome
from exporters.passes.put_in_place import drop_unused
from exporters.qdq_scales import constant_of, input_at, is_quantizer, spread
from exporters.sparsity import sparsity_of
from profiles.device import SparseKernels

_MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Split", "Identity"})
_PASSED = _MOVES | QDQ | {"Cast"}
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})  # of ConvTranspose there is no integer kernel
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Concat"})
# Readers for which an integer constant is dequantized as it is read: weights, and tables of which rows are taken.
_READ_CONSTANTS = _PRODUCTS | _MOVES | {"Cast"}


@dataclass(frozen=True)
class RepairQdq:
    """Repair the Q/DQ of a graph.

    Attributes:
        sparse: the target's rules of 2:4 kernels; None where it has none.
        keep_outputs: whether the quantizers on the outputs of all layers stay.
    """

    sparse: SparseKernels | None = None
    keep_outputs: bool = False

    def __call__(self, model: ir.Model) -> Outcome:
        """Repair it, again until nothing is left to do: what is removed may have been all that another one was for."""
        changes: list[Change] = []
        while found := self._repair(model):
            changes += found
            drop_unused(model)
        return Outcome("repair Q/DQ", len(changes), (), tuple(changes))

    def _repair(self, model: ir.Model) -> list[Change]:
        graph, inserter = model.graph, Inserter(model.graph)
        kept = set(self._kept_outputs(graph))
        changes = [change for node in list(graph) for change in _fold_constant(node, inserter)]
        whole = {node for softmax in graph if softmax.op_type == "Softmax" for node in _whole_attention(softmax)}
        pairs = [node for node in graph if _is_activation_dq(node)]
        changes += [change for node in pairs for change in _skip(node, whole, kept)]
        return changes + _move_down(graph, inserter)

    def _kept_outputs(self, graph: ir.Graph) -> Iterator[ir.Value]:
        """The results, bias included, of the layers whose output quantizers stay."""
        wanted = self.sparse is not None and self.sparse.int8_wants_int8_output
        for linear in find_linears(graph):
            output = linear.node.outputs[0]
            results = [output, *(user.outputs[0] for user, _ in output.uses() if user.op_type == "Add")]
            if linear.weight_dq is None or not any(map(_is_quantized_next, results)):
                continue
            if self.keep_outputs or (wanted and _is_sparse(linear)):  # the weight is read last
                yield from results


def _is_quantized_next(value: ir.Value) -> bool:
    return any(user.op_type == "QuantizeLinear" for user, _ in value.uses())


def _is_sparse(linear: Linear) -> bool:
    return sparsity_of(linear, None).pattern != "dense"


def _fold_constant(node: ir.Node, inserter: Inserter) -> Iterator[Change]:
    """Dequantize a constant that no product multiplies by and no move takes apart."""
    x = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    output = node.outputs[0]
    if x is None or not x.is_initializer() or output.is_graph_output():
        return
    if any(user.op_type in _READ_CONSTANTS or is_quantizer(user) for user, _ in output.uses()):
        return  # of a quantizer, it is the scale of its blocks
    if (array := _dequantized(node)) is None:
        return
    constant = inserter.initializer(f"{output.name}_float", array)
    ir.convenience.replace_all_uses_with(output, constant)
    yield Change(label_of(node), "a constant that no product reads is dequantized")


def _dequantized(node: ir.Node) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None:
    integers, scale, dtype = constant_of(node.inputs[0]), scale_of(node), node.outputs[0].dtype
    if integers is None or scale is None or np.any(_zero(node)):
        return None
    spreaded = spread(scale.astype(np.float32), node, integers.shape)
    return np.asarray(integers.astype(np.float32) * spreaded, scale.dtype if dtype is None else dtype.numpy())


def _is_activation_dq(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and _quantizer(node) is not None


def _quantizer(dq: ir.Node) -> ir.Node | None:
    """The QuantizeLinear whose integers `dq` reads."""
    node = None if dq.inputs[0] is None else dq.inputs[0].producer()
    return node if node is not None and node.op_type == "QuantizeLinear" else None


def _skip(dq: ir.Node, whole: set[ir.Node], kept_outputs: set[ir.Value]) -> Iterator[Change]:
    """Let the readers of `dq` that compute in float read the float tensor itself."""
    q = _quantizer(dq)
    assert q is not None
    x, output = q.inputs[0], dq.outputs[0]
    if x is None or x in kept_outputs or output.is_graph_output():
        return
    for user, index in list(output.uses()):
        reasons = [_why_float(*reader, whole) for reader in _readers(user, index)]
        if reasons and all(reasons):
            user.replace_input_with(index, x)
            yield Change(label_of(dq), f"removed ahead of {user.op_type}: {reasons[0]}")


def _readers(user: ir.Node, index: int) -> Iterator[tuple[ir.Node, int]]:
    """Who computes with the value in the end, behind moves of it and further quantizers."""
    if index != 0 or user.domain or user.op_type not in _PASSED:
        yield user, index
        return
    for output in user.outputs:
        if output.is_graph_output():
            yield user, -1
        for further, at in output.uses():
            yield from _readers(further, at)


def _why_float(node: ir.Node, index: int, whole: set[ir.Node]) -> str:
    """Why `node` computes in float with this input; empty where it takes integers."""
    if index < 0:
        return ""
    if node.op_type in _PRODUCTS and index < 2:
        other = node.inputs[1 - index]
        if not _is_quantized(other):
            return "the other operand is not quantized"
        return "" if node in whole or _is_weight(node) else "a part of the attention has no quantizer"
    if node.op_type == "Add":
        return _why_float_sum(node)
    if node.op_type in _POOLS:
        reasons = [_why_float(*reader, whole) for reader in _behind(node.outputs[0])]
        return "what reads its result computes in float" if reasons and all(reasons) else ""
    return f"no kernel computes {node.op_type} on integers"


def _why_float_sum(add: ir.Node) -> str:
    """A sum takes integers where one branch ends in a convolution; the trained quantizer of either branch stays."""
    convolutional = any(_ends_in_convolution(value) for value in add.inputs)
    return "" if convolutional else "sums of transformers stay in high precision"


def _ends_in_convolution(value: ir.Value | None) -> bool:
    node = None if value is None else trace_back(value)[0]
    producer = None if node is None else node.producer()
    return producer is not None and producer.op_type == "Conv"


def _is_weight(product: ir.Node) -> bool:
    """Whether one operand is a constant."""
    return any(_source(value).is_initializer() for value in product.inputs[:2] if value is not None)


def _is_quantized(value: ir.Value | None) -> bool:
    """Whether `value` comes out of a DequantizeLinear, moves aside."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _PASSED - QDQ and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _source(value: ir.Value) -> ir.Value:
    while (node := value.producer()) is not None and node.op_type in _PASSED and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _whole_attention(softmax: ir.Node) -> Iterator[ir.Node]:
    """Both products of an attention, if all four of their operands are quantized."""
    after = next((node for node, index in _behind(softmax.outputs[0]) if node.op_type == "MatMul" and index == 0), None)
    before = softmax.inputs[0]
    while before is not None and (node := before.producer()) is not None and node.op_type != "MatMul":
        if node.op_type not in _PASSED | {"Add", "Mul", "Div", "Where"}:
            return
        before = node.inputs[1] if node.op_type == "Where" else node.inputs[0]
    product = None if before is None else before.producer()
    if after is None or product is None or not all(map(_is_quantized, (*after.inputs, *product.inputs))):
        return
    yield from (product, after)


def _behind(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    for user, index in value.uses():
        yield from _readers(user, index)


def _move_down(graph: ir.Graph, inserter: Inserter) -> list[Change]:
    """Let moves work on integers, and drop a Q right behind a DQ of the same scale."""
    changes = []
    waiting = [node for node in graph if _is_activation_dq(node)]
    while waiting:
        dq = waiting.pop(0)
        for user, index in list(dq.outputs[0].uses()):
            if user.op_type == "QuantizeLinear" and index == 0 and _same_scale(user, dq):
                assert dq.inputs[0] is not None
                ir.convenience.replace_all_uses_with(user.outputs[0], dq.inputs[0])
                changes.append(Change(label_of(user), "dropped behind a DequantizeLinear of the same scale"))
            elif user.op_type in _MOVES and index == 0 and _scalar_scale(dq) and not _is_output(user):
                waiting.extend(_swap(dq, user, inserter))
                changes.append(Change(label_of(user), f"{user.op_type} moves integers"))
    return changes


def _swap(dq: ir.Node, move: ir.Node, inserter: Inserter) -> list[ir.Node]:
    """DQ → move becomes move → DQ, one for each of its outputs; return the new DQs."""
    integers, after = dq.inputs[0], []
    assert integers is not None
    move.replace_input_with(0, integers)
    for output in move.outputs:
        float_type = output.dtype or ir.DataType.FLOAT
        uses = list(output.uses())
        output.type = ir.TensorType(integers.dtype or ir.DataType.INT8)
        new = inserter.node(
            "DequantizeLinear",
            [output, *(value for value in dq.inputs[1:] if value is not None)],
            dtype=float_type,
            module=move.metadata_props.get(MODULE_KEY, ""),
            shape=output.shape,
        )
        node = new.producer()
        assert node is not None
        inserter.graph.remove(node)
        inserter.graph.insert_after(move, node)
        for user, index in uses:
            user.replace_input_with(index, new)
        after.append(node)
    return after


def _is_output(node: ir.Node) -> bool:
    return any(value.is_graph_output() for value in node.outputs)


def _scalar_scale(node: ir.Node) -> bool:
    scale = scale_of(node)
    return scale is not None and scale.ndim == 0


def _same_scale(first: ir.Node, second: ir.Node) -> bool:
    one, other = scale_of(first), scale_of(second)
    if one is None or other is None:
        return False
    return np.array_equal(one, other) and np.array_equal(_zero(first), _zero(second))


def _zero(node: ir.Node) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    zero = constant_of(input_at(node, 2))
    return np.zeros(()) if zero is None else zero
