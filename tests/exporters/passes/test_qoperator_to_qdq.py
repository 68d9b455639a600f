from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from exporters.module_names import MODULE_KEY
from exporters.passes.outcome import LeftAlone
from exporters.passes.qoperator_to_qdq import QOperatorToQdq
from exporters.qdq_scales import constant_of
from profiles.errors import GpusqError

Numbers = npt.NDArray[np.float32]

HEAD = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>'
# Scales, zero-points and weights that the operators share; the output has the scale 0.1.
CONSTANTS = """
    float s = {0.05}, uint8 z = {120}, float o = {0.1}, uint8 oz = {131}, float[2] ws = {0.02, 0.03},
    int8[2] wz = {0, 3}, int8[4,2] w = {10, -20, 30, 40, -50, 60, 70, -80}, int32[2] b = {300, -500}
"""


def matrix_graph(operator: str) -> str:
    return f"""{HEAD}
        g (float[N,4] x) => (float[N,M] y) <{CONSTANTS}>
        {{
            [q] xq = QuantizeLinear(x, s, z)
            [layer] t = {operator}
            [dq] y = DequantizeLinear(t, o, oz)
        }}
    """


def image_graph(operator: str) -> str:
    weights = "int8[2,4,1,1] k = {10, -20, 30, 40, -50, 60, 70, -80}"
    return f"""{HEAD}
        g (float[N,4,4,4] x) => (float[N,C,H,W] y) <{CONSTANTS}, {weights}>
        {{
            [q] xq = QuantizeLinear(x, s, z)
            [layer] t = {operator}
            [dq] y = DequantizeLinear(t, o, oz)
        }}
    """


MATRICES = {
    "MatMul": "QLinearMatMul(xq, s, z, w, ws, wz, o, oz)",
    "Gemm": "com.microsoft.QGemm<alpha=0.5>(xq, s, z, w, ws, wz, b, o, oz)",
    "Add": "com.microsoft.QLinearAdd(xq, s, z, xq, s, z, o, oz)",
    "Mul": "com.microsoft.QLinearMul(xq, s, z, xq, s, z, o, oz)",
    "Sigmoid": "com.microsoft.QLinearSigmoid(xq, s, z, o, oz)",
    "LeakyRelu": "com.microsoft.QLinearLeakyRelu<alpha=0.1>(xq, s, z, o, oz)",
    "Softmax": "com.microsoft.QLinearSoftmax<axis=-1, opset=17>(xq, s, z, o, oz)",
    "Concat": "com.microsoft.QLinearConcat<axis=1>(o, oz, xq, s, z, xq, s, z)",
}
IMAGES = {
    "Conv": "QLinearConv(xq, s, z, k, ws, wz, o, oz, b)",
    "AveragePool": "com.microsoft.QLinearAveragePool<kernel_shape=[2,2]>(xq, s, z, o, oz)",
    "GlobalAveragePool": "com.microsoft.QLinearGlobalAveragePool<channels_last=0>(xq, s, z, o, oz)",
}
GRAPHS = {name: matrix_graph(text) for name, text in MATRICES.items()} | {
    name: image_graph(text) for name, text in IMAGES.items()
}
MOVES = matrix_graph(
    """Identity(xq)
            [turn] t1 = Transpose<perm=[1,0]>(t)
            [back] t2 = Transpose<perm=[1,0]>(t1)
            [both] t3 = Concat<axis=1>(t2, xq)"""
).replace("DequantizeLinear(t, o, oz)", "DequantizeLinear(t3, s, z)")


def rewritten(text: str) -> ir.Model:
    model = ir.from_onnx_text(text)
    QOperatorToQdq()(model)
    return model


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def as_written(model: ir.Model, path: Path, x: Numbers) -> Numbers:
    """What the graph computes node by node, not as onnxruntime fuses it."""
    ir.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.asarray(found[0])


def inputs(text: str) -> Numbers:
    shape = (8, 4, 4, 4) if "float[N,4,4,4] x" in text else (8, 4)
    return np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)


