from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from exporters.linears import array_of
from exporters.module_names import MODULE_KEY
from exporters.passes.lower_attention import LowerAttention
from exporters.passes.outcome import LeftAlone

Run = Callable[..., npt.NDArray[np.float32]]

SEPARATE = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,2,4,8] q, float[N,2,6,8] k, float[N,2,6,8] v) => (float[N,2,4,8] y)
    { [mix] y = Attention(q, k, v) }
"""


def with_mask(kind: str) -> str:
    """An attention with a mask as its fourth input."""
    return SEPARATE.replace("v)", f"v, {kind} m)", 1).replace("k, v)", "k, v, m)")


GENERAL_FORM = ["Mul", "Transpose", "MatMul", "Softmax", "MatMul"]


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def random_inputs(model: ir.Model) -> dict[str, npt.NDArray[np.generic]]:
    """Normal values for every input, or true ones, with a batch of 5."""
    random = np.random.default_rng(0)
    inputs: dict[str, npt.NDArray[np.generic]] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        shape = [dim if isinstance(dim, int) else 5 for dim in value.shape]
        drawn = random.standard_normal(shape, np.float32)
        inputs[value.name or ""] = drawn > -1 if value.dtype == ir.DataType.BOOL else drawn
    return inputs


def test_writes_it_as_matmul_softmax_matmul() -> None:
    model = ir.from_onnx_text(SEPARATE)
    outcome = LowerAttention()(model)
    assert (outcome.name, outcome.changed, outcome.left_alone) == ("lower attention", 1, ())
    assert op_types(model) == GENERAL_FORM


@pytest.mark.parametrize(
    "text",
    [
        SEPARATE,
        SEPARATE.replace("Attention(", "Attention<scale=0.3>("),
        SEPARATE.replace("N", "5"),
        with_mask("float[2,4,6]"),
        with_mask("bool[N,1,4,6]"),
    ],
    ids=["separate", "own scale", "fixed batch", "float mask", "boolean mask"],
)
def test_same_numbers(text: str, run: Run) -> None:
    model = ir.from_onnx_text(text)
    inputs = random_inputs(model)
    before = run(model, **inputs)
    LowerAttention()(model)
    assert np.abs(run(model, **inputs) - before).max() <= 1e-5


def test_multiplies_the_scale_into_q_and_not_into_the_product() -> None:
    model = ir.from_onnx_text(SEPARATE)
    LowerAttention()(model)
    scale = next(node for node in model.graph if node.op_type == "Mul")
    q, factor = scale.inputs
    assert q is model.graph.inputs[0]
    assert factor is not None
    assert array_of(factor) == np.float32(8**-0.5)


def test_keeps_the_name_of_the_output_and_the_module() -> None:
    model = ir.from_onnx_text(SEPARATE)
    list(model.graph)[-1].metadata_props[MODULE_KEY] = "blocks.0.attn"
    LowerAttention()(model)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert {node.metadata_props[MODULE_KEY] for node in model.graph} == {"blocks.0.attn"}
    assert "blocks.0.attn/Softmax" in [node.name for node in model.graph]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            SEPARATE.replace("v)", "v, double[4,6] m)", 1).replace("k, v)", "k, v, m)"),
            "its mask has another type",
        ),
        (
            SEPARATE.replace("v)", "v, float[N,2,6,8] past)", 1)
            .replace("k, v)", 'k, v, "", past, past)')
            .replace("= Attention", ", p, w = Attention"),
            "it has a key/value cache",
        ),
        (SEPARATE.replace("Attention(", "Attention<is_causal=1>("), "it is causal or"),
        (SEPARATE.replace("Attention(", "Attention<softcap=2.0>("), "has a soft cap"),
        (SEPARATE.replace("2,6,8", "1,6,8"), "its query heads share key heads"),
        (SEPARATE.replace("2,4,8", "2,4,D").replace("2,6,8", "2,6,D"), "not 4-D with a known head size"),
        (
            SEPARATE.replace("N,2,4,8", "N,4,16").replace("N,2,6,8", "N,6,16"),
            "its inputs are not 4-D",
        ),
    ],
    ids=["type of the mask", "cache", "causal", "soft cap", "shared heads", "unknown head size", "3-D"],
)
def test_leaves_what_is_no_plain_self_attention_alone_and_says_why(text: str, why: str) -> None:
    model = ir.from_onnx_text(text)
    outcome = LowerAttention()(model)
    assert outcome.changed == 0
    (left,) = outcome.left_alone
    assert left.where == "mix"
    assert why in left.why
    assert op_types(model) == ["Attention"]


@pytest.mark.parametrize(("read", "output"), [("present", "r"), ("q", "present")], ids=["by a node", "as an output"])
def test_leaves_one_whose_present_key_is_read_alone(read: str, output: str) -> None:
    text = """
        <ir_version: 11, opset_import: ["": 23]>
        g (float[N,2,4,8] q, float[N,2,6,8] k, float[N,2,6,8] v) => (float[N,2,4,8] y, float[N,2,6,8] OUTPUT)
        {
            [mix] y, present = Attention(q, k, v)
            [other] r = Relu(READ)
        }
    """
    model = ir.from_onnx_text(text.replace("OUTPUT", output).replace("READ", read))
    assert LowerAttention()(model).left_alone == (LeftAlone("mix", "its second output is read"),)


def test_an_attention_of_another_domain_is_not_ours() -> None:
    model = ir.from_onnx_text(
        SEPARATE.replace('"": 23', '"": 23, "com.microsoft": 1').replace("= Attention", "= com.microsoft.Attention")
    )
    assert (LowerAttention()(model).changed, op_types(model)) == (0, ["Attention"])


@pytest.mark.parametrize("text", [SEPARATE, with_mask("bool[N,1,4,6]")])
def test_a_second_run_changes_nothing(text: str) -> None:
    model = ir.from_onnx_text(text)
    LowerAttention()(model)
    before = ir.to_proto(model)
    assert LowerAttention()(model).changed == 0
    assert ir.to_proto(model) == before


ONE_VALUE = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,2,6,8] x, float[N,2,6,8] v) => (float[N,2,6,8] y)
    <float[N,2,6,8] a, float[N,2,6,8] b, float[N,2,6,8] t>
    { a = Relu(x) b = Relu(x) [mix] t = Attention(a, b, v) [other] y = Attention(t, x, v) }
"""


