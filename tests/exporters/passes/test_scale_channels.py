from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from calibration.channel_scales import Reader, Reading, best_factors, predicted_error, smooth
from calibration.probes import Channels, Feed
from exporters.channel_groups import Kind
from exporters.linears import array_of
from exporters.passes.outcome import Outcome
from exporters.passes.scale_channels import ScaleChannels
from exporters.zero_pattern import prune

Float = npt.NDArray[np.float32]
Run = Callable[..., Float]

NORM = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,5,32] x) => (float[N,5,16] y, float[N,5,16] z)
    <float[32] gamma, float[32] beta, float[32,16] w, float[32,16] v, float[N,5,32] n>
    { n = LayerNormalization(x, gamma, beta) y = MatMul(n, w) z = MatMul(n, v) }
"""
GATED = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,5,32] x) => (float[N,5,16] y)
    <float[32,32] gate, float[32,32] up, float[32,16] w, float[N,5,32] h>
    { a = MatMul(x, gate) b = MatMul(x, up) s = Sigmoid(a) h = Mul(s, b) y = MatMul(h, w) }
"""
CONV = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,16,6,6] x) => (float[N,16,4,4] y)
    <float[32,16,1,1] v, float[32] b, float[32,1,3,3] d, float[16,32,1,1] w, float zero, float six,
     float[N,32,6,6] h, float[N,32,6,6] r, float[N,32,4,4] e, float[N,32,4,4] q>
    {
        h = Conv(x, v, b) r = ACT
        e = Conv<group=32>(r, d) q = Relu(e)
        y = Conv(q, w)
    }
"""
RESIDUAL = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,16,6,6] x) => (float[N,16,6,6] y)
    <float[32,16,1,1] v, float[32,32,1,1] u, float[16,32,1,1] w,
     float[N,32,6,6] h, float[N,32,6,6] k, float[N,32,6,6] s>
    { h = Conv(x, v) k = Conv(h, u) s = Add(k, h) y = Conv(s, w) }
"""


def model(text: str) -> ir.Model:
    """The graph with random constants whose channels differ by three orders of magnitude."""
    graph = ir.from_onnx_text(text.replace("ACT", "Relu(h)"))
    generator = np.random.default_rng(0)
    for value in [value for node in graph.graph for value in node.inputs if value is not None]:
        if value.producer() is None and not value.is_graph_input() and not value.is_initializer():
            shape = [length for length in value.shape or () if isinstance(length, int)]
            array = _constant(value.name or "", generator.standard_normal(shape, np.float32))
            value.const_value = ir.tensor(array, name=value.name)
            graph.graph.register_initializer(value)
    return graph


def _constant(name: str, drawn: Float) -> Float:
    if name in ("zero", "six"):
        return np.array({"zero": 0, "six": 6}[name], np.float32)
    if name in ("gamma", "up"):
        return drawn * np.geomspace(0.01, 10, drawn.shape[-1], dtype=np.float32)
    if name == "v" and drawn.ndim == 4:
        return drawn * np.geomspace(0.01, 10, len(drawn), dtype=np.float32).reshape(-1, 1, 1, 1)
    return drawn


def samples(graph: ir.Model, count: int = 8) -> dict[str, Float]:
    shape = [length if isinstance(length, int) else count for length in graph.graph.inputs[0].shape or ()]
    return {"x": np.random.default_rng(1).standard_normal(shape, np.float32)}


def scale(graph: ir.Model, kind: Kind, placement: str = "w8a8-linear") -> Outcome:
    return ScaleChannels(kind, Feed(samples(graph), 4), placement)(graph)


@pytest.mark.parametrize(
    ("text", "kind", "names"),
    [
        (NORM, "gemm", {"n": 2}),
        (GATED, "gemm", {"h": 1}),
        (CONV, "conv", {"r": 1, "q": 1}),
        (CONV.replace("ACT", "Clip(h, zero, six)"), "conv", {"r": 1, "q": 1}),
        (RESIDUAL, "conv", {"h": 2}),
    ],
    ids=["normalization", "gated", "convolutions", "ReLU6", "residual"],
)
def test_gives_the_same_numbers(text: str, kind: Kind, names: dict[str, int], run: Run) -> None:
    graph = model(text)
    feeds = samples(graph)
    before = run(graph, **feeds)
    outcome = scale(graph, kind)
    assert outcome.changed == sum(names.values()), outcome.left_alone
    np.testing.assert_allclose(run(graph, **feeds), before, rtol=1e-4, atol=1e-4 * float(np.abs(before).max()))


