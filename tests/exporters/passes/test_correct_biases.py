from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from calibration.probes import Feed
from calibration.ranges import measure_amax
from exporters.float_twin import float_twin
from exporters.passes.correct_biases import CorrectBiases
from exporters.passes.lower_fake_quantize import LowerFakeQuantize
from exporters.passes.outcome import Outcome
from exporters.passes.place_quantizers import PlaceQuantizers

Float = npt.NDArray[np.float32]
Run = Callable[..., Float]

CONVS = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,16,6,6] x) => (float[N,16,6,6] y)
    <float[32,16,3,3] v, float[32] b, float[16,32,1,1] w, float[N,32,6,6] h, float[N,32,6,6] r>
    { h = Conv<pads=[1, 1, 1, 1]>(x, v, b) r = Relu(h) y = Conv(r, w) }
"""
LINEAR = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4,32] x) => (float[N,4,16] y)
    <float[32,32] v, float[32] b, float[32,16] w, float[N,4,32] h, float[N,4,32] a, float[N,4,32] r>
    { h = MatMul(x, v) a = Add(h, b) r = Relu(a) y = MatMul(r, w) }
"""


def model(text: str) -> ir.Model:
    graph = ir.from_onnx_text(text)
    generator = np.random.default_rng(0)
    for value in [value for node in graph.graph for value in node.inputs if value is not None]:
        if value.producer() is None and not value.is_graph_input() and not value.is_initializer():
            shape = [length for length in value.shape or () if isinstance(length, int)]
            value.const_value = ir.tensor(generator.standard_normal(shape, np.float32), name=value.name)
            graph.graph.register_initializer(value)
    return graph


def samples(graph: ir.Model, count: int = 8) -> dict[str, Float]:
    shape = [length if isinstance(length, int) else count for length in graph.graph.inputs[0].shape or ()]
    return {"x": np.random.default_rng(1).exponential(1, shape).astype(np.float32)}


def placed(text: str) -> ir.Model:
    """The graph with quantizers, whose activations are clipped at half of what they reach: a bias for sure."""
    graph = model(text)

    def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        return {name: found / 2 for name, found in measure_amax(model, names, samples(graph), 8).items()}

    PlaceQuantizers("w8a8-linear", measure, "float32")(graph)
    return graph


def correct(graph: ir.Model, batch: int = 8) -> Outcome:
    return CorrectBiases(Feed(samples(graph), batch))(graph)


def errors(graph: ir.Model, run: Run, expected: Float, axis: int) -> Float:
    """The mean error of each output channel."""
    lowered = graph.clone()
    LowerFakeQuantize()(lowered)
    difference = run(lowered, **samples(graph)) - expected
    others = tuple(index for index in range(difference.ndim) if index != axis % difference.ndim)
    return np.asarray(difference.mean(axis=others))


@pytest.mark.parametrize("batch", [8, 3])
def test_no_mean_error_is_left_behind_convolutions(batch: int, run: Run) -> None:
    graph = placed(CONVS)
    expected = run(float_twin(graph), **samples(graph))
    before = errors(graph, run, expected, 1)
    outcome = correct(graph, batch)
    assert outcome.changed == 2
    after = np.abs(errors(graph, run, expected, 1)).max()
    # In one batch nothing is left but what float rounding tips over; in several, the second layer sees that of each.
    assert after < (5e-3 if batch == 8 else 0.1) * np.abs(before).max()


def test_corrects_the_bias_that_an_add_adds_and_leaves_a_layer_without_one() -> None:
    graph = placed(LINEAR)
    outcome = correct(graph)
    assert outcome.changed == 1
    assert [left.why for left in outcome.left_alone] == ["it has no bias"]


def test_a_second_run_moves_nothing() -> None:
    graph = placed(CONVS)
    correct(graph)
    before = ir.to_proto(graph)
    outcome = correct(graph)
    assert [left.why for left in outcome.left_alone] == ["its bias is corrected already"] * 2
    assert ir.to_proto(graph) == before


def test_what_is_not_quantized_or_trained_stays() -> None:
    graph = model(CONVS)
    before = ir.to_proto(graph)
    outcome = correct(graph)
    assert not outcome.changed
    assert {left.why for left in outcome.left_alone} == {"it is not quantized"}
    LowerFakeQuantize()(trained := placed(CONVS))
    outcome = correct(trained)
    assert not outcome.changed
    assert {left.why for left in outcome.left_alone} == {"it has trained scales"}
    assert ir.to_proto(graph) == before


def test_a_twin_is_the_float_graph(run: Run) -> None:
    graph = model(CONVS)
    expected = run(graph, **samples(graph))
    quantized = placed(CONVS)
    before = ir.to_proto(quantized)
    np.testing.assert_array_equal(run(float_twin(quantized), **samples(graph)), expected)
    assert ir.to_proto(quantized) == before
