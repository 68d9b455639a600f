from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from exporters.module_names import MODULE_KEY
from exporters.passes.fuse_silu import FuseSilu

Run = Callable[..., npt.NDArray[np.float32]]

TEXT = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[2,3] x) => (float[2,3] y) <float one = {1}, float two = {2}, float minus = {-1}, float slope = {1.702}>
"""
WRITTEN_OUT = {
    "SiLU": ("n = Neg(x) e = Exp(n) d = Add(e, one) y = Div(x, d)", ["Sigmoid", "Mul"]),
    "SiLU with a product": ("n = Mul(x, minus) e = Exp(n) d = Add(one, e) y = Div(x, d)", ["Sigmoid", "Mul"]),
    "sigmoid": ("n = Neg(x) e = Exp(n) d = Add(one, e) y = Div(one, d)", ["Sigmoid"]),
    "reciprocal": ("n = Neg(x) e = Exp(n) d = Add(one, e) y = Reciprocal(d)", ["Sigmoid"]),
    "gate": ("a = Relu(x) n = Neg(x) e = Exp(n) d = Add(one, e) y = Div(a, d)", ["Relu", "Sigmoid", "Mul"]),
    "quick GELU": (
        "m = Mul(x, slope) n = Neg(m) e = Exp(n) d = Add(one, e) y = Div(x, d)",
        ["Mul", "Sigmoid", "Mul"],
    ),
    "curve with a slope": (
        "n = Mul(x, minus) m = Mul(two, n) e = Exp(m) d = Add(e, one) y = Div(one, d)",
        ["Mul", "Sigmoid"],
    ),
    "SiLU times sigmoid": (
        "n = Neg(x) e = Exp(n) d = Add(one, e) s = Div(one, d) y = Mul(x, s)",
        ["Sigmoid", "Mul"],
    ),
}
OTHERS = {
    "SiLU already": "s = Sigmoid(x) y = Mul(x, s)",
    "positive exponent": "e = Exp(x) d = Add(one, e) y = Div(x, d)",
    "growing exponent": "m = Mul(x, two) e = Exp(m) d = Add(one, e) y = Div(x, d)",
    "quick GELU already": "m = Mul(x, two) s = Sigmoid(m) y = Mul(x, s)",
    "plus two": "n = Neg(x) e = Exp(n) d = Add(two, e) y = Div(x, d)",
    "the other way round": "n = Neg(x) e = Exp(n) d = Add(one, e) y = Div(d, x)",
}
X = np.linspace(-90, 90, 6, dtype=np.float32).reshape(2, 3)


def graph(nodes: str) -> ir.Model:
    return ir.from_onnx_text(f"{TEXT} {{ {nodes} }}")


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(("nodes", "left"), WRITTEN_OUT.values(), ids=WRITTEN_OUT.keys())
def test_becomes_a_sigmoid_with_the_same_numbers(nodes: str, left: list[str], run: Run) -> None:
    model = graph(nodes)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "act"
    expected = run(model, x=X)
    assert FuseSilu()(model).changed == 1
    assert op_types(model) == left
    assert {node.metadata_props[MODULE_KEY] for node in model.graph} == {"act"}
    assert model.graph.outputs[0].name == "y"
    assert np.abs(run(model, x=X) - expected).max() <= 1e-6


@pytest.mark.parametrize("nodes", OTHERS.values(), ids=OTHERS.keys())
def test_another_function_stays(nodes: str) -> None:
    model = graph(nodes)
    before = op_types(model)
    assert FuseSilu()(model).changed == 0
    assert op_types(model) == before


@pytest.mark.parametrize(("nodes", "left"), WRITTEN_OUT.values(), ids=WRITTEN_OUT.keys())
def test_a_second_run_changes_nothing(nodes: str, left: list[str]) -> None:
    model = graph(nodes)
    FuseSilu()(model)
    before = ir.to_proto(model)
    assert FuseSilu()(model).changed == 0
    assert ir.to_proto(model) == before
    assert op_types(model) == left
