from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from exporters.passes.annotate_sparsity import KEY, AnnotateSparsity
from exporters.passes.outcome import LeftAlone
from profiles.device import SparseKernels

Run = Callable[..., npt.NDArray[np.float32]]
RULES = SparseKernels(int8_k_multiple=4, float16_k_multiple=4, int8_wants_int8_output=False, source="this test")

TWO_LAYERS = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,2] y)
    <float[4,4] w1 = {1, 0, 5, 0, 0, 2, 6, 0, 3, 0, 7, 1, 0, 4, 0, 1}, float[2,4] w2 = {1, 0, 0, 2, 0, 0, 3, 0}>
    {
        [dense] t = MatMul(x, w1)
        [pruned] y = Gemm<transB=1>(t, w2)
    }
"""
INT8_WEIGHT = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,1] y)
    <int8[4,1] w = {1, 0, 0, -2}, float[1] s = {0.5}, int8[1] z = {0}>
    {
        [dq] wd = DequantizeLinear<axis=1>(w, s, z)
        [fc] y = MatMul(x, wd)
    }
"""


def annotations_of(model: ir.Model) -> dict[str, dict[str, str]]:
    """Node → its annotations, `gpusq.sparsity` left out of their names."""
    return {
        node.name or "": {key.removeprefix(KEY).lstrip("."): value for key, value in node.metadata_props.items()}
        for node in model.graph
    }


def test_annotates_each_linear_layer_along_its_k() -> None:
    model = ir.from_onnx_text(TWO_LAYERS)
    outcome = AnnotateSparsity(None)(model)
    assert (outcome.name, outcome.changed) == ("annotate sparsity", 2)
    found = annotations_of(model)
    assert found["pruned"] == {
        "": "2:4",
        "axis": "1",
        "eligible": "false",
        "reason": "this runtime has no 2:4 kernels",
    }
    assert (found["dense"][""], found["dense"]["axis"], found["dense"]["eligible"]) == ("dense", "0", "false")


def test_leaves_the_dense_ones_alone_and_says_why() -> None:
    outcome = AnnotateSparsity(RULES)(ir.from_onnx_text(TWO_LAYERS))
    assert outcome.left_alone == (LeftAlone("dense", "1 of 4 groups of four (25.0 %) hold more than two values"),)


def test_judges_the_stored_integers_behind_a_dq() -> None:
    model = ir.from_onnx_text(INT8_WEIGHT)
    AnnotateSparsity(RULES)(model)
    assert annotations_of(model) == {"dq": {}, "fc": {"": "2:4", "axis": "0", "eligible": "true"}}


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        ("[q] y = QuantizeLinear(t, s0, z0)", None),
        ("[add] a = Add(t, b) [q] y = QuantizeLinear(a, s0, z0)", None),
        ("[relu] r = Relu(t) [q] y = QuantizeLinear(r, s0, z0)", "no quantizer follows here"),
    ],
)
def test_says_whether_the_output_is_int8_where_the_rules_ask_for_it(tail: str, reason: str | None) -> None:
    text = INT8_WEIGHT.replace("float[N,1] y", "int8[N,1] y").replace("[fc] y", "[fc] t")
    text = text.replace("int8[1] z = {0}>", "int8[1] z = {0}, float s0 = {0.5}, int8 z0 = {0}, float[1] b = {1}>")
    model = ir.from_onnx_text(text.replace("MatMul(x, wd)", f"MatMul(x, wd) {tail}"))
    AnnotateSparsity(RULES.model_copy(update={"int8_wants_int8_output": True}))(model)
    found = annotations_of(model)["fc"]
    assert found["eligible"] == "true"
    assert ("reason" in found) == (reason is not None)
    assert (reason or "") in found.get("reason", "")


def test_annotates_convolutions_along_their_input_channels() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["": 23]>
        g (float[1,4,5,5] x) => (float[1,1,4,5] y)
        <float[1,4,2,1] w = {1, 0, 0, 2, 3, 0, 0, 4}>
        { [conv] y = Conv(x, w) }
    """)
    AnnotateSparsity(None)(model)
    found = annotations_of(model)["conv"]
    assert (found[""], found["axis"]) == ("2:4", "1")


def test_tells_of_a_weight_whose_k_is_not_known() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["": 23]>
        g (float[N,4] x) => (float[N,2] y)
        <float[2,2,2] w = {1, 0, 0, 2, 3, 0, 0, 4}, int64[2] shape = {4, 2}>
        { r = Reshape(w, shape) [fc] y = MatMul(x, r) }
    """)
    outcome = AnnotateSparsity(None)(model)
    assert (outcome.changed, annotations_of(model)["fc"]) == (0, {})
    assert outcome.left_alone == (LeftAlone("fc", "a reshape of its weight splits or merges K"),)


def test_replaces_what_another_target_was_told() -> None:
    model = ir.from_onnx_text(INT8_WEIGHT)
    AnnotateSparsity(None)(model)
    assert AnnotateSparsity(RULES)(model).changed == 1
    assert annotations_of(model)["fc"] == {"": "2:4", "axis": "0", "eligible": "true"}


def test_keeps_other_metadata() -> None:
    model = ir.from_onnx_text(INT8_WEIGHT)
    model.graph[1].metadata_props["gpusq.module"] = "blocks.0.fc"
    AnnotateSparsity(RULES)(model)
    assert model.graph[1].metadata_props["gpusq.module"] == "blocks.0.fc"


def test_same_numbers_bit_for_bit(run: Run) -> None:
    model = ir.from_onnx_text(TWO_LAYERS)
    x = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    before = run(model, x=x)
    AnnotateSparsity(RULES)(model)
    assert np.array_equal(run(model, x=x), before)


def test_a_second_run_changes_nothing() -> None:
    model = ir.from_onnx_text(TWO_LAYERS)
    first = AnnotateSparsity(RULES)(model)
    before = ir.to_proto(model)
    second = AnnotateSparsity(RULES)(model)
    assert (second.changed, second.left_alone) == (0, first.left_alone)
    assert ir.to_proto(model) == before
