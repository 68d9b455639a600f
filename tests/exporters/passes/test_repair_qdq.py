from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from deploy.compiled_kernels import read_kernels
from deploy.tensorrt_api import build_engine
from exporters.passes.outcome import Change
from exporters.passes.repair_qdq import RepairQdq
from profiles.device import SparseKernels

Run = Callable[..., npt.NDArray[np.float32]]


def listed(integers: npt.NDArray[np.int8]) -> str:
    return ", ".join(map(str, integers.reshape(-1)))


WEIGHT = np.random.default_rng(0).integers(-100, 100, (8, 8)).astype(np.int8)
HEAD = f"""
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,4,8] x) => (float[N,4,8] y)
    <float s = {{0.05}}, float t = {{0.002}}, int8 z = {{0}}, int8 z2 = {{0}}, int8[8,8] w = {{{listed(WEIGHT)}}},
     float[8] g = {{1,1,1,1,1,1,1,1}}>
"""
INT8_OUTPUTS = SparseKernels(int8_k_multiple=32, float16_k_multiple=16, int8_wants_int8_output=True, source="test")


def model_of(body: str, head: str = HEAD) -> ir.Model:
    return ir.from_onnx_text(head + "{" + body + "}")


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


LINEAR = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) wd = DequantizeLinear(w, t, z) y = MatMul(d, wd)"
NORM = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = LayerNormalization(d, g)"
RESHAPED = """
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) t1 = Transpose<perm=[0,2,1]>(d)
    q2 = QuantizeLinear(t1, s, z) d2 = DequantizeLinear(q2, s, z) t2 = Transpose<perm=[0,2,1]>(d2)
    wd = DequantizeLinear(w, t, z) y = MatMul(t2, wd)
"""
RESIDUAL = """
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) wd = DequantizeLinear(w, t, z) m = MatMul(d, wd)
    mq = QuantizeLinear(m, s, z) md = DequantizeLinear(mq, s, z) xq = QuantizeLinear(x, s, z)
    xd = DequantizeLinear(xq, s, z) y = Add(xd, md)
"""
ATTENTION = """
    q8 = QuantizeLinear(x, s, z) q = DequantizeLinear(q8, s, z)
    xt = Transpose<perm=[0,2,1]>(x) k8 = QuantizeLinear(xt, s, z) k = DequantizeLinear(k8, s, z)
    a = MatMul(q, k) p = Softmax(a) p8 = QuantizeLinear(p, t, z) pd = DequantizeLinear(p8, t, z)
    v8 = QuantizeLinear(x, s, z) v = DequantizeLinear(v8, s, z) y = MatMul(pd, v)
"""
HALF_ATTENTION = ATTENTION.replace("p8 = QuantizeLinear(p, t, z) pd = DequantizeLinear(p8, t, z)", "pd = Identity(p)")


def test_a_quantized_product_is_left_as_it_is() -> None:
    model = model_of(LINEAR)
    before = ir.to_proto(model)
    assert RepairQdq()(model).changed == 0
    assert ir.to_proto(model) == before


def test_what_no_kernel_computes_on_integers_reads_floats_and_is_told() -> None:
    model = model_of(NORM)
    outcome = RepairQdq()(model)
    assert op_types(model) == ["LayerNormalization"]
    (change,) = outcome.changes
    assert change.what == "removed ahead of LayerNormalization: no kernel computes LayerNormalization on integers"


def test_moves_work_on_integers_and_a_quantizer_behind_its_own_inverse_is_dropped(run: Run) -> None:
    model = model_of(RESHAPED)
    x = np.random.default_rng(1).standard_normal((3, 4, 8), np.float32)
    before = run(model, x=x)
    RepairQdq()(model)
    assert op_types(model).count("QuantizeLinear") == 1
    moves = [node for node in model.graph if node.op_type == "Transpose"]
    assert all(node.outputs[0].dtype == ir.DataType.INT8 for node in moves)
    assert np.array_equal(run(model, x=x), before)


