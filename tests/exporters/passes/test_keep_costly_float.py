from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from calibration.probes import Feed
from calibration.ranges import measure_amax
from calibration.search_memory import Memory
from exporters.float_twin import float_twin
from exporters.linears import find_linears
from exporters.passes.correct_biases import CorrectBiases
from exporters.passes.error_feedback import ErrorFeedback
from exporters.passes.keep_costly_float import KeepCostlyFloat, block_of_module
from exporters.passes.lower_fake_quantize import LowerFakeQuantize
from exporters.passes.outcome import Pass
from exporters.passes.place_quantizers import PlaceQuantizers
from exporters.switched_graph import switched_graph

Float = npt.NDArray[np.float32]
Run = Callable[..., Float]
TEXT = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,8,32] x) => (float[N,8,24] y)
    <float[32,32] w1, float[32] b1, float[32,32] w2, float[32,32] w3, float[32,24] w4, float[N,8,32] h1,
     float[N,8,32] a1, float[N,8,32] r1, float[N,8,32] h2, float[N,8,32] r2, float[N,8,32] h3, float[N,8,32] r3>
    { h1 = MatMul(x, w1) a1 = Add(h1, b1) r1 = Relu(a1) h2 = MatMul(r1, w2) r2 = Relu(h2) h3 = MatMul(r2, w3)
      r3 = Relu(h3) y = MatMul(r3, w4) }
