from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from exporters.passes.fuse_gelu import FuseGelu

WRITTEN_OUT = """
<ir_version: 10, opset_import: ["" : {opset}]>
written_out (float[2, 3] x) => (float[2, 3] y)
<float half = {{0.5}}, float one = {{1}}, float three = {{3}}, float a = {{{a}}}, float b = {{0.7978845608}}>
{{
   halved = Mul({first}, {second})
   cubed = Pow(x, three)
   scaled = Mul(a, cubed)
   sum = Add(x, scaled)
   inner = Mul(b, sum)
   t = Tanh(inner)
   shifted = Add(one, t)
   y = Mul(halved, shifted)
}}
"""


def graph(*, opset: int = 20, a: float = 0.044715, swapped: bool = False) -> ir.Model:
    first, second = ("x", "half") if swapped else ("half", "x")
    return ir.from_onnx_text(WRITTEN_OUT.format(opset=opset, a=a, first=first, second=second))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("swapped", [False, True])
def test_becomes_one_operator_with_the_same_numbers(swapped: bool, run: Callable[..., npt.NDArray[np.float32]]) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3), np.float32) * 3
    model = graph(swapped=swapped)
    expected = run(model, x=x)
    assert FuseGelu()(model).changed == 1
    (node,) = model.graph
    assert (node.op_type, node.attributes["approximate"].as_string()) == ("Gelu", "tanh")
    assert model.graph.outputs[0].name == "y"
    assert np.abs(run(model, x=x) - expected).max() <= 1e-6


def test_another_constant_is_another_function() -> None:
    model = graph(a=0.05)
    assert FuseGelu()(model).changed == 0
    assert "Tanh" in operators(model)


def test_leaves_a_graph_of_an_older_opset_and_says_why() -> None:
    outcome = FuseGelu()(graph(opset=17))
    assert outcome.changed == 0
    assert "opset 20" in outcome.left_alone[0].why


def test_a_second_run_changes_nothing() -> None:
    model = graph()
    FuseGelu()(model)
    before = ir.to_proto(model).SerializeToString()
    assert FuseGelu()(model).changed == 0
    assert ir.to_proto(model).SerializeToString() == before
