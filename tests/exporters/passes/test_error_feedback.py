from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from calibration.probes import Feed
from calibration.ranges import measure_amax
from exporters.linears import array_of
from exporters.passes.error_feedback import ErrorFeedback
from exporters.passes.lower_fake_quantize import LowerFakeQuantize
from exporters.passes.outcome import Outcome
from exporters.passes.place_quantizers import PlaceQuantizers
from exporters.zero_pattern import prune

Float = npt.NDArray[np.float32]
Run = Callable[..., Float]

MATMUL = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,8,128] x) => (float[N,8,16] y) <float[128,16] w> { y = MatMul(x, w) }
"""
GEMM = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,128] x) => (float[N,16] y) <float[16,128] w, float[16] b> { y = Gemm<transB=1>(x, w, b) }
"""
TRANSPOSED = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,128] x) => (float[N,16] y) <float[16,128] w> { t = Transpose<perm=[1, 0]>(w) y = MatMul(x, t) }
"""
CONV = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,32,6,6] x) => (float[N,32,3,3] y)
    <float[32,16,3,3] w> { y = Conv<group=2, strides=[2, 2], pads=[1, 1, 1, 1]>(x, w) }
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


def samples(graph: ir.Model, count: int = 64) -> dict[str, Float]:
    """Inputs whose neighbours go together."""
    shape = [length if isinstance(length, int) else count for length in graph.graph.inputs[0].shape or ()]
    drawn = np.random.default_rng(1).standard_normal(shape, np.float32)
    return {"x": drawn + 2 * np.roll(drawn, 1, axis=-1) + 2 * np.roll(drawn, 1, axis=1)}


def place(graph: ir.Model, placement: str) -> None:
    def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        return measure_amax(model, names, samples(graph), 16)

    PlaceQuantizers(placement, measure, "float32")(graph)


def feed_back(graph: ir.Model) -> Outcome:
    return ErrorFeedback(Feed(samples(graph), 16))(graph)


def error(graph: ir.Model, expected: Float, run: Run) -> float:
    lowered = graph.clone()
    LowerFakeQuantize()(lowered)
    return float(np.square(run(lowered, **samples(graph)) - expected).sum())


@pytest.mark.parametrize(
    ("text", "placement"),
    [(MATMUL, "w4"), (GEMM, "w4"), (TRANSPOSED, "w4"), (MATMUL, "w8a8-linear"), (CONV, "w8a8-linear")],
    ids=["w4", "Gemm", "transposed", "w8a8", "grouped convolution"],
)
def test_lowers_the_error_of_the_layer(text: str, placement: str, run: Run) -> None:
    graph = model(text)
    expected = run(graph, **samples(graph))
    place(graph, placement)
    before = error(graph, expected, run)
    assert feed_back(graph).changed == 1
    assert error(graph, expected, run) < 0.98 * before
    weight = array_of(graph.graph.initializers["w"])
    assert not feed_back(graph).changed  # what is on its grid stays
    np.testing.assert_array_equal(array_of(graph.graph.initializers["w"]), weight)


@pytest.mark.parametrize("placement", ["w4", "w8a8-linear"])
def test_keeps_a_mask(placement: str) -> None:
    graph = model(MATMUL)
    value = graph.graph.initializers["w"]
    pruned = prune(array_of(value), 0)
    value.const_value = ir.tensor(pruned, name="w")
    place(graph, placement)
    assert feed_back(graph).changed == 1
    found = array_of(value)
    assert not found[pruned == 0].any()
    assert (found != pruned).any()


def test_trained_scales_stay() -> None:
    graph = model(MATMUL)
    place(graph, "w8a8-linear")
    LowerFakeQuantize()(graph)
    before = ir.to_proto(graph)
    outcome = feed_back(graph)
    assert not outcome.changed
    assert [left.why for left in outcome.left_alone] == ["it has trained scales"]
    assert ir.to_proto(graph) == before


def test_what_is_not_quantized_stays() -> None:
    outcome = feed_back(model(MATMUL))
    assert not outcome.changed
    assert [left.why for left in outcome.left_alone] == ["its weight is not quantized"]