"""
HARD = "third"  # reads 32 channels, one of them 5000 times as large as the others and of no weight


def model(*, hard: bool = True) -> ir.Model:
    graph = ir.from_onnx_text(TEXT)
    generator = np.random.default_rng(0)
    arrays = {name: generator.standard_normal(shape, np.float32) / 4 for name, shape in shapes(graph).items()}
    if hard:
        arrays["w2"][:, 5] *= 5000
        arrays["w3"][5] /= 5000
    for value in [value for node in graph.graph for value in node.inputs if value is not None]:
        if value.name in arrays and not value.is_initializer():
            value.const_value = ir.tensor(arrays[value.name], name=value.name)
            graph.graph.register_initializer(value)
    names = iter(("first", "second", HARD, "fourth"))
    for node in graph.graph:
        node.name = next(names) if node.op_type == "MatMul" else f"{node.outputs[0].name}/{node.op_type}"
    return graph


def shapes(graph: ir.Model) -> dict[str, list[int]]:
    values = [value for node in graph.graph for value in node.inputs if value is not None and value.producer() is None]
    return {str(v.name): [d for d in v.shape or () if isinstance(d, int)] for v in values if not v.is_graph_input()}


def feed(**changes: object) -> Feed:
    x = np.random.default_rng(1).standard_normal((20, 8, 32)).astype(np.float32)
    return replace(Feed({"x": x}, 8), **changes)  # type: ignore[arg-type]


def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
    return measure_amax(model, names, feed().samples, 8)


PLACE = PlaceQuantizers("w8a8-linear", measure, "float32")
ALL: list[Pass] = [PLACE, ErrorFeedback(feed()), CorrectBiases(feed())]


def quantized(graph: ir.Model) -> list[str]:
    """The layers with a quantizer, after placing."""
    return [linear.module for linear in find_linears(graph.graph) if linear.weight_dq is not None]


def finish(graph: ir.Model) -> ir.Model:
    PLACE(graph)
    LowerFakeQuantize()(graph)
    return graph


def test_the_layer_with_outliers_stays_float_and_only_it() -> None:
    graph = model()
    done = KeepCostlyFloat(0.5, [PLACE], feed())(graph)
    assert [change.where for change in done.changes] == [HARD]
    assert done.found is not None
    assert done.found.before > 5
    assert done.found.after <= 0.5
    assert quantized(finish(graph)) == ["first", "second", "fourth"]


def test_the_reason_is_told_where_the_quantizer_is_not_placed() -> None:
    graph = model()
    KeepCostlyFloat(0.5, [PLACE], feed())(graph)
    (left,) = PLACE(graph).left_alone
    assert left.where == HARD
    assert "quantized alone, the output is at" in left.why


def test_everything_is_quantized_where_nothing_is_hard() -> None:
    graph = model(hard=False)
    assert KeepCostlyFloat(0.5, [PLACE], feed())(graph).changed == 0
    assert len(quantized(finish(graph))) == 4


def test_no_number_changes_and_a_second_run_marks_the_same(run: Run) -> None:
    graph, x = model(), feed().samples["x"]
    before = run(graph.clone(), x=x)
    KeepCostlyFloat(0.5, [PLACE], feed())(graph)
    assert np.array_equal(run(graph.clone(), x=x), before)
    marked = {node.name: dict(node.metadata_props) for node in graph.graph}
    assert KeepCostlyFloat(0.5, [PLACE], feed())(graph).changed == 0  # it is float, so nothing is lost
    assert {node.name: dict(node.metadata_props) for node in graph.graph} == marked


@pytest.mark.parametrize("place", [[PLACE], ALL], ids=["placed", "improved"])
def test_switched_on_it_answers_as_the_lowered_graph_does(place: list[Pass], run: Run) -> None:
    graph, x = model(hard=False), feed().samples["x"]
    placed = graph.clone()
    for step in place:
        step(placed)
    switched = switched_graph(graph, placed, feed())
    floats = np.concatenate(list(switched.answers(())))
    assert np.allclose(floats, run(graph.clone(), x=x), rtol=0, atol=1e-5)  # sums in another order
    every = np.concatenate(list(switched.answers(switched.units)))
    lowered = placed.clone()
    LowerFakeQuantize()(lowered)
    # A value on the edge between two steps may round to the other one: a step is 1/127 of what a tensor reaches.
    assert np.abs(every - run(lowered, x=x)).max() < 0.02 * np.abs(floats).max()
    assert np.abs(every - run(float_twin(placed), x=x)).max() > 0


def test_costs_are_the_products() -> None:
    graph = model()
    placed = graph.clone()
    PLACE(placed)
    units = switched_graph(graph, placed, feed()).units
    assert units == {"first": 8 * 32 * 32, "second": 8 * 32 * 32, HARD: 8 * 32 * 32, "fourth": 8 * 32 * 24}


def test_a_second_search_asks_nothing_and_one_that_was_cut_goes_on(tmp_path: Path) -> None:
    memory = Memory(tmp_path, "samples")
    KeepCostlyFloat(0.5, [PLACE], feed(memory=memory))(model())
    (file,) = tmp_path.iterdir()
    lines = file.read_text()

    def refuse(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        raise AssertionError("it was known")

    never = PlaceQuantizers("w8a8-linear", refuse, "float32")
    done = KeepCostlyFloat(0.5, [never], feed(memory=memory))(model())
    assert [change.where for change in done.changes] == [HARD]
    file.write_text("\n".join(lines.splitlines()[:4]))
    assert [c.where for c in KeepCostlyFloat(0.5, [PLACE], feed(memory=memory))(model()).changes] == [HARD]
    assert sorted(file.read_text().split()) == sorted(lines.split())


@pytest.mark.parametrize("change", ["graph", "samples", "passes"])
def test_another_graph_or_other_samples_are_another_search(change: str, tmp_path: Path) -> None:
    KeepCostlyFloat(0.5, [PLACE], feed(memory=Memory(tmp_path, "samples")))(model(hard=False))
    memory = Memory(tmp_path, "others" if change == "samples" else "samples")
    context = "others" if change == "passes" else ""
    KeepCostlyFloat(0.5, [PLACE], feed(memory=memory), context)(model(hard=change == "graph"))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("blocks.11.mlp.fc1", "blocks.11"),
        ("encoder.layer.3.output.dense", "encoder.layer.3"),
        ("/blocks.0/attn/qkv/MatMul", "/blocks.0"),
        ("fc1", "fc1"),
        ("head", "head"),
    ],
)
def test_blocks_are_known_by_their_number(module: str, block: str) -> None:
    assert block_of_module(module) == block
