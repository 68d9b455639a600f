from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from exporters.module_names import MODULE_KEY
from exporters.passes.split_packed import SplitPacked

Run = Callable[..., npt.NDArray[np.float32]]

PACKED = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[3,N,2,4,8] x) => (float[N,2,4,4] y)
    <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3},
     float[3,N,2,4,8] qkv, float[N,2,4,8] q, float[N,2,4,8] k, float[N,2,4,8] v>
    {
        qkv = Relu(x)
        [cut_q] q1 = Slice(qkv, zero, one, zero)
        [cut_k] k1 = Slice(qkv, one, two, zero)
        [cut_v] v1 = Slice(qkv, two, three, zero)
        [q] q = Squeeze(q1, zero)
        [k] k = Squeeze(k1, zero)
        [v] v = Squeeze(v1, zero)
        kv = Mul(k, v)
        kt = Transpose<perm=[0,1,3,2]>(kv)
        y = MatMul(q, kt)
    }
"""


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_takes_q_k_and_v_apart_with_one_split() -> None:
    model = ir.from_onnx_text(PACKED)
    list(model.graph)[1].metadata_props[MODULE_KEY] = "blocks.0.attn"
    assert SplitPacked()(model).changed == 1
    assert op_types(model) == ["Relu", "Reshape", "Split", "Mul", "Transpose", "MatMul"]
    assert [node.name for node in model.graph][1:3] == ["blocks.0.attn/Reshape", "blocks.0.attn/Split"]
    assert set(model.graph.initializers) == {"blocks.0.attn.flat"}


def test_same_numbers(run: Run) -> None:
    model = ir.from_onnx_text(PACKED)
    x = np.random.default_rng(0).standard_normal((3, 5, 2, 4, 8), np.float32)
    before = run(model, x=x)
    SplitPacked()(model)
    assert np.array_equal(run(model, x=x), before)


def test_a_second_run_changes_nothing() -> None:
    model = ir.from_onnx_text(PACKED)
    SplitPacked()(model)
    once = ir.to_proto(model)
    assert SplitPacked()(model).changed == 0
    assert ir.to_proto(model) == once


@pytest.mark.parametrize(
    "text",
    [
        PACKED.replace("one, two, zero)", "one, two, zero, one)"),
        PACKED.replace("two, three, zero)", "one, three, zero)"),
        PACKED.replace("x) =>", "x, int64[1] end) =>").replace("two, three, zero)", "two, end, zero)"),
        PACKED.replace("3,N,2,4,8", "3,N,H,4,8"),
        PACKED.replace("y = MatMul(q, kt)", "z = ReduceSum<keepdims=0>(qkv)\n w = MatMul(q, kt)\n y = Mul(w, z)"),
        PACKED.replace("k = Squeeze(k1, zero)", "k2 = Relu(k1)\n k = Squeeze(k2, zero)"),
    ],
    ids=["with steps", "two at once", "a bound that is no constant", "unknown heads", "read whole", "no Squeeze"],
)
def test_slices_that_are_not_q_k_v_of_one_known_tensor_are_kept(text: str) -> None:
    model = ir.from_onnx_text(text)
    before = op_types(model)
    assert SplitPacked()(model).changed == 0
    assert op_types(model) == before


def test_slices_that_the_attention_operator_reads_cost_nothing_and_stay() -> None:
    text = PACKED.replace("kt = Transpose<perm=[0,1,3,2]>(kv)", "").replace("kv = Mul(k, v)", "")
    model = ir.from_onnx_text(text.replace("y = MatMul(q, kt)", "y = Attention(q, k, v)").replace("4,4] y", "4,8] y"))
    assert SplitPacked()(model).changed == 0
