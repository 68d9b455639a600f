from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from deploy.plan import read_plan
from deploy.tensorrt_api import ShapeRange, build_engine
from exporters.module_names import MODULE_KEY
from exporters.passes.fuse_rms_norm import FuseRmsNorm
from exporters.passes.type_floats import TypeFloats

Run = Callable[..., npt.NDArray[np.float32]]

TEXT = """
    <ir_version: 10, opset_import: ["": {opset}]>
    g (float[N,16,32] x) => (float[N,16,32] y)
    <float[32] gamma = {{{gamma}}}, float eps = {{{epsilon}}}, float two = {{2}}, float minus = {{-0.5}},
     int64[1] last = {{-1}}, int64[1] rows = {{1}}, float[32,32] w = {{{weight}}}>
    {{
        {nodes}
    }}
"""
SQUARES = {"pow": "s = Pow(x, two)", "product": "s = Mul(x, x)"}
DIVISIONS = {
    "div": "r = Sqrt(w0) n = Div(x, r)",
    "reciprocal": "r = Sqrt(w0) i = Reciprocal(r) n = Mul(x, i)",
    "power": "i = Pow(w0, minus) n = Mul(i, x)",
}
WEIGHTS = {"scale": "h = Mul(gamma, n)", "none": "h = Identity(n)"}
X = np.random.default_rng(0).standard_normal((3, 16, 32), np.float32) * 2


