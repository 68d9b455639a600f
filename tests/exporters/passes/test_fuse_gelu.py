from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.module_names import MODULE_KEY
from exporters.passes.fuse_gelu import FuseGelu

Run = Callable[..., npt.NDArray[np.float32]]

TEXT = """
<ir_version: 10, opset_import: ["": {opset}]>
written_out (float[2, 3] x) => (float[2, 3] y)
<float half = {{0.5}}, float[1] half1 = {{0.5}}, float one = {{1}}, float two = {{2}}, float three = {{3}},
 float a = {{{cubic}}}, float b = {{0.7978845608}}, float root = {{1.4142135}}, float inverse = {{0.70710677}}>
{{
   {nodes}
}}
"""
TANH = {
    "Transformers": """
        h = Mul(half, x) p = Pow(x, three) s = Mul(a, p) i = Add(x, s) j = Mul(b, i) t = Tanh(j) u = Add(one, t)
        y = Mul(h, u)""",
    "the half on the right": """
        h = Mul(x, half) p = Pow(x, three) s = Mul(p, a) i = Add(s, x) j = Mul(i, b) t = Tanh(j) u = Add(t, one)
        y = Mul(u, h)""",
    "the cube as products": """
        h = Mul(half, x) q = Mul(x, x) p = Mul(x, q) s = Mul(a, p) i = Add(x, s) j = Mul(b, i) t = Tanh(j)
        u = Add(one, t) y = Mul(h, u)""",
    "x taken out of the bracket": """
        p = Mul(a, x) q = Mul(p, x) i = Add(one, q) v = Mul(b, x) j = Mul(v, i) t = Tanh(j) u = Add(one, t)
        w = Mul(x, u) y = Mul(half, w)""",
}
ERF = {
    "torch": "d = Div(x, root) e = Erf(d) u = Add(e, one) w = Mul(x, u) y = Mul(w, half)",
    "with Mul": "d = Mul(x, inverse) e = Erf(d) u = Add(one, e) w = Mul(u, x) y = Mul(half, w)",
    "halved first": "h = Mul(half1, x) d = Div(x, root) e = Erf(d) u = Add(e, one) y = Mul(h, u)",
    "the half last but one": "d = Div(x, root) e = Erf(d) u = Add(e, one) w = Mul(u, half) y = Mul(x, w)",
    "halved by Div": "d = Div(x, root) e = Erf(d) u = Add(e, one) w = Mul(x, u) y = Div(w, two)",
}
OTHERS = {
    "another cubic": TANH["Transformers"].replace("Mul(a, p)", "Mul(b, p)"),
    "not halved": "d = Div(x, root) e = Erf(d) u = Add(e, one) y = Mul(x, u)",
    "another width": "d = Div(x, two) e = Erf(d) u = Add(e, one) w = Mul(x, u) y = Mul(w, half)",
    "another argument": "n = Neg(x) d = Div(n, root) e = Erf(d) u = Add(e, one) w = Mul(x, u) y = Mul(w, half)",
    "a square": TANH["Transformers"].replace("Pow(x, three)", "Pow(x, two)"),
}


def graph(nodes: str, *, opset: int = 20) -> ir.Model:
    return ir.from_onnx_text(TEXT.format(opset=opset, cubic=0.044715, nodes=nodes))


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


X = np.random.default_rng(0).standard_normal((2, 3), np.float32) * 3


@pytest.mark.parametrize(
    ("nodes", "approximate"),
    [*((nodes, "tanh") for nodes in TANH.values()), *((nodes, "none") for nodes in ERF.values())],
    ids=[*TANH, *ERF],
)
def test_becomes_one_operator_with_the_same_numbers(nodes: str, approximate: str, run: Run) -> None:
    model = graph(nodes)
    expected = run(model, x=X)
    assert FuseGelu()(model).changed == 1
    (node,) = model.graph
    assert (node.op_type, node.attributes["approximate"].as_string()) == ("Gelu", approximate)
    assert model.graph.outputs[0].name == "y"
    assert np.abs(run(model, x=X) - expected).max() <= 1e-6


@pytest.mark.parametrize("nodes", OTHERS.values(), ids=OTHERS.keys())
def test_another_function_stays(nodes: str) -> None:
    model = graph(nodes)
    before = op_types(model)
    assert FuseGelu()(model).changed == 0
    assert op_types(model) == before


def test_what_others_read_too_stays_for_them(run: Run) -> None:
    model = graph("d = Div(x, root) e = Erf(d) u = Add(e, one) w = Mul(x, u) g = Mul(w, half) y = Add(g, e)")
    expected = run(model, x=X)
    assert FuseGelu()(model).changed == 1
    assert op_types(model) == ["Div", "Erf", "Gelu", "Add"]
    assert np.abs(run(model, x=X) - expected).max() <= 1e-6


def test_the_new_node_belongs_to_the_module_of_the_last_one() -> None:
    model = graph(ERF["torch"])
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "blocks.0.act"
    FuseGelu()(model)
    (node,) = model.graph
    assert (node.name, node.metadata_props[MODULE_KEY]) == ("blocks.0.act/Gelu", "blocks.0.act")


@pytest.mark.parametrize("nodes", [TANH["Transformers"], ERF["torch"]])
def test_leaves_a_graph_of_an_older_opset_and_says_why(nodes: str) -> None:
    outcome = FuseGelu()(graph(nodes, opset=17))
    assert outcome.changed == 0
    assert "opset 20" in outcome.left_alone[0].why


@pytest.mark.parametrize("nodes", [*TANH.values(), *ERF.values()], ids=[*TANH, *ERF])
def test_a_second_run_changes_nothing(nodes: str) -> None:
    model = graph(nodes)
    FuseGelu()(model)
    before = ir.to_proto(model)
    assert FuseGelu()(model).changed == 0
    assert ir.to_proto(model) == before


@settings(deadline=None)
@given(st.permutations(["x", "half", "u"]), st.booleans(), st.booleans(), st.booleans())
def test_any_order_of_the_factors_is_a_gelu(factors: list[str], left: bool, swap: bool, divide: bool) -> None:
    first, second, third = factors
    scaled = "d = Div(x, root)" if divide else "d = Mul(inverse, x)"
    shifted = "u = Add(e, one)" if swap else "u = Add(one, e)"
    product = f"v = Mul({first}, {second}) y = Mul({'v, ' + third if left else third + ', v'})"
    model = graph(f"{scaled} e = Erf(d) {shifted} {product}")
    assert FuseGelu()(model).changed == 1
    assert op_types(model) == ["Gelu"]
