"""A graph whose quantizers can be switched one by one while it is loaded: one session answers for every combination.

    x ─► FakeQuantize s ─► MatMul      →     x ─► If(on) ── then: QuantizeLinear ─► DequantizeLinear ─┬─► MatMul
    W ─► FakeQuantize ─────► ▲                           └─ else: Identity ───────────────────────────┘     ▲
                                             W, an input of the graph whose default is the float weight ────┘

A unit is what a placement quantizes together: the quantizers of one module. While it is off it computes what the float
graph does, its weight and its bias among it, whatever was done to them for the sake of the quantizer. While it is on,
its weight is given as its integers say it. Only the If's branch that is taken is computed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.inference import answer_only, feeds, open_session
from calibration.output_loss import without_padding
from calibration.probes import Feed
from calibration.rows import head
from exporters.float_twin import is_fake_quantizer
from exporters.linears import array_of
from exporters.module_names import label_of
from exporters.passes.correct_biases import corrected_biases
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.lower_fake_quantize import quantizer_of
from exporters.quantizer import INT8, Quantizer

Array = npt.NDArray[Any]
_FLAG = ".on"


@dataclass(frozen=True)
class _Constant:
    """A weight or a bias of a unit: the input that takes it, and what it is while the unit is on."""

    unit: str
    name: str
    stored: ir.TensorProtocol
    quantizer: Quantizer | None

    def value(self) -> npt.NDArray[np.float32]:
        values = np.asarray(self.stored.numpy(), np.float32)
        return values if self.quantizer is None else self.quantizer.real(self.quantizer.integers(values))


@dataclass
class SwitchedGraph:
    """The session, and what its switches are called.

    Attributes:
        units: the products that each unit computes for one sample, or for one token where lengths vary.
    """

    feed: Feed
    units: dict[str, float]
    _constants: list[_Constant]
    _flags: dict[str, str]
    _scales: dict[str, str]
    _session: Any = field(repr=False)

    def readers(self, tensor: str) -> frozenset[str]:
        """The units that quantize an activation."""
        return frozenset(unit for flag, unit in self._flags.items() if self._scales[f"{flag}.scale"] == tensor)

    def answers(
        self, on: Collection[str], count: int | None = None, amax: Mapping[str, float] | None = None
    ) -> Iterator[Array]:
        """The first output on each batch with the units `on` quantized, all others float.

        Args:
            on: names of units.
            count: how many of the samples; None: all.
            amax: ranges of activations by tensor, instead of those that were placed.
        """
        unknown = set(on) - set(self.units)
        if unknown:
            raise ValueError(f"no unit {sorted(unknown)[0]!r}")
        switches = {flag: np.array(unit in on) for flag, unit in self._flags.items()}
        weights = {constant.name: constant.value() for constant in self._constants if constant.unit in on}
        scales = {name: _scale((amax or {})[tensor]) for name, tensor in self._scales.items() if tensor in (amax or {})}
        asked = [wanted for wanted in self._session.get_inputs() if wanted.name not in switches]
        samples = {name: rows if count is None else head(rows, count) for name, rows in self.feed.samples.items()}
        for feed in feeds(asked, samples, self.feed.batch):
            yield without_padding(self._session.run(None, {**feed, **switches, **weights, **scales})[0], feed)


def switched_graph(model: ir.Model, placed: ir.Model, feed: Feed) -> SwitchedGraph:
    """Load a copy of `placed` with a switch for each unit.

    Args:
        model: the float graph.
        placed: the same with `gpusq::FakeQuantize` where a placement quantizes, weights and biases changed or not.
        feed: the samples that it will be asked about.
    """
    graph_model = placed.clone()
    graph = graph_model.graph
    units = _costs(graph)
    answer_only(graph_model, list(graph.outputs)[:1])
    inserter, constants, flags, scales = Inserter(graph), [], {}, {}
    floats = {value.name: value for value in model.graph.initializers.values()}
    for index, node in enumerate([node for node in graph if is_fake_quantizer(node)]):
        x = node.inputs[0]
        assert x is not None
        if x.is_initializer():
            assert x.const_value is not None
            constant = _Constant(unit_of(node), f"{unit_of(node)}.weight.{index}", x.const_value, quantizer_of(node))
            constants.append(constant)
            _as_input(inserter, node, constant.name, floats[x.name].const_value)
        else:
            flag = f"{unit_of(node)}.{index}{_FLAG}"
            flags[flag] = unit_of(node)
            _switched(inserter, node, flag, index)
            scales[f"{flag}.scale"] = str(x.name)
    constants += _biases(model, graph)
    drop_unused_initializers(graph)
    graph_model.opset_imports.pop("gpusq", None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "switched.onnx"
        ir.save(graph_model, path, external_data="switched.data")
        return SwitchedGraph(feed, units, constants, flags, scales, open_session(path))


def _scale(amax: float) -> npt.NDArray[np.float32]:
    """That of a range; of what is nothing but zeros, any."""
    return np.asarray((amax or 1.0) / INT8[1], np.float32)


def unit_of(node: ir.Node) -> str:
    """The module whose quantizer `node` is: `blocks.0.mlp.fc1` of the place `blocks.0.mlp.fc1.input`."""
    return node.attributes["place"].as_string().rpartition(".")[0]


def _costs(graph: ir.Graph) -> dict[str, float]:
    units = dict.fromkeys((unit_of(node) for node in graph if is_fake_quantizer(node)), 0.0)
    for node in graph:
        if label_of(node) in units and any(is_fake_quantizer(_producer(value)) for value in node.inputs):
            units[label_of(node)] += _products(node)
    return units


def _producer(value: ir.Value | None) -> ir.Node | None:
    """What makes a value, looking through the transposes and reshapes of a weight."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Transpose", "Reshape", "Squeeze", "Unsqueeze") and node.inputs:
        first = node.inputs[0]
        node = None if first is None else first.producer()
    return node


