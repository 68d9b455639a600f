from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from exporters.module_names import MODULE_KEY
from exporters.passes.fuse_layer_norm import FuseLayerNorm

Run = Callable[..., npt.NDArray[np.float32]]

TEXT = """
    <ir_version: 8, opset_import: ["": {opset}]>
    g (float[N,5,4] x) => (float[N,5,4] y)
    <float[4] gamma = {{1, -2, 3, 0.5}}, float[4] beta = {{0.25, 0, -1, 2}}, float eps = {{{epsilon}}},
     float two = {{2}}, float one = {{1}}, float minus = {{-0.5}}, float[1] other = {{3}}, int64[1] last = {{-1}},
     float[5,4] table = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2}}>
    {{
        {nodes}
    }}
"""
MEAN = "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m)"
SQUARES = {"pow": "s = Pow(d, two)", "product": "s = Mul(d, d)", "twice": "e = Sub(x, m) s = Mul(e, e)"}
VARIANCE = "v = ReduceMean<axes=[2]>(s) w = Add(v, eps)"
DIVISIONS = {
    "div": "r = Sqrt(w) n = Div(d, r)",
    "reciprocal": "r = Sqrt(w) i = Reciprocal(r) n = Mul(d, i)",
    "one over": "r = Sqrt(w) i = Div(one, r) n = Mul(i, d)",
    "power": "i = Pow(w, minus) n = Mul(d, i)",
}
WEIGHTS = {
    "scale and bias": ("g = Mul(n, gamma) y = Add(g, beta)", 3),
    "the other order": ("g = Mul(gamma, n) y = Add(beta, g)", 3),
    "scale": ("y = Mul(n, gamma)", 2),
    "bias": ("y = Add(n, beta)", 3),
    "none": ("y = Identity(n)", 2),
    "another constant": ("y = Mul(n, other)", 2),
}
ALL = [*itertools.product(SQUARES, DIVISIONS, ["scale and bias"]), *itertools.product(["pow"], ["div"], WEIGHTS)]
X = np.random.default_rng(0).standard_normal((3, 5, 4), np.float32) * 2 + 1


def graph(nodes: str, *, opset: int = 17, epsilon: float = 1e-5) -> ir.Model:
    model = ir.from_onnx_text(TEXT.format(nodes=nodes, opset=opset, epsilon=f"{epsilon:.12f}"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def written_out(square: str = "pow", division: str = "div", weights: str = "scale and bias") -> str:
    return " ".join([MEAN, SQUARES[square], VARIANCE, DIVISIONS[division], WEIGHTS[weights][0]])


def norm_of(model: ir.Model) -> ir.Node:
    (node,) = [node for node in model.graph if node.op_type == "LayerNormalization"]
    return node


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(("square", "division", "weights"), ALL)
def test_becomes_one_operator_with_the_same_numbers(square: str, division: str, weights: str, run: Run) -> None:
    model = graph(written_out(square, division, weights))
    expected = run(model, x=X)
    assert FuseLayerNorm()(model).changed == 1
    assert op_types(model)[0] == "LayerNormalization"
    assert len(model.graph) == (2 if weights in ("none", "another constant") else 1)
    assert len(norm_of(model).inputs) == WEIGHTS[weights][1]
    assert np.abs(run(model, x=X) - expected).max() <= 1e-5
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-6, 0.5])
def test_keeps_epsilon_names_and_module(epsilon: float) -> None:
    model = graph(written_out(), epsilon=epsilon)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "blocks.0.norm1"
    FuseLayerNorm()(model)
    node = norm_of(model)
    assert node.attributes["epsilon"].as_float() == np.float32(epsilon)
    assert (node.name, node.outputs[0].name) == ("blocks.0.norm1/LayerNormalization", "y")
    assert node.metadata_props[MODULE_KEY] == "blocks.0.norm1"
    assert [value.name for value in node.inputs if value is not None] == ["x", "gamma", "beta"]


def test_normalizes_over_two_axes(run: Run) -> None:
    nodes = """
        m = ReduceMean<axes=[1,2]>(x) d = Sub(x, m) s = Mul(d, d) v = ReduceMean<axes=[1,2]>(s) w = Add(v, eps)
        r = Sqrt(w) n = Div(d, r) y = Mul(n, table)"""
    model = graph(nodes)
    expected = run(model, x=X)
    assert FuseLayerNorm()(model).changed == 1
    assert norm_of(model).attributes["axis"].as_int() == -2
    assert np.abs(run(model, x=X) - expected).max() <= 1e-5


def test_reads_axes_that_are_an_input(run: Run) -> None:
    model = graph(written_out().replace("<axes=[-1]>(x)", "(x, last)").replace("<axes=[2]>(s)", "(s, last)"), opset=18)
    expected = run(model, x=X)
    assert FuseLayerNorm()(model).changed == 1
    assert np.abs(run(model, x=X) - expected).max() <= 1e-5


