from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from exporters.passes.set_opset import SetOpset
from profiles.errors import GpusqError

Run = Callable[..., npt.NDArray[np.float32]]

NORM_GELU = """
    <ir_version: 11, opset_import: ["": 23, "com.microsoft": 1], metadata_props: ["kept": "yes"]>
    g (float[N,4] x) => (float[N,4] y)
    <float[4] gain = {1, 0.9, 1.1, 1}>
    {
        [norm] n = LayerNormalization<axis=-1>(x, gain)
        [gelu] y = Gelu(n)
    }
"""
ATTENTION = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,2,4,8] q) => (float[N,2,4,8] y)
    { [mix] y = Attention(q, q, q) }
"""
TYPED_DQ = """
    <ir_version: 11, opset_import: ["": 23]>
    g (int8[N,4] x) => (float16[N,4] y)
    <float s = {0.5}>
    { [dq] y = DequantizeLinear<output_dtype=10>(x, s) }
"""
MEAN = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N] y)
    <int64[1] axes = {1}>
    { [mean] y = ReduceMean<keepdims=0>(x, axes) }
"""


def test_declares_the_opset_and_its_ir_version() -> None:
    model = ir.from_onnx_text(NORM_GELU)
    outcome = SetOpset(20)(model)
    assert (outcome.name, outcome.changed, outcome.left_alone) == ("set opset", 1, ())
    assert (model.opset_imports[""], model.ir_version) == (20, 9)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_keeps_other_domains_names_and_metadata() -> None:
    model = ir.from_onnx_text(NORM_GELU)
    SetOpset(20)(model)
    assert model.opset_imports["com.microsoft"] == 1
    assert model.metadata_props == {"kept": "yes"}
    assert [node.name for node in model.graph] == ["norm", "gelu"]


@pytest.mark.parametrize(
    ("text", "opset", "message"),
    [
        (ATTENTION, 20, "mix: opset 20 has no operator Attention"),
        (NORM_GELU, 19, "gelu: opset 19 has no operator Gelu"),
        (TYPED_DQ, 21, "dq: DequantizeLinear has no attribute 'output_dtype' at opset 21"),
        (MEAN, 17, "mean: ReduceMean has 2 inputs, at opset 17 at most 1"),
    ],
)
def test_does_not_declare_an_opset_that_lacks_something_the_graph_uses(text: str, opset: int, message: str) -> None:
    model = ir.from_onnx_text(text)
    before = ir.to_proto(model)
    with pytest.raises(GpusqError) as caught:
        SetOpset(opset)(model)
    assert caught.value.message == message
    assert f"takes opset {opset}" in caught.value.hint
    assert ir.to_proto(model) == before


def test_does_not_judge_operators_of_other_domains() -> None:
    model = ir.from_onnx_text(NORM_GELU.replace("= Gelu", "= com.microsoft.Gelu"))
    assert SetOpset(17)(model).changed == 1


@pytest.mark.parametrize("opset", [20, 21, 22, 24])
def test_same_numbers_bit_for_bit(opset: int, run: Run) -> None:
    model = ir.from_onnx_text(NORM_GELU)
    x = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    before = run(model, x=x)
    SetOpset(opset)(model)
    assert np.array_equal(run(model, x=x), before)


@pytest.mark.parametrize("opset", [20, 23])
def test_a_second_run_changes_nothing(opset: int) -> None:
    model = ir.from_onnx_text(NORM_GELU)
    SetOpset(opset)(model)
    before = ir.to_proto(model)
    assert SetOpset(opset)(model).changed == 0
    assert ir.to_proto(model) == before