def _products(node: ir.Node) -> float:
    """How many products a node computes for one sample; dimensions that vary count once."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op_type == "Conv":
        return _elements(node.outputs[0]) * _elements(weight, first=1)
    if node.op_type == "ConvTranspose":
        return _elements(node.inputs[0]) * _elements(weight, first=1)
    inner = list(node.inputs[0].shape or [])[-1:] if node.inputs[0] is not None else []
    k = inner[0] if node.op_type in ("MatMul", "Gemm") and inner and isinstance(inner[0], int) else 1
    return _elements(node.outputs[0]) * k


def _elements(value: ir.Value | None, first: int = 0) -> float:
    shape = [] if value is None or value.shape is None else list(value.shape)[first:]
    return float(np.prod([length for length in shape if isinstance(length, int)] or [1]))


def _as_input(inserter: Inserter, node: ir.Node, name: str, tensor: ir.TensorProtocol | None) -> None:
    """Let an input of the graph with the default `tensor` take the place of a weight's quantizer."""
    assert tensor is not None
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, const_value=tensor, shape=shape, type=kind)
    inserter.graph.register_initializer(value)
    inserter.graph.inputs.append(value)
    ir.convenience.replace_all_uses_with(node.outputs[0], value)
    inserter.graph.remove(node, safe=True)


def _switched(inserter: Inserter, node: ir.Node, flag: str, index: int) -> None:
    """Let an If take the place of an activation's quantizer."""
    x = node.inputs[0]
    assert x is not None
    scale = inserter.initializer(f"{flag}.scale", quantizer_of(node).scale)
    inserter.graph.inputs.append(scale)
    on = ir.Value(name=flag, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    inserter.graph.inputs.append(on)
    zero = inserter.initializer("gpusq.switch.zero", np.zeros((), np.int8))
    quantize = ir.node("QuantizeLinear", [x, scale, zero])
    branches = (
        _branch("then", [quantize, ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])], x, index),
        _branch("else", [ir.node("Identity", [x])], x, index),
    )
    node_if = ir.Node(
        "",
        "If",
        [on],
        attributes=[ir.AttrGraph(f"{branch.name}_branch", branch) for branch in branches],
        name=f"gpusq.switch/{index}",
    )
    node_if.outputs[0].type, node_if.outputs[0].shape = x.type, x.shape
    inserter.graph.insert_before(node, node_if)
    inserter.replace(node, node_if.outputs[0])
    if node_if.outputs[0].name is None:
        node_if.outputs[0].name = f"gpusq.switch/{index}:0"


def _branch(name: str, nodes: list[ir.Node], x: ir.Value, index: int) -> ir.Graph:
    for node in nodes:
        node.name = f"gpusq.switch/{index}/{name}/{node.op_type}"
        node.outputs[0].name = f"{node.name}:0"
    nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = x.type, x.shape
    return ir.Graph([], [nodes[-1].outputs[0]], nodes=nodes, name=name)


def _biases(model: ir.Model, graph: ir.Graph) -> Iterator[_Constant]:
    """The biases that were corrected for the sake of a unit's quantizers, each an input with its float value."""
    floats: Mapping[str | None, ir.Node] = {node.outputs[0].name: node for node in model.graph}
    for number, (unit, reader, index) in enumerate(list(corrected_biases(graph))):
        value = reader.inputs[index]
        assert value is not None
        assert value.const_value is not None
        source = floats[reader.outputs[0].name]
        old = source.inputs[index] if index < len(source.inputs) else None
        zeros = np.zeros(value.const_value.shape.numpy(), np.float32)
        name = f"{unit}.bias.{number}"
        constant = _Constant(unit, name, value.const_value, None)
        default = ir.tensor(zeros if old is None else array_of(old).astype(np.float32), name=name)
        given = ir.Value(name=name, const_value=default, shape=ir.Shape(default.shape.numpy()), type=value.type)
        graph.register_initializer(given)
        graph.inputs.append(given)
        reader.replace_input_with(index, given)
        yield constant
