"""What the surgery makes of graphs that come with Q/DQ: `python tests/exporters/measure_repair.py [NAME…]`.

    model · by · kernels before and after · quantizers before and after · differences of the outputs, in steps

Before is the graph as it was read, typed FP16 and nothing else; "-" where the compiler refuses it. The students and the
small models are those of `qdq_students.py`, the others those of `plans.py`, quantized by onnxruntime's
quantize_static and, where GPUSQ_MODELOPT_PYTHON names the interpreter of its environment, by ModelOpt.

Outputs are compared as float32 graphs on onnxruntime, which fuses nothing; a float16 graph, which ModelOpt writes by
default, is widened first. onnxruntime computes float16 operators in float32 on a CPU and rounds what they give, but not
where another such operator reads it: it drops the two casts in between. Where a quantizer or an Identity is gone, the
same numbers would be rounded once less, and what then falls to the other side of an INT8 step is a whole step further
on: without widening, ModelOpt's ResNet-50 shows 1.9 steps under "cut", with it none.

**A step** is the scale of the quantizer that gives the output; where none does, one INT8 step of what the graph
answered before: its largest magnitude / 127.

| column | the repaired graph against | says |
|---|---|---|
| before | the graph as it came | how much the answers moved |
| cut | the graph as it came, without the quantizers that are gone | what was moved or merged is the same to a step |
| float | as before, both without any quantizer | no weight and no operator changed |
| noise | root mean squares to the float graph, before and after | what was removed had only added to it |

A quantizer that is taken away leaves its tensor up to half a step of its own scale nearer to what it was, more where it
clamped. That is one step of the output for one of them; a dozen blocks of a transformer whose residual stream was
quantized differ by several. So "before" is bounded by a step where nothing was removed, and "cut" always.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploy.ahead_of_time import compile_ahead
from exporters.passes.outcome import Change
from exporters.passes.type_floats import TypeFloats
from exporters.qdq_scales import constant_of
from exporters.save_onnx import save_onnx
from exporters.surgery import Target, surgery
from profiles.device import load_device
from profiles.errors import GpusqError

Array = npt.NDArray[Any]
PROFILE = "a100"
LARGE = ("DeiT-S (timm)", "DeiT-S (HF)", "Swin-T (timm)", "MobileNetV2", "ResNet-50")
HALF = ir.DataType.FLOAT16
_LEVELS = 127
_MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Split", "Identity"})


@dataclass(frozen=True)
class Scales:
    """The float32 bits of the scales in a graph: of weights, one for each channel, and of activations, one for each Q.

    Attributes:
        shared: scales of constants as a whole, which is how tools quantize biases and positions too.
    """

    channels: Counter[float]
    activations: Counter[float]
    shared: Counter[float]


@dataclass(frozen=True)
class Repaired:
    """The graph before and after, in float32, and what `RepairQdq` told."""

    before: ir.Model
    after: ir.Model
    changes: tuple[Change, ...]

    @property
    def removed(self) -> list[Change]:
        """The changes that may change a number."""
        return [change for change in self.changes if change.what.startswith("removed")]


@dataclass(frozen=True)
class Differences:
    """Of the outputs, in steps: the largest ones, and the root mean squares to the float graph."""

    before: float
    cut: float
    floats: float
    noise_before: float
    noise_after: float


def repaired(model: ir.Model) -> Repaired:
    """The surgery as trained, in float32."""
    after = model.clone()
    told = surgery(after, Target(load_device(PROFILE), "float32", "as-trained"))
    changes = [change for outcome in told if outcome.name == "repair Q/DQ" for change in outcome.changes]
    return Repaired(model, after, tuple(changes))


def scales_of(model: ir.Model) -> Scales:
    """Every scale of `model`."""
    found = Scales(Counter(), Counter(), Counter())
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = constant_of(node.inputs[1])
        assert scale is not None
        assert scale.dtype == np.float32
        if node.op_type == "QuantizeLinear":
            found.activations[float(scale)] += 1
        elif _reads_constant(node):
            (found.channels if scale.ndim else found.shared).update(scale.reshape(-1).tolist())
    return found


def quantizers(model: ir.Model) -> set[str]:
    """The names of what quantizes; the surgery renames no node."""
    return {node.name or "" for node in model.graph if node.op_type == "QuantizeLinear"}


def without_quantizers(model: ir.Model, kept: Collection[str] = ()) -> ir.Model:
    """A copy of `model` where no activation is quantized but by the nodes in `kept`."""
    model = model.clone()
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear" and node.name not in kept:
            _pass_through(node)
    for node in list(model.graph):
        source = _source(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        if source is not None and not source.is_initializer() and not _is_quantized(source):
            _pass_through(node)
        elif node.op_type in _MOVES and node.inputs[0] is not None:
            _forget_types(node)
    RemoveUnusedNodesPass()(model)
    return model


def differences(found: Repaired, feeds: Mapping[str, Array]) -> Differences:
    """Compare the outputs for `feeds`."""
    before, after = answer(found.before, feeds), answer(found.after, feeds)
    cut = answer(without_quantizers(found.before, quantizers(found.after)), feeds)
    floats = [answer(without_quantizers(model), feeds) for model in (found.before, found.after)]
    step = step_of(found.before, before)
    return Differences(
        before=float(np.abs(after - before).max()) / step,
        cut=float(np.abs(after - cut).max()) / step,
        floats=float(np.abs(floats[1] - floats[0]).max()) / step,
        noise_before=_rms(before - floats[0]) / step,
        noise_after=_rms(after - floats[0]) / step,
    )


def step_of(model: ir.Model, answered: Array) -> float:
    """One step of the output, as the module says."""
    producer = model.graph.outputs[0].producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        scale = constant_of(producer.inputs[1])
        assert scale is not None
        return float(scale)
    return float(np.abs(answered).max()) / _LEVELS


def answer(model: ir.Model, feeds: Mapping[str, Array]) -> Array:
    """The first output on onnxruntime, with every operator computed as it is written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = widened(model)
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(model, path := Path(folder) / "model.onnx")
        return np.asarray(onnxruntime.InferenceSession(path, options).run(None, dict(feeds))[0])