def test_the_sum_of_a_transformer_is_left_in_high_precision(run: Run) -> None:
    model = model_of(RESIDUAL)
    x = np.random.default_rng(1).standard_normal((3, 4, 8), np.float32)
    before = run(model, x=x)
    outcome = RepairQdq()(model)
    assert {change.what for change in outcome.changes} == {
        "removed ahead of Add: sums of transformers stay in high precision"
    }
    assert op_types(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Add"]
    assert np.abs(run(model, x=x) - before).max() <= 0.05 * 1.01  # one step: half of one for each of the two


def test_the_output_quantizer_of_a_sparse_layer_stays_where_sparse_kernels_ask_for_it() -> None:
    model = model_of(RESIDUAL)
    sparse = WEIGHT.copy()
    sparse[0::4] = sparse[1::4] = 0  # 2:4 along K
    model.graph.initializers["w"].const_value = ir.tensor(sparse, name="w")
    for rules, left in ((None, 1), (INT8_OUTPUTS, 2)):
        clone = model.clone()
        RepairQdq(rules)(clone)
        assert op_types(clone).count("QuantizeLinear") == left


def test_an_attention_whose_four_operands_are_quantized_keeps_them() -> None:
    model = model_of(ATTENTION, HEAD.replace("4,8] y", "4,8] y"))
    before = [op for op in op_types(model) if op == "QuantizeLinear"]
    RepairQdq()(model)
    assert [op for op in op_types(model) if op == "QuantizeLinear"] == before


def test_a_part_of_an_attention_is_no_attention_of_integers() -> None:
    model = model_of(HALF_ATTENTION)
    outcome = RepairQdq()(model)
    assert "QuantizeLinear" not in op_types(model)
    reasons = {change.what.rpartition(": ")[2] for change in outcome.changes}
    assert reasons <= {"a part of the attention has no quantizer", "the other operand is not quantized"}


def test_a_constant_that_is_added_is_dequantized_exactly(run: Run) -> None:
    body = LINEAR.replace("y = ", "m = ") + "b = DequantizeLinear(c, t, z2) y = Add(m, b)"
    model = model_of(body, HEAD.replace("int8 z = {0}", "int8 z = {0}, int8[8] c = {1,2,3,4,5,-6,-7,127}"))
    x = np.random.default_rng(1).standard_normal((3, 4, 8), np.float32)
    before = run(model, x=x)
    assert Change("", "a constant that no product reads is dequantized") in [
        Change("", change.what) for change in RepairQdq()(model).changes
    ]
    assert np.array_equal(run(model, x=x), before)


CNN = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,8,4,4] x) => (float[N,8,4,4] y)
    <float s = {0.05}, float t = {0.02}, int8 z = {0}, int8[8,8,1,1] k = {ONES}>
    {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) wd = DequantizeLinear(k, t, z) c = Conv(d, wd)
        cq = QuantizeLinear(c, s, z) cd = DequantizeLinear(cq, s, z) xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z) y = Add(xd, cd)
    }
"""


def test_the_sum_of_a_cnn_keeps_the_quantizers_of_both_branches(run: Run) -> None:
    model = ir.from_onnx_text(CNN.replace("ONES", listed(np.ones((8, 8, 1, 1), np.int8))))
    x = np.random.default_rng(0).standard_normal((2, 8, 4, 4), np.float32)
    before = run(model, x=x)
    assert RepairQdq()(model).changed == 0
    assert np.array_equal(run(model, x=x), before)


SHARED_CNN = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,8,4,4] x) => (float[N,8,4,4] y)
    <float s = {0.05}, float t = {0.02}, int8 z = {0}, int8[8,8,1,1] k = {ONES}>
    {
        wd = DequantizeLinear(k, t, z) w1 = DequantizeLinear(k, t, z) w2 = DequantizeLinear(k, t, z)
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) first = Conv(d, wd)
        fq = QuantizeLinear(first, s, z) fd = DequantizeLinear(fq, s, z) c = Conv(fd, w1)
        cq = QuantizeLinear(c, s, z) cd = DequantizeLinear(cq, s, z) r = Add(SUM)
        rq = QuantizeLinear(r, s, z) rd = DequantizeLinear(rq, s, z) y = Conv(rd, w2)
    }
"""


