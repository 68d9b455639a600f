"""The kernels that a compiler would make of a graph, by rules: where TensorRT-RTX is missing or refuses the graph.

| what | becomes |
|---|---|
| product with a constant weight | one kernel, and all arithmetic, value by value, that follows it alone: its epilogue |
| MatMul ─ … ─ Softmax ─ … ─ MatMul, or Attention | one kernel, with what scales and masks its scores |
| anything else that can be reached from it | one kernel, as far as no product lies between |
| Reshape, DequantizeLinear, what orders an attention's output | none: a view |
| control flow, another domain, an unknown shape | one kernel of the kind `other`, whose bytes alone count |

An operator joins the kernel of its youngest input if that is no product and it reads nothing younger, or if it is
arithmetic and that is a product. So no two kernels wait for each other. What it comes to is tested against compiled
plans, in the number of kernels and the sizes of products (tests/deploy/test_fusion_model.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import onnx_ir as ir

from deploy.compiled_kernels import CompiledKernel, CompiledTensor
from deploy.tensorrt_api import ShapeRange
from exporters.linears import find_linears
from exporters.passes.fix_shapes import FixShapes

_BY_VALUE = frozenset(
    ["Add", "Sub", "Mul", "Div", "Relu", "Gelu", "Sigmoid", "Tanh", "Erf", "Exp", "Sqrt", "Pow", "Neg", "Clip", "Min",
     "Max", "HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Softplus", "Mish", "PRelu", "Where", "Reciprocal", "Abs",
     "Round", "Swish", "QuantizeLinear", "Cast"]
)  # fmt: skip
_VIEWS = frozenset(["Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "DequantizeLinear", "Dropout"])
_POOLINGS = frozenset(["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"])
_CONTROL = frozenset(["If", "Loop", "Scan", "NonMaxSuppression", "LSTM", "GRU", "RNN"])
_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
_FEW = 64  # values: no shape has more
_ATTENTIONS = ("Attention", "MultiHeadAttention")
_HEADS = ("q_num_heads", "num_heads")
_KINDS = {
    **dict.fromkeys(_ATTENTIONS, "attention"),
    **dict.fromkeys(("MatMul", "Gemm", "Einsum"), "gemm"),
    **dict.fromkeys(("Conv", "ConvTranspose"), "convolution"),
    **dict.fromkeys(_POOLINGS, "pooling"),
}
_NAMES = {
    ir.DataType.FLOAT: "Float",
    ir.DataType.FLOAT16: "Half",
    ir.DataType.BFLOAT16: "BFloat16",
    ir.DataType.INT8: "Int8",
    ir.DataType.FLOAT8E4M3FN: "FP8",
    ir.DataType.INT64: "Int64",
    ir.DataType.INT32: "Int32",
    ir.DataType.BOOL: "Bool",
}


@dataclass(eq=False)
class _Group:
    """A kernel that is being put together; it reads from those of a lower order alone."""

    kind: str
    order: int
    nodes: list[ir.Node] = field(default_factory=list)


def fused_kernels(model: ir.Model, batch: ShapeRange, usual: Mapping[str, Sequence[int]]) -> list[CompiledKernel]:
    """Return the kernels of `model`, which stays as it is, at the usual batch and shapes.

    Args:
        model: a graph as surgery leaves it, or any other.
        batch: its usual size counts.
        usual: the shapes of inputs that vary in more than the batch.
    """
    graph = _sized(model, batch, usual).graph
    fusion = _Fusion(graph)
    for node in graph:
        fusion.take(node)
    return [fusion.kernel(group) for group in fusion.groups]


def _sized(model: ir.Model, batch: ShapeRange, usual: Mapping[str, Sequence[int]]) -> ir.Model:
    sized = model.clone()
    for value in sized.graph.inputs:
        if value.shape is not None:
            shape = usual.get(value.name or "")
            value.shape = ir.Shape(shape or (dim if isinstance(dim, int) else batch.usual for dim in value.shape))
    FixShapes()(sized)
    return sized


class _Fusion:
    """The kernels of a graph, its operators taken one after another."""

    def __init__(self, graph: ir.Graph) -> None:
        self.groups: list[_Group] = []
        self._made: dict[ir.Node | None, _Group] = {}
        self._products = {linear.node: linear.kind for linear in find_linears(graph)}
        self._attentions = dict(_attentions(graph))
        self._constants = set(graph.initializers.values())

    def take(self, node: ir.Node) -> None:
        """Put `node` into a kernel, unless it is a view or computes constants or sizes."""
        if all(value in self._constants for value in node.inputs if value is not None) or _tells_sizes(node):
            self._constants.update(node.outputs)
        elif node.op_type not in _VIEWS:
            group = self._group_of(node)
            group.nodes.append(node)
            self._made[node] = group

    def kernel(self, group: _Group) -> CompiledKernel:
        """The kernel, its tensors and operators."""
        inputs: list[CompiledTensor] = []
        constants: list[CompiledTensor] = []
        for value in self._read(group):
            (constants if value in self._constants else inputs).append(_tensor(value))
        outputs = [_tensor(value) for node in group.nodes for value in node.outputs if self._leaves(value, group)]
        if group.kind == "attention":
            inputs, outputs = _by_head(group, inputs, outputs)
        names = tuple(node.name or "" for node in group.nodes)
        return CompiledKernel(
            f"{names[0]}_{group.order}", group.kind, tuple(inputs), tuple(constants), tuple(outputs), names
        )

    def _read(self, group: _Group) -> Iterator[ir.Value]:
        for node in group.nodes:
            for value in node.inputs:
                if value is not None and self._maker(value) is not group:
                    yield value

    def _leaves(self, value: ir.Value, group: _Group) -> bool:
        return value.is_graph_output() or any(self._made.get(reader) is not group for reader in _readers(value))

    def _maker(self, value: ir.Value | None) -> _Group | None:
        return None if value is None else self._made.get(_root(value).producer())

    def _group_of(self, node: ir.Node) -> _Group:
        """The kernel that `node` joins, or a new one."""
        if node in self._products:
            return self._new("convolution" if self._products[node] == "conv" else "gemm")
        if node in self._attentions:
            return self._made.get(self._attentions[node]) or self._new("attention")
        kind = "other" if _is_unknown(node) else _KINDS.get(node.op_type)
        return self._joined(node) if kind is None else self._new(kind)

    def _new(self, kind: str) -> _Group:
        self.groups.append(_Group(kind, len(self.groups)))
        return self.groups[-1]

    def _joined(self, node: ir.Node) -> _Group:
        read = [group for value in node.inputs if (group := self._maker(value)) is not None]
        if not read:
            return self._new("pointwise")
        youngest = max(read, key=lambda group: group.order)
        if youngest.kind == "pointwise" or self._is_epilogue(node, youngest):
            return youngest
        return self._sibling(node, youngest) or self._new("pointwise")

    def _is_epilogue(self, node: ir.Node, product: _Group) -> bool:
        """Whether it works value by value on what `product` alone has made, and nobody else waits for that."""
        if product.kind == "attention":
            return node.op_type in ("Transpose", "QuantizeLinear", "Cast")
        if product.kind == "pooling" or node.op_type not in _BY_VALUE:
            return False
        own = [value for value in node.inputs if value is not None and self._maker(value) is product]
        return all(_readers(value) <= {node, *product.nodes} or _swish(value, node) for value in own)

    def _sibling(self, node: ir.Node, youngest: _Group) -> _Group | None:
        """A kernel without a product that reads what `node` reads."""
        mine = {_root(value) for value in node.inputs if value is not None and value not in self._constants}
        for group in reversed(self.groups[youngest.order + 1 :]):
            if group.kind == "pointwise" and any(_root(value) in mine for value in self._read(group)):
                return group
        return None


def _is_unknown(node: ir.Node) -> bool:
    """Whether nothing is known of the time that it takes: no rule covers it, and its bytes alone can count."""
    standard = node.domain in ("", "ai.onnx")
    return not standard or node.op_type in _CONTROL or any(value.shape is None for value in node.outputs)


def _tells_sizes(node: ir.Node) -> bool:
    """Whether it computes sizes, for which there is no kernel."""
    out = node.outputs[0]
    few = out.shape is not None and prod(_dims(out)) <= _FEW
    return node.op_type in ("Shape", "Constant", "ConstantOfShape", "Range") or (out.dtype in _INTEGERS and few)


def _swish(value: ir.Value, node: ir.Node) -> bool:
    """Whether the other readers of `value` are read by `node`, or read what it writes: x · σ(x)."""
    return all(
        reader is node or (reader.op_type in _BY_VALUE and _feeds(reader, node)) or _feeds(node, reader)
        for reader in _readers(value)
    )


def _feeds(first: ir.Node, second: ir.Node) -> bool:
    return any(second in _readers(value) for value in first.outputs)


def _root(value: ir.Value) -> ir.Value:
    """What `value` is a view of."""
    maker = value.producer()
    while maker is not None and maker.op_type in _VIEWS and maker.inputs[0] is not None:
        value = maker.inputs[0]
        maker = value.producer()
    return value


def _readers(value: ir.Value) -> set[ir.Node]:
    """The operators that read it, through views."""
    found: set[ir.Node] = set()
    for use in value.uses():
        found |= _readers(use.node.outputs[0]) if use.node.op_type in _VIEWS else {use.node}
    return found


def _attentions(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Each operator of an attention that is written out, with the product of its scores."""
    for node in graph:
        if node.op_type != "Softmax":
            continue
        before, after = _chain(node, backward=True), _chain(node, backward=False)
        if before and after:
            for each in (*before, node, *after):
                yield each, before[-1]