def graph(
    square: str = "pow",
    division: str = "div",
    weights: str = "scale",
    *,
    opset: int = 23,
    epsilon: float = 1e-5,
    after: str = "y = Neg(h)",
    axes: str = "last",
) -> ir.Model:
    mean = f"v = ReduceMean(s, {axes}) w0 = Add(eps, v)"
    nodes = " ".join([SQUARES[square], mean, DIVISIONS[division], WEIGHTS[weights], after])
    text = TEXT.format(
        nodes=nodes,
        opset=opset,
        epsilon=f"{epsilon:.9f}",
        gamma=", ".join(f"{number / 8}" for number in range(-16, 16)),
        weight=", ".join(f"{number % 7 / 8 - 0.5}" for number in range(32 * 32)),
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_becomes_one_operator_with_the_same_numbers(square: str, division: str, weights: str, run: Run) -> None:
    model = graph(square, division, weights)
    expected = run(model, x=X)
    assert FuseRmsNorm(23)(model).changed == 1
    assert [op for op in op_types(model) if op != "Identity"] == ["RMSNormalization", "Neg"]
    assert np.abs(run(model, x=X) - expected).max() <= 1e-5
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_keeps_epsilon_names_and_module() -> None:
    model = graph(epsilon=0.125)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "norm"
    FuseRmsNorm(23)(model)
    node = model.graph[0]
    assert node.attributes["epsilon"].as_float() == 0.125
    assert (node.name, node.outputs[0].name, node.metadata_props[MODULE_KEY]) == ("norm/RMSNormalization", "h", "norm")


@pytest.mark.parametrize(
    ("model", "opset", "why"),
    [(graph(opset=20), 23, "opset 23"), (graph(), 20, "opset 23"), (graph(axes="rows"), 23, "not over the last axes")],
    ids=["an older graph", "an older target", "another axis"],
)
def test_says_why_it_leaves_one_alone(model: ir.Model, opset: int, why: str) -> None:
    before = op_types(model)
    outcome = FuseRmsNorm(opset)(model)
    assert op_types(model) == before
    assert why in outcome.left_alone[0].why


def test_a_layer_normalization_is_none() -> None:
    text = """
        <ir_version: 10, opset_import: ["": 23]>
        g (float[N,4] x) => (float[N,4] y) <float eps = {1}, int64[1] last = {-1}>
        {
            m = ReduceMean(x, last) d = Sub(x, m) s = Mul(d, d) v = ReduceMean(s, last) w = Add(v, eps) r = Sqrt(w)
            y = Div(d, r)
        }
    """
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    assert FuseRmsNorm(23)(model).changed == 0


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_second_run_changes_nothing(weights: str) -> None:
    model = graph(weights=weights)
    FuseRmsNorm(23)(model)
    before = ir.to_proto(model)
    assert FuseRmsNorm(23)(model).changed == 0
    assert ir.to_proto(model) == before


@pytest.mark.parametrize("after", ["y = MatMul(h, w)", "p = MatMul(h, w) y = Add(p, x)"], ids=["GEMM", "residual"])
def test_compiles_to_no_more_kernels_than_written_out(after: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling ahead of time needs tensorrt-rtx")
    model = graph(after=after)
    written_out = kernels(model.clone(), tmp_path)
    assert FuseRmsNorm(23)(model).changed == 1
    assert kernels(model, tmp_path) <= written_out


def kernels(model: ir.Model, folder: Path) -> int:
    TypeFloats("float16")(model)
    ir.save(model, folder / "model.onnx")
    built = build_engine(folder / "model.onnx", "tensorrt-rtx", compute_capability="SM80", batch=ShapeRange(1, 8, 32))
    return len(read_plan(built.log, model, source=built.runtime, target="SM80").kernels)


@settings(deadline=None)
@given(
    st.sampled_from([*SQUARES]),
    st.sampled_from([*DIVISIONS]),
    st.sampled_from([*WEIGHTS]),
    st.floats(1e-6, 1.0),
    st.integers(0, 2**32 - 1),
)
def test_random_ones_keep_their_numbers(square: str, division: str, weights: str, epsilon: float, seed: int) -> None:
    model = graph(square, division, weights, epsilon=epsilon)
    x = np.random.default_rng(seed).standard_normal((2, 16, 32), np.float32) * 10
    expected = outputs(model, x)
    assert FuseRmsNorm(23)(model).changed == 1
    assert np.abs(outputs(model, x) - expected).max() <= 1e-5


def outputs(model: ir.Model, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    found = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    return np.asarray(found[0])  # type: ignore[index]


CAST = """
    <ir_version: 10, opset_import: ["": 23]>
    g (float16[N,4] x, float16[N,4] z) => (float16[N,4] y)
    <float two = {{2}}, float eps = {{1e-6}}, int64[1] last = {{-1}}, float one = {{1}}, float[N,4] wide,
     float16[N,4] narrow, float[N,4] n>
    {{
        wide = Cast<to=1>(x)
        s = Pow(wide, two)
        v = ReduceMean(s, last)
        w = Add(v, eps)
        q = Sqrt(w)
        i = Div(one, q)
        n = Mul(wide, i)
        narrow = Cast<to=10>(n)
        y = Mul(narrow, {factor})
    }}
"""


def test_the_casts_of_llama_become_a_part_of_the_operator(run: Run) -> None:
    model = ir.from_onnx_text(CAST.format(factor="z"))
    rng = np.random.default_rng(0)
    x, z = (rng.standard_normal((5, 4)).astype(np.float16) * np.float16(scale) for scale in (1000, 1))
    expected = run(model, x=x, z=z)
    assert FuseRmsNorm(23)(model).changed == 1
    assert [node.op_type for node in model.graph] == ["RMSNormalization", "Mul"]
    norm = model.graph[0]
    assert {value.dtype for value in (*norm.inputs, *norm.outputs) if value} == {ir.DataType.FLOAT16}
    # One step of float16: onnxruntime rounds once between the two nodes.
    assert np.abs(run(model, x=x, z=z) - expected).max() <= 2e-3 * np.abs(expected).max()
    assert FuseRmsNorm(23)(model).changed == 0


def test_a_float32_result_that_others_read_keeps_its_casts() -> None:
    text = CAST.format(factor="z").replace("narrow = Cast", "other = Neg(n) narrow = Cast")
    model = ir.from_onnx_text(text)
    assert FuseRmsNorm(23)(model).changed == 1
    (norm,) = [node for node in model.graph if node.op_type == "RMSNormalization"]
    assert norm.outputs[0].dtype == ir.DataType.FLOAT


GEMMA = CAST.replace("float[N,4] n>", "float[N,4] n, float[N,4] p, float[4] gamma = {{{gamma}}}>").replace(
    "narrow = Cast<to=10>(n)\n        y = Mul(narrow, {factor})", "p = Mul(n, gamma)\n        y = Cast<to=10>(p)"
)


@pytest.mark.parametrize(
    ("gamma", "left"),
    [("1.5, 2, 0.25, 1", ["RMSNormalization"]), ("1.5, 2, 0.1, 1", ["Cast", "RMSNormalization", "Cast"])],
    ids=["numbers of float16", "others"],
)
def test_the_casts_of_gemma_go_where_its_weights_stay(gamma: str, left: list[str], run: Run) -> None:
    model = ir.from_onnx_text(GEMMA.format(gamma=gamma))
    x, z = (np.random.default_rng(seed).standard_normal((5, 4)).astype(np.float16) for seed in (0, 1))
    expected = run(model, x=x, z=z)
    assert FuseRmsNorm(23)(model).changed == 1
    assert op_types(model) == left
    # One step of float16: onnxruntime rounds before it multiplies.
    assert np.abs(run(model, x=x, z=z) - expected).max() <= 2e-3 * np.abs(expected).max()
    before = ir.to_proto(model)
    assert FuseRmsNorm(23)(model).changed == 0
    assert ir.to_proto(model) == before