@pytest.mark.parametrize("order", ["fd, cd", "cd, fd"])
def test_a_sum_keeps_both_quantizers_where_another_convolution_reads_a_branch_too(order: str) -> None:
    text = SHARED_CNN.replace("ONES", listed(np.ones((8, 8, 1, 1), np.int8))).replace("SUM", order)
    model = ir.from_onnx_text(text)
    RepairQdq()(model)
    add = next(node for node in model.graph if node.op_type == "Add")
    assert {value.name for value in add.inputs if value is not None} == {"fd", "cd"}


JOINED = """
    a = QuantizeLinear(x, s, z) ad = DequantizeLinear(a, s, z) xt = Relu(x)
    b = QuantizeLinear(xt, s, z) bd = DequantizeLinear(b, s, z) c = Concat<axis=1>(ad, bd)
"""


def test_a_concatenation_takes_integers_only_ahead_of_a_layer_that_does() -> None:
    behind = "cq = QuantizeLinear(c, s, z) cd = DequantizeLinear(cq, s, z)"
    layer = model_of(f"{JOINED} {behind} wd = DequantizeLinear(w, t, z) y = MatMul(cd, wd)")
    assert RepairQdq()(layer).changed == 0
    norm = model_of(f"{JOINED} {behind} y = LayerNormalization(cd, g)")
    RepairQdq()(norm)
    assert op_types(norm) == ["Relu", "Concat", "LayerNormalization"]


@pytest.mark.parametrize("body", [NORM, RESHAPED, RESIDUAL, ATTENTION, HALF_ATTENTION])
def test_a_second_run_changes_nothing(body: str) -> None:
    model = model_of(body)
    RepairQdq()(model)
    once = ir.to_proto(model)
    assert RepairQdq()(model).changed == 0
    assert ir.to_proto(model) == once


UPSAMPLED = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,2,3,3] x) => (float[N,2,6,6] y)
    <float s = {0.05}, float[2] t = {0.01, 0.02}, int8 z = {0}, int8[2] z2 = {0, 0},
     int8[2,2,2,2] w = {1, -2, 3, 4, 50, 60, -70, 80, 9, 10, 11, -12, 100, 110, 120, -127}>
    {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) wd = DequantizeLinear<axis=1>(w, t, z2)
        y = ConvTranspose<strides=[2,2]>(d, wd)
    }
"""


def test_a_transposed_convolution_gets_its_float_input_and_its_weight_dequantized(run: Run) -> None:
    """Within half a step of the input's quantizer times the largest weights; a second run changes nothing."""
    model = ir.from_onnx_text(UPSAMPLED)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 2, 3, 3)).astype(np.float32)
    before = run(model, x=x)
    assert RepairQdq()(model).changed == 2
    assert op_types(model) == ["ConvTranspose"]
    assert np.abs(run(model, x=x) - before).max() <= 0.5 * 0.05 * 2 * 127 * 0.02
    assert RepairQdq()(model).changed == 0


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="compiling needs tensorrt-rtx")
@pytest.mark.parametrize("scales", ["", "<axis=1>"], ids=["per tensor", "per channel"])
def test_the_compiler_has_no_integer_kernel_for_a_transposed_convolution(tmp_path: Path, scales: str) -> None:
    text = UPSAMPLED if scales else UPSAMPLED.replace("<axis=1>(w, t, z2)", "(w, s, z)")
    ir.save(ir.from_onnx_text(text), tmp_path / "model.onnx")
    built = build_engine(tmp_path / "model.onnx", "tensorrt-rtx", compute_capability="SM80")
    operands = [kernel.operands for kernel in read_kernels(built.log) if kernel.kind == "convolution"]
    assert "Int8" not in {dtype for each in operands for dtype in each}