def _chain(softmax: ir.Node, *, backward: bool) -> list[ir.Node]:
    """From `softmax` to the next product of two activations; empty where something else comes first."""
    found: list[ir.Node] = []
    node = softmax
    while True:
        value = node.inputs[0] if backward else node.outputs[0]
        if value is None:
            return []
        maker, readers = _root(value).producer(), _readers(value)
        following = maker if backward else next(iter(readers)) if len(readers) == 1 else None
        if following is None or following.op_type not in (*_BY_VALUE, "MatMul"):
            return []
        node = following
        found.append(node)
        if node.op_type == "MatMul":
            return found


def _by_head(
    group: _Group, inputs: list[CompiledTensor], outputs: list[CompiledTensor]
) -> tuple[list[CompiledTensor], list[CompiledTensor]]:
    """The tensors of an attention as its kernel has them, [batch × heads, tokens, channels], whatever orders them."""
    core = next(node for node in reversed(group.nodes) if node.op_type in ("MatMul", *_ATTENTIONS))
    heads = next((core.attributes[name].as_int() for name in _HEADS if name in core.attributes), 0)
    written = [replace(tensor, dims=_dims(core.outputs[0]), strides=()) for tensor in outputs[:1]]
    return [_split(tensor, heads) for tensor in inputs], [_split(tensor, heads) for tensor in written]


def _split(tensor: CompiledTensor, heads: int) -> CompiledTensor:
    dims = tensor.dims
    if heads and len(dims) == 3:
        dims = (dims[0] * heads, dims[1], dims[2] // heads)
    return replace(tensor, dims=dims, strides=(1,) * len(dims))


def _tensor(value: ir.Value) -> CompiledTensor:
    """The value as a kernel reads it: its own shape, and the type that is stored, behind any DequantizeLinear."""
    stored = _root(value)
    dims = _dims(value)
    return CompiledTensor(
        stored.name or "", dims, (1,) * len(dims), _NAMES.get(stored.dtype or ir.DataType.FLOAT, "Float")
    )


def _dims(value: ir.Value) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else 1 for dim in value.shape or ())
