from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.module_names import MODULE_KEY
from exporters.passes.fold_batch_norm import FoldBatchNorm
from exporters.save_onnx import save_onnx

Run = Callable[..., npt.NDArray[np.float32]]

IMAGE, ROWS = "float[N,4,5,5] x", "float[N,4] x"
# The layer, its input, the shape of its weight and of its bias.
LAYERS: dict[str, tuple[str, str, list[int], list[int]]] = {
    "Conv": ("Conv(x, w, b)", IMAGE, [6, 4, 3, 3], [6]),
    "Conv without bias": ("Conv<pads=[1,1,1,1]>(x, w)", IMAGE, [6, 4, 3, 3], [6]),
    "grouped Conv": ("Conv<group=2>(x, w, b)", IMAGE, [6, 2, 3, 3], [6]),
    "ConvTranspose": ("ConvTranspose<strides=[2,2]>(x, w, b)", IMAGE, [4, 6, 3, 3], [6]),
    "grouped ConvTranspose": ("ConvTranspose<group=2>(x, w)", IMAGE, [4, 3, 3, 3], [6]),
    "Gemm": ("Gemm(x, w, b)", ROWS, [4, 6], [6]),
    "transposed Gemm": ("Gemm<transB=1, alpha=0.5, beta=3.0>(x, w, b)", ROWS, [6, 4], [1, 6]),
    "Gemm with one bias": ("Gemm(x, w, b)", ROWS, [4, 6], []),
    "MatMul": ("MatMul(x, w)", ROWS, [4, 6], [6]),
}


def graph(layer: str, *, seed: int = 0, after: str = "", training: int = 0) -> ir.Model:
    call, x, weight, bias = LAYERS[layer]
    y = "float[N,6]" if x == ROWS else "float[N,6,H,W]"
    proto = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]> g ({x}) => ({y} y)
        {{
            [layer] h = {call}
            [norm] n = BatchNormalization<epsilon=0.01, training_mode={training}>(h, gamma, beta, mean, variance)
            [act] y = Relu(n) {after}
        }}
    """)
    random = np.random.default_rng(seed)
    arrays = {"w": weight, "b": bias, "gamma": [6], "beta": [6], "mean": [6], "variance": [6]}
    for name, shape in arrays.items():
        array = random.standard_normal(shape).astype(np.float32)
        array = np.abs(array) + np.float32(0.01) if name == "variance" else array
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def sample(layer: str, seed: int = 0) -> npt.NDArray[np.float32]:
    shape = (3, 4) if LAYERS[layer][1] == ROWS else (3, 4, 5, 5)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("layer", LAYERS)
def test_goes_into_the_weights_with_the_same_numbers(layer: str, run: Run) -> None:
    model, x = graph(layer), sample(layer)
    expected = run(model, x=x)
    assert FoldBatchNorm()(model).changed == 1
    assert "BatchNormalization" not in op_types(model)
    assert len(model.graph) == (3 if layer == "MatMul" else 2)
    assert np.abs(run(model, x=x) - expected).max() <= 1e-5 * np.abs(expected).max()
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_keeps_the_layer_its_module_and_its_weight_s_name() -> None:
    model = graph("Conv")
    model.graph[0].metadata_props[MODULE_KEY] = "conv1"
    FoldBatchNorm()(model)
    node = model.graph[0]
    assert (node.name, node.metadata_props[MODULE_KEY], node.outputs[0].name) == ("layer", "conv1", "n")
    assert [value.name for value in node.inputs if value is not None] == ["x", "w", "b_folded"]
    assert sorted(model.graph.initializers) == ["b_folded", "w"]


def test_zeros_stay_zeros_and_the_file_holds_the_values(tmp_path: Path) -> None:
    model = graph("Conv")
    weight = model.graph.initializers["w"]
    assert weight.const_value is not None
    pruned = weight.const_value.numpy() * (np.arange(4) % 2).reshape(1, 4, 1, 1).astype(np.float32)
    weight.const_value = ir.tensor(pruned, name="w")
    FoldBatchNorm()(model)
    save_onnx(model, tmp_path / "m.onnx")
    (held,) = [tensor for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer if tensor.name == "w"]
    assert np.array_equal(onnx.numpy_helper.to_array(held) == 0, pruned == 0)
    assert weight.const_value is not None
    assert np.array_equal(onnx.numpy_helper.to_array(held), weight.const_value.numpy())


def test_no_weight_is_read_before_the_graph_is_written(tmp_path: Path) -> None:
    ir.save(graph("Conv"), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=100)
    model = ir.load(tmp_path / "m.onnx")
    (tmp_path / "m.data").unlink()
    assert FoldBatchNorm()(model).changed == 1
    assert model.graph.initializers["w"].const_value is not None
    with pytest.raises(FileNotFoundError):
        model.graph.initializers["w"].const_value.numpy()


def test_a_weight_that_something_else_reads_stays_for_it(run: Run) -> None:
    model = graph("Gemm", after="s = ReduceSum<keepdims=0>(w) t = Add(y, s)")
    model.graph.outputs[0] = model.graph[-1].outputs[0]
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    x = sample("Gemm")
    expected = run(model, x=x)
    assert FoldBatchNorm()(model).changed == 1
    assert np.abs(run(model, x=x) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (graph("Conv", after="z = Neg(h)"), "something else reads"),
        (graph("Conv", training=1), "training"),
        (graph("Gemm"), "the bias before it is computed"),
        (graph("MatMul"), "quantized or computed"),
        (graph("Conv without bias"), "its parameters are computed"),
    ],
    ids=["another reader", "training", "computed bias", "computed weight", "computed parameters"],
)
def test_says_why_it_leaves_one_alone(model: ir.Model, why: str) -> None:
    computed = {"the bias": "b", "quantized": "w", "its parameters": "gamma"}
    for word, name in computed.items():
        if why.startswith(word):
            value = model.graph.initializers.pop(name)
            value.const_value = None
            model.graph.inputs.append(value)
    outcome = FoldBatchNorm()(model)
    assert (outcome.changed, "BatchNormalization" in op_types(model)) == (0, True)
    assert why in outcome.left_alone[0].why


def test_leaves_one_without_a_layer_and_one_with_other_channels_alone() -> None:
    model = ir.from_onnx_text(
        """
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N,4,4] x) => (float[N,4,4] y) <float[4] v = {1, 2, 3, 4}, float[4,4] w = {1}>
        {
            a = Relu(x) b = BatchNormalization(a, v, v, v, v)
            c = MatMul(b, w) y = BatchNormalization(c, v, v, v, v)
        }
    """.replace("{1}", "{1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}")
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    reasons = [left.why for left in FoldBatchNorm()(model).left_alone]
    assert reasons == [
        "no linear layer is before it",
        "its channels are not the columns of the matrix product before it",
    ]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_second_run_changes_nothing(layer: str) -> None:
    model = graph(layer)
    FoldBatchNorm()(model)
    before = ir.to_proto(model)
    assert FoldBatchNorm()(model).changed == 0
    assert ir.to_proto(model) == before


@settings(deadline=None)
@given(st.sampled_from([*LAYERS]), st.integers(0, 2**32 - 1))
def test_random_ones_keep_their_numbers(layer: str, seed: int) -> None:
    model, x = graph(layer, seed=seed), sample(layer, seed)
    expected = outputs(model, x)
    assert FoldBatchNorm()(model).changed == 1
    assert np.abs(outputs(model, x) - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def outputs(model: ir.Model, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])