@pytest.mark.parametrize("name", GRAPHS)
def test_rewrites_each_integer_operator(name: str) -> None:
    model = ir.from_onnx_text(GRAPHS[name])
    outcome = QOperatorToQdq()(model)
    assert (outcome.name, outcome.changed, outcome.left_alone) == ("Q operators to Q/DQ", 1, ())
    dequantized = ["DequantizeLinear"] * (1 if "Pool" in name or name in ("Sigmoid", "LeakyRelu", "Softmax") else 2)
    assert op_types(model) == ["QuantizeLinear", *dequantized, name, "QuantizeLinear", "DequantizeLinear"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("name", GRAPHS)
def test_same_numbers_within_one_step_of_the_output(name: str, tmp_path: Path) -> None:
    x = inputs(GRAPHS[name])
    before = as_written(ir.from_onnx_text(GRAPHS[name]), tmp_path / "before.onnx", x)
    after = as_written(rewritten(GRAPHS[name]), tmp_path / "after.onnx", x)
    assert before.std() > 0.02  # not saturated to one number
    assert np.abs(after - before).max() <= 0.1 * (1 + 1e-5)
    assert np.mean(after == before) > 0.9  # the mean of four integers is often a tie


@pytest.mark.parametrize("text", [*GRAPHS.values(), MOVES])
def test_a_second_run_changes_nothing(text: str) -> None:
    model = rewritten(text)
    before = ir.to_proto(model)
    assert QOperatorToQdq()(model).changed == 0
    assert ir.to_proto(model) == before


def test_scales_and_zero_points_are_the_same_tensors() -> None:
    model = ir.from_onnx_text(GRAPHS["Conv"])
    held = {
        name: value for name, value in model.graph.initializers.items() if name in ("s", "z", "ws", "wz", "o", "oz")
    }
    QOperatorToQdq()(model)
    _, x_dq, w_dq, _, q, _ = model.graph
    for node, names in ((x_dq, "s z"), (w_dq, "ws wz"), (q, "o oz")):
        assert list(node.inputs[1:]) == [held[name] for name in names.split()]
    assert w_dq.attributes.get_int("axis") == 0


def test_a_bias_is_the_integer_times_both_scales() -> None:
    model = rewritten(GRAPHS["Conv"])
    conv = next(node for node in model.graph if node.op_type == "Conv")
    bias = constant_of(conv.inputs[2])
    wanted = np.array([300, -500], np.float32) * (np.float32(0.05) * np.array([0.02, 0.03], np.float32))
    assert bias is not None
    assert bias.tobytes() == wanted.tobytes()


def test_keeps_the_node_its_attributes_its_module_and_the_output() -> None:
    text = image_graph("QLinearConv<strides=[2,2]>(xq, s, z, k, ws, wz, o, oz)").replace(
        "=> (float[N,C,H,W] y)", "=> (uint8[N,C,H,W] t, float[N,C,H,W] y)"
    )
    model = ir.from_onnx_text(text)
    model.graph[1].metadata_props[MODULE_KEY] = "stem.conv"
    QOperatorToQdq()(model)
    conv = next(node for node in model.graph if node.op_type == "Conv")
    assert (conv.name, list(conv.attributes.get_ints("strides"))) == ("layer", [2, 2])
    assert {node.metadata_props.get(MODULE_KEY) for node in list(model.graph)[1:-1]} == {"stem.conv"}
    assert [value.name for value in model.graph.outputs] == ["t", "y"]


def test_a_gemm_without_an_output_scale_writes_floats(tmp_path: Path) -> None:
    text = f"""{HEAD}
        g (float[N,4] x) => (float[N,2] y) <{CONSTANTS}>
        {{ xq = QuantizeLinear(x, s, z) y = com.microsoft.QGemm(xq, s, z, w, ws, wz, b) }}
    """
    x = inputs(text)
    before = as_written(ir.from_onnx_text(text), tmp_path / "before.onnx", x)
    model = rewritten(text)
    assert op_types(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Gemm"]
    after = as_written(model, tmp_path / "after.onnx", x)
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_moved_integers_get_a_pair_of_their_own_bit_for_bit(tmp_path: Path) -> None:
    x = inputs(MOVES)
    before = as_written(ir.from_onnx_text(MOVES), tmp_path / "before.onnx", x)
    model = rewritten(MOVES)
    assert np.array_equal(as_written(model, tmp_path / "after.onnx", x), before)
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            assert {user.op_type for user, _ in node.outputs[0].uses()} == {"DequantizeLinear"}


def test_a_moved_output_of_the_graph_keeps_its_name_and_type(tmp_path: Path) -> None:
    text = f"""{HEAD}
        g (float[2,4] x) => (uint8[4,2] y) <{CONSTANTS}>
        {{ xq = QuantizeLinear(x, s, z) y = Transpose<perm=[1,0]>(xq) }}
    """
    x = inputs(text)[:2]
    before = as_written(ir.from_onnx_text(text), tmp_path / "before.onnx", x)
    model = rewritten(text)
    assert (model.graph.outputs[0].name, model.graph.outputs[0].dtype) == ("y", ir.DataType.UINT8)
    assert np.array_equal(as_written(model, tmp_path / "after.onnx", x), before)


@pytest.mark.parametrize(
    "nodes",
    [
        "t = Transpose<perm=[1,0]>(x) y = Transpose<perm=[1,0]>(t)",
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Identity(d)",
        "q = QuantizeLinear(x, s, z) r = QuantizeLinear(x, o, oz) c = Concat<axis=0>(q, r) y = Cast<to=1>(c)",
    ],
    ids=["floats", "Q/DQ already", "integers of two scales"],
)
def test_leaves_other_graphs_alone(nodes: str) -> None:
    model = ir.from_onnx_text(f"{HEAD} g (float[4,4] x) => (float[N,M] y) <{CONSTANTS}> {{ {nodes} }}")
    before = ir.to_proto(model).graph.node
    assert QOperatorToQdq()(model).changed == 0
    assert ir.to_proto(model).graph.node == before


def test_quantizers_of_onnxruntime_become_standard_ones() -> None:
    text = f"""{HEAD}
        g (float[N] x) => (float[N] y) <float s = {{0.5}}, int8 z = {{0}}>
        {{ q = com.microsoft.QuantizeLinear(x, s, z) y = com.microsoft.DequantizeLinear(q, s, z) }}
    """
    model = ir.from_onnx_text(text)
    assert QOperatorToQdq()(model).changed == 2
    assert {node.domain for node in model.graph} == {""}


def test_a_16_bit_quantizer_stays_where_the_opset_has_none() -> None:
    text = f"""{HEAD}
        g (float[N] x) => (uint16[N] y) <float s = {{0.5}}, uint16 z = {{0}}>
        {{ [q] y = com.microsoft.QuantizeLinear(x, s, z) }}
    """
    outcome = QOperatorToQdq()(ir.from_onnx_text(text))
    assert outcome.left_alone == (LeftAlone("q", "the standard operator has no uint16 before opset 21"),)


DYNAMIC = """
    [scan] xq, xs, xz = DynamicQuantizeLinear(x)
    [fc] i = MatMulInteger(xq, w, xz)
    f = Cast<to=1>(i)
    y = Mul(f, xs)
"""


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (DYNAMIC, r"^node 'scan' \(DynamicQuantizeLinear\) and 1 more: dynamic quantization computes its scales"),
        (
            "[all] y = com.microsoft.DynamicQuantizeMatMul(x, w, ws, wz)",
            r"^node 'all' \(DynamicQuantizeMatMul\): dynamic",
        ),
        (
            "[far] y = com.microsoft.QLinearReduceMean<axes=[1]>(x, s, z, o, oz)",
            "this integer operator has no Q/DQ form",
        ),
        (
            "xq = QuantizeLinear(x, s, z) "
            "[odd] y = com.microsoft.QLinearGlobalAveragePool<channels_last=1>(xq, s, z, o, oz)",
            "channels_last has no counterpart",
        ),
        (
            "xq = QuantizeLinear(x, s, z) c = Cast<to=6>(xq) "
            "[odd] y = com.microsoft.QGemm(xq, s, z, w, ws, wz, c, o, oz)",
            "its int32 bias or the scales of it are computed",
        ),
    ],
)
def test_refuses_what_has_no_form_and_edits_nothing(nodes: str, words: str) -> None:
    model = ir.from_onnx_text(f"{HEAD} g (float[N,4] x) => (float[N,M] y) <{CONSTANTS}> {{ {nodes} }}")
    before = ir.to_proto(model)
    with pytest.raises(GpusqError, match=words) as caught:
        QOperatorToQdq()(model)
    assert "QuantFormat.QDQ" in caught.value.hint
    assert ir.to_proto(model) == before


def test_names_the_module_of_what_it_refuses() -> None:
    model = ir.from_onnx_text(f"{HEAD} g (float[N,4] x) => (float[N,M] y) <{CONSTANTS}> {{ {DYNAMIC} }}")
    model.graph[0].metadata_props[MODULE_KEY] = "blocks.3.mlp"
    with pytest.raises(GpusqError, match=r"^blocks\.3\.mlp, node 'scan'"):
        QOperatorToQdq()(model)
