"""Take from each bias the mean error that quantization adds to the layer's outputs.

    b[n]  →  b[n] − E[ŷ[n] − y[n]]          y and ŷ: outputs of the float and the quantized graph, arXiv 1906.04721, 4.2

The mean is over samples and positions, layer by layer in the order of the graph: ŷ of a layer comes from a graph whose
layers before it are corrected already. All of it is measured in one run, for both graphs stand side by side and each ŷ
passes on what is left of it when its mean error over the batch is taken away:

    y ──────────────► Sub ─► ReduceMean ─► −error [C]
    ŷ ─┬──────────────▲                    │
       └────────────────────────────► Add ─▼─► to the layers behind

The bias gets the mean over the batches. Layers with trained scales, and those without a bias, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.inference import over_batches, rows_of
from calibration.padding import mask_of
from calibration.probes import Feed
from exporters.derived_tensor import release
from exporters.float_twin import float_twin, is_fake_quantizer
from exporters.linears import Linear, array_of, array_shape, find_linears
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.lower_fake_quantize import LowerFakeQuantize
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.qdq_scales import input_at

_CORRECTED = ".bias_corrected"  # in such a bias's name: the float graph is no reference any more
_HAS_BIAS = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class _Layer:
    """A layer: its name, the name of its output, the axis of its channels and how many there are."""

    module: str
    output: str
    axis: int
    channels: int


@dataclass(frozen=True)
class CorrectBiases:
    """Correct the biases of the layers that got quantizers, on the samples of `feed`."""

    feed: Feed

    def __call__(self, model: ir.Model) -> Outcome:
        """Correct them; what is left alone is told with the reason."""
        left: list[LeftAlone] = []
        layers = _layers(model, left)
        if any(
            attribute.type == ir.AttributeType.GRAPH for node in model.graph for attribute in node.attributes.values()
        ):
            left += [LeftAlone(layer.module, "the graph has branches or loops") for layer in layers]
            layers = []
        inserter, changes = Inserter(model.graph), []
        for layer, shift in zip(layers, self._shifts(model, layers), strict=True):
            _add_to_bias(model, layer, shift, inserter)
            changes.append(Change(layer.module, f"bias moved by up to {np.abs(shift).max():.3g}"))
        drop_unused_initializers(model.graph)
        return Outcome("correct biases", len(changes), tuple(left), tuple(changes))

    def _shifts(self, model: ir.Model, layers: Sequence[_Layer]) -> list[npt.NDArray[np.float32]]:
        """What each layer's bias is short of, [C]."""
        joint = _side_by_side(model, layers)
        names = [f"{layer.output}/shift" for layer in layers]

        def attach(graph: ir.Graph) -> list[ir.Value]:
            values = {value.name: value for node in graph for value in node.outputs}
            return [values[name] for name in names]

        sums: list[npt.NDArray[np.float64]] = []
        total = 0
        for inputs, arrays in over_batches(joint, attach, self.feed.samples, self.feed.batch):
            rows = rows_of(inputs)
            weighted = [rows * array.astype(np.float64) for array in arrays]
            sums = weighted if not sums else [one + other for one, other in zip(sums, weighted, strict=True)]
            total += rows
        return [(one / total).astype(np.float32) for one in sums]


def _layers(model: ir.Model, left: list[LeftAlone]) -> list[_Layer]:
    """The layers with a quantizer of this placement and a bias."""
    nodes = {node.outputs[0].name: node for node in model.graph}
    weights = {node.inputs[0].name for node in model.graph if is_fake_quantizer(node) and node.inputs[0] is not None}
    found = []
    for linear in find_linears(float_twin(model).graph):
        node = nodes[linear.node.outputs[0].name]
        activation = node.inputs[linear.activation_input]
        quantized = activation is not None and is_fake_quantizer(activation.producer())
        if why := _why_not(linear, node, quantized=quantized or linear.weight.name in weights):
            left.append(LeftAlone(linear.module, why))
        else:
            axis = 1 if linear.kind == "conv" else -1
            found.append(_Layer(linear.module, str(node.outputs[0].name), axis, linear.n))
    return found


def _why_not(linear: Linear, node: ir.Node, *, quantized: bool) -> str:
    if not quantized:
        return "it has trained scales" if linear.weight_dq is not None else "it is not quantized"
    if node.outputs[0].shape is None:
        return "the shape of its output is not known"
    if linear.kind == "gemm" and linear.activation_input != 0:
        return "its weight is on the left"
    bias = _bias_of(node)
    if bias is None:
        return "it has no bias"
    reader, index = bias
    value = input_at(reader, index)
    constant = value is None or (value.is_initializer() and not value.is_graph_input())
    if not constant or (value is not None and array_shape(value) != (linear.n,)):
        return "its bias is no constant for each output"
    if value is not None and _CORRECTED in str(value.name):
        return "its bias is corrected already"
    return "" if node.attributes.get_float("beta", 1.0) == 1 else "its bias is multiplied by beta"