def widened(model: ir.Model) -> ir.Model:
    """A copy whose float16 tensors are float32: the same numbers in its constants, and none rounded in between."""
    model = model.clone()
    for value in model.graph.initializers.values():
        if value.dtype == HALF and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == HALF:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        if value.dtype == HALF:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    return model


def kernels(model: ir.Model, *, repair: bool) -> int | None:
    """How many kernels the compiler makes of it in FP16, for sm80; None where it refuses the graph."""
    device, model = load_device(PROFILE), model.clone()
    assert device.ahead_of_time is not None
    if repair:
        surgery(model, Target(device, "float16", "as-trained"))
    else:
        TypeFloats("float16")(model)
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(model, path := Path(folder) / "model.onnx")
        try:
            return len(compile_ahead(path, device.ahead_of_time, graph=model).plan.kernels)
        except GpusqError:
            if repair:
                raise
            return None


HEADER = (
    f"{'model':22} {'by':20} {'kernels':>9} {'quantizers':>11} "
    f"{'before':>7} {'cut':>6} {'float':>6} {'noise before, after':>20}"
)


def line(name: str, tool: str, model: ir.Model, feeds: Mapping[str, Array]) -> str:
    """One row of the table."""
    found = repaired(model)
    told = differences(found, feeds)
    count = [kernels(model, repair=repair) for repair in (False, True)]
    held = [len(quantizers(graph)) for graph in (found.before, found.after)]
    return (
        f"{name:22} {tool:20} {count[0] or '-':>4} {count[1]:>4} {held[0]:>6} {held[1]:>4} "
        f"{told.before:7.3f} {told.cut:6.3f} {told.floats:6.3f} {told.noise_before:10.3f} {told.noise_after:9.3f}"
    )


def main(names: Sequence[str]) -> None:
    """Print the table of the models `names`, or of all."""
    import tests.conftest  # noqa: F401  # lets torchvision import
    from exporters.graph_student import read_graph
    from tests.exporters import plans, qdq_students

    warnings.simplefilter("ignore")
    print(HEADER)
    for source, make in qdq_students.TRAINED.items():
        if not names or source in names:
            model = make()
            print(line("student", source, model, qdq_students.samples_of(model, 256)), flush=True)
    for name in [one for one in LARGE if not names or one in names]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            plans.export(name, path)
            for tool, quantize in qdq_students.TOOLS.items():
                if tool == "onnxruntime" or os.environ.get(plans.MODELOPT):
                    quantize(path, target := path.with_suffix(".quantized.onnx"))
                    model = read_graph(target).export().model
                    print(line(name, tool, model, qdq_students.samples_of(model, 8)), flush=True)


def _pass_through(node: ir.Node) -> None:
    node.op_type = "Identity"
    node.attributes.clear()
    node.resize_inputs(1)
    _forget_types(node)


def _forget_types(node: ir.Node) -> None:
    """Leave the types of what it gives to be inferred."""
    for value in node.outputs:
        if not value.is_graph_output():
            value.type, value.shape = None, None


def _source(value: ir.Value | None) -> ir.Value | None:
    """Where a value comes from, moves aside."""
    while value is not None and (producer := value.producer()) is not None and producer.op_type in _MOVES:
        value = producer.inputs[0]
    return value


def _is_quantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "QuantizeLinear"


def _reads_constant(node: ir.Node) -> bool:
    """Whether a DequantizeLinear reads a constant, moves aside."""
    source = _source(node.inputs[0])
    return source is not None and source.is_initializer()


def _rms(difference: Array) -> float:
    return float(np.sqrt(np.square(difference, dtype=np.float64).mean()))


if __name__ == "__main__":
    main(sys.argv[1:])