def test_a_second_run_finds_nothing_to_gain() -> None:
    graph = model(NORM)
    assert scale(graph, "gemm").changed == 2
    assert scale(graph, "gemm").changed == 0


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("y = MatMul(n, w) z = MatMul(n, v)", "y = MatMul(n, w) m = Exp(n) z = MatMul(m, v)", "Exp reads it"),
        ("n = LayerNormalization(x, gamma, beta)", "n = Erf(x)", "Erf before it takes no factors"),
        ("n = LayerNormalization(x, gamma, beta)", "n = Identity(x)", "takes no factors"),
    ],
)
def test_leaves_alone_what_cannot_take_factors(old: str, new: str, why: str) -> None:
    assert old in NORM
    outcome = scale(model(NORM.replace(old, new)), "gemm")
    assert not outcome.changed
    assert any(why in left.why for left in outcome.left_alone)


def test_trained_scales_stay() -> None:
    quantized_input = "q = QuantizeLinear(n, s, o) e = DequantizeLinear(q, s, o) y = MatMul(e, w)"
    text = NORM.replace("y = MatMul(n, w)", quantized_input)
    graph = model(text.replace("float[32] gamma", "float s = {0.1}, int8 o = {0}, float[32] gamma"))
    before = ir.to_proto(graph)
    outcome = scale(graph, "gemm")
    assert not outcome.changed
    assert ir.to_proto(graph) == before


def test_a_clip_that_does_not_start_at_zero_takes_no_factors() -> None:
    outcome = scale(model(CONV.replace("ACT", "Clip(h, six)")), "conv")
    assert any("does not start at 0" in left.why for left in outcome.left_alone)


def test_keeps_a_sparse_weight_sparse() -> None:
    graph = model(NORM)
    weight = graph.graph.initializers["w"]
    pruned = prune(array_of(weight), 0)
    weight.const_value = ir.tensor(pruned, name="w")
    assert scale(graph, "gemm").changed == 2
    np.testing.assert_array_equal(array_of(weight) == 0, pruned == 0)


def channels(x: Float) -> Channels:
    return Channels(np.abs(x).max(axis=0), np.square(x).mean(axis=0))


def quantized(x: Any, scale: Any) -> Any:
    return np.clip(np.rint(x / scale), -128, 127) * scale


def test_predicts_the_error_of_the_products() -> None:
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((4096, 32)) * np.geomspace(0.1, 10, 32)).astype(np.float32)
    w = generator.standard_normal((32, 16)).astype(np.float32)
    readings = [Reading(channels(x), [Reader(w.reshape(1, 32, 16, 1))])]
    for s in (np.ones(32, np.float32), smooth(readings, 0.5)):
        scaled, weight = x / s, w * s[:, None]
        y = quantized(scaled, np.abs(scaled).max() / 127) @ quantized(weight, np.abs(weight).max(axis=0) / 127)
        measured = float(np.square(y - x @ w).sum() / len(x))
        assert predicted_error(readings, s) == pytest.approx(measured, rel=0.15)


def test_factors_that_win_nothing_are_ones() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (64, 32)).astype(np.float32)
    s, gain = best_factors([Reading(channels(x), [Reader(np.ones((1, 32, 16, 1), np.float32))])])
    assert gain == 1
    assert (s == 1).all()


def test_smooth_is_equation_4() -> None:
    x = np.array([[1, 4], [2, -8]], np.float32)
    w = np.array([[3, -1], [2, 0.5]], np.float32).reshape(1, 2, 2, 1)
    s = smooth([Reading(channels(x), [Reader(w)])], 0.5)
    expected = np.sqrt([2 / 3, 8 / 2])
    np.testing.assert_allclose(s, expected / expected.max(), rtol=1e-6)