def _bias_of(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The node that adds the bias of a layer, and which of its inputs it is, there or not."""
    if node.op_type in _HAS_BIAS:
        return node, 2
    users = list(node.outputs[0].uses())
    if len(users) != 1 or users[0].node.op_type != "Add" or users[0].node.domain:
        return None
    other = users[0].node.inputs[1 - users[0].idx]
    return (users[0].node, 1 - users[0].idx) if other is not None and other.is_initializer() else None


def corrected_biases(graph: ir.Graph) -> Iterator[tuple[str, ir.Node, int]]:
    """Yield the module of each bias that was corrected, the node that reads it, and as which of its inputs."""
    for value in list(graph.initializers.values()):
        module, found, _ = str(value.name).partition(_CORRECTED)
        for use in value.uses() if found else ():
            yield module, use.node, use.idx


def _add_to_bias(model: ir.Model, layer: _Layer, shift: npt.NDArray[np.float32], inserter: Inserter) -> None:
    node = next(node for node in model.graph if node.outputs[0].name == layer.output)
    place = _bias_of(node)
    assert place is not None
    reader, index = place
    bias = input_at(reader, index)
    dtype = (node.outputs[0].dtype or ir.DataType.FLOAT).numpy()
    old = np.float32(0) if bias is None else array_of(bias).astype(np.float32)
    if bias is not None:
        release(bias.const_value)
    reader.resize_inputs(max(index + 1, len(reader.inputs)))
    reader.replace_input_with(index, inserter.initializer(f"{layer.module}{_CORRECTED}", (old + shift).astype(dtype)))


def _side_by_side(model: ir.Model, layers: Sequence[_Layer]) -> ir.Model:
    """Both graphs in one, the quantized one corrected on the way; `NAME/shift` of each output is its mean error."""
    joint = model.clone()
    by_output = {layer.output: layer for layer in layers}
    floats: dict[ir.Value | None, ir.Value] = {}
    for node in list(joint.graph):
        if is_fake_quantizer(node):
            source = node.inputs[0]
            assert source is not None
            floats[node.outputs[0]] = floats.get(source, source)
        elif any(value in floats for value in node.inputs):
            copy = _copied(node, floats)
            floats.update(zip(node.outputs, copy.outputs, strict=True))
            layer = by_output.get(str(node.outputs[0].name))
            if layer is not None:
                floats[_corrected(layer, node.outputs[0], copy)] = copy.outputs[0]
    LowerFakeQuantize()(joint)
    return joint


def _copied(node: ir.Node, floats: Mapping[ir.Value | None, ir.Value]) -> ir.Node:
    """The node once more behind itself, on what the float graph has in place of its inputs."""
    copy = ir.node(
        node.op_type,
        [value if value is None else floats.get(value, value) for value in node.inputs],
        attributes={name: attribute.value for name, attribute in node.attributes.items()},
        domain=node.domain,
        num_outputs=len(node.outputs),
        name=f"{node.outputs[0].name}/float",
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name, new.type, new.shape = f"{old.name}/float", old.type, old.shape
    assert node.graph is not None
    node.graph.insert_after(node, copy)
    return copy


def _corrected(layer: _Layer, output: ir.Value, float_node: ir.Node) -> ir.Value:
    """Let what reads `output` read it with the mean error of each channel taken away; returns that."""
    assert output.shape is not None
    graph, rank, readers = float_node.graph, len(output.shape), list(output.uses())
    assert isinstance(graph, ir.Graph)
    axes = [axis for axis in range(rank) if axis != layer.axis % rank]
    constants = [
        _constant(graph, f"{layer.output}/{name}", values) for name, values in (("axes", axes), ("flat", [-1]))
    ]
    last: ir.Node = float_node

    def add(op_type: str, name: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        nonlocal last
        node = ir.node(op_type, list(inputs), attributes=attributes, name=f"{layer.output}/{name}")
        node.outputs[0].name, node.outputs[0].type = node.name, output.type
        graph.insert_after(last, node)
        last = node
        return node.outputs[0]

    error = add("Sub", "error", [float_node.outputs[0], output])
    mask = mask_of(graph, output)
    if mask is None:
        mean = add("ReduceMean", "mean", [error, constants[0]])
    else:  # the mean over what is no padding
        behind = _constant(graph, f"{layer.output}/behind", list(range(len(mask.shape or ()) - rank, 0)))
        cast = add("Cast", "mask", [mask], to=int(output.dtype or ir.DataType.FLOAT))
        kept = add("Unsqueeze", "kept", [cast, behind])
        share = add("ReduceMean", "share", [kept, constants[0]])
        mean = add(
            "Div", "mean", [add("ReduceMean", "sum", [add("Mul", "masked", [error, kept]), constants[0]]), share]
        )
    flat = add("Reshape", "shift", [mean, constants[1]])
    flat.shape = ir.Shape([layer.channels])
    corrected = add("Add", "corrected", [output, mean])
    corrected.shape = output.shape
    for use in readers:
        use.node.replace_input_with(use.idx, corrected)
    return corrected


def _constant(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name))
    graph.register_initializer(value)
    return value