def test_writes_out_only_what_crashes_where_the_target_has_the_operator(run: Run) -> None:
    model = ir.from_onnx_text(ONE_VALUE)
    inputs = random_inputs(model)
    before = run(model, **inputs)
    outcome = LowerAttention(crashing=True)(model)
    assert [change.where for change in outcome.changes] == ["mix"]
    assert "query and key are one value" in outcome.changes[0].what
    assert op_types(model) == ["Relu", "Relu", *GENERAL_FORM, "Attention"]
    np.testing.assert_allclose(run(model, **inputs), before, rtol=1e-5, atol=1e-6)
    assert LowerAttention(crashing=True)(model).changed == 0


def test_leaves_what_crashes_where_it_cannot_write_it_out() -> None:
    model = ir.from_onnx_text(ONE_VALUE.replace("Attention(a", "Attention<is_causal=1>(a"))
    (left,) = LowerAttention(crashing=True)(model).left_alone
    assert left.where == "mix"
    assert left.why.startswith("it is causal or has a soft cap, and its query and key are one value")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (SEPARATE, ""),
        (SEPARATE.replace("[N,2,6,8]", "[N,2,T,8]"), "its number of tokens varies"),
        (
            SEPARATE.replace(
                "{ [mix] y = Attention(q",
                "<float s = {0.1}, int8 z = {0}, float[N,2,4,8] c> { a = QuantizeLinear(q, s, z) "
                "b = DequantizeLinear(a, s, z) t = Transpose<perm=[1,0,2,3]>(b) c = Transpose<perm=[1,0,2,3]>(t) "
                "[mix] y = Attention(c",
            ),
            "its operands are quantized and its softmax is not: no kernel computes that",
        ),
    ],
    ids=["known", "any number of tokens", "half quantized"],
)
def test_where_it_may_stay_it_is_written_so_only_if_that_is_fused(text: str, why: str) -> None:
    model = ir.from_onnx_text(text)
    outcome = LowerAttention(may_stay=True)(model)
    assert outcome.left_alone == ((LeftAlone("mix", why),) if why else ())
    assert ("Attention" in op_types(model)) is bool(why)