@pytest.mark.parametrize(
    "nodes",
    [
        written_out().replace("Add(v, eps)", "Sub(v, eps)"),
        written_out().replace("Sub(x, m)", "Add(x, m)"),
        written_out().replace("Pow(d, two)", "Pow(x, two)"),
        written_out().replace("Pow(d, two)", "Abs(d)"),
        written_out().replace("Div(d, r)", "Div(x, r)"),
        written_out().replace("Div(d, r)", "Div(r, d)"),
        written_out().replace("<axes=[-1]>(x)", "<axes=[1]>(x)"),
    ],
)
def test_another_function_stays(nodes: str) -> None:
    model = graph(nodes)
    before = op_types(model)
    assert FuseLayerNorm()(model).changed == 0
    assert op_types(model) == before


@pytest.mark.parametrize(
    ("nodes", "opset", "why"),
    [
        (written_out(), 16, "opset 17"),
        (written_out().replace("[-1]", "[1]").replace("[2]", "[1]"), 17, "not over the last axes"),
    ],
)
def test_says_why_it_leaves_one_alone(nodes: str, opset: int, why: str) -> None:
    outcome = FuseLayerNorm()(graph(nodes, opset=opset))
    assert outcome.changed == 0
    assert why in outcome.left_alone[0].why


def test_a_scale_that_others_read_stays_outside(run: Run) -> None:
    model = graph(written_out(weights="scale").replace("y = Mul(n, gamma)", "g = Mul(n, gamma) y = Add(g, n)"))
    expected = run(model, x=X)
    assert FuseLayerNorm()(model).changed == 1
    assert op_types(model) == ["LayerNormalization", "Mul", "Add"]
    assert np.abs(run(model, x=X) - expected).max() <= 1e-5


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_second_run_changes_nothing(weights: str) -> None:
    model = graph(written_out(weights=weights))
    FuseLayerNorm()(model)
    before = ir.to_proto(model)
    assert FuseLayerNorm()(model).changed == 0
    assert ir.to_proto(model) == before


@settings(deadline=None)
@given(
    st.sampled_from([*SQUARES]),
    st.sampled_from([*DIVISIONS]),
    st.sampled_from([*WEIGHTS]),
    st.floats(1e-6, 1.0),
    st.integers(0, 2**32 - 1),
)
def test_random_ones_keep_their_numbers(square: str, division: str, weights: str, epsilon: float, seed: int) -> None:
    model = graph(written_out(square, division, weights), epsilon=epsilon)
    x = np.random.default_rng(seed).standard_normal((2, 5, 4), np.float32) * 10
    expected = outputs(model, x)
    assert FuseLayerNorm()(model).changed == 1
    assert np.abs(outputs(model, x) - expected).max() <= 1e-4


def outputs(model: ir.Model, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    found = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    return np.asarray(found[0])  # type: ignore[index]


INVERSE = "s = Mul(d, d) v = ReduceMean<axes=[-1]>(s) w = Add(v, eps) q = Sqrt(w) i = Reciprocal(q)"
FOLDED = {
    "scale and bias": "r = Mul(i, gamma) a = Mul(x, r) b = Mul(m, r) c = Sub(beta, b) y = Add(a, c)",
    "the other order": "r = Mul(gamma, i) a = Mul(r, x) b = Mul(r, m) c = Sub(beta, b) y = Add(c, a)",
    "scale": "r = Mul(i, gamma) a = Mul(x, r) b = Mul(m, r) y = Sub(a, b)",
    "bias": "a = Mul(x, i) b = Mul(m, i) c = Sub(beta, b) y = Add(a, c)",
    "none": "a = Mul(x, i) b = Mul(m, i) y = Sub(a, b)",
}


@pytest.mark.parametrize("nodes", FOLDED.values(), ids=FOLDED.keys())
def test_the_form_of_tensorflow_becomes_one_operator_with_the_same_numbers(nodes: str, run: Run) -> None:
    model = graph(f"{MEAN} {INVERSE} {nodes}")
    expected = run(model, x=X)
    assert FuseLayerNorm()(model).changed == 1
    assert op_types(model) == ["LayerNormalization"]
    assert np.abs(run(model, x=X) - expected).max() <= 1e-5
    assert FuseLayerNorm()(model).changed == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [("Mul(m, r)", "Mul(v, r)"), ("Mul(x, r)", "Mul(d, r)"), ("Sub(beta, b)", "Sub(b, beta)"), ("gamma", "table")],
)
def test_what_only_looks_like_the_form_of_tensorflow_stays(old: str, new: str) -> None:
    model = graph(f"{MEAN} {INVERSE} {FOLDED['scale and bias'].replace(old, new)}")
    assert FuseLayerNorm()(model).changed == 0
