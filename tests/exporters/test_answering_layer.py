from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from deploy.ahead_of_time import compile_ahead
from exporters.answering_layer import answering_layers, bias_of, one_scale_is_enough, remove_bias
from exporters.linears import array_of, find_linears
from exporters.passes.inserter import Inserter
from exporters.surgery import Target, surgery
from profiles.device import load_device

Run = Callable[..., npt.NDArray[np.float32]]

# A normalization and a head of 32 classes, with its bias in the layer, or behind it, or with none.
HEAD = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[batch,64] x) => (float[batch,32] y)
    <float[64] g, float[64] c, float[64,32] w, float[32] b, float[batch,64] n, float[batch,32] p>
    {{
        n = LayerNormalization<axis=-1>(x, g, c)
        {head}
    }}
"""
IN_THE_LAYER = "[head] y = Gemm(n, w, b)"
BEHIND_IT = "[head] p = MatMul(n, w) y = Add(p, b)"
NONE = "[head] y = MatMul(n, w)"


def filled(head: str, spread: float = 1.0) -> ir.Model:
    """The model with constants, the last column of whose weight is `spread` times as large as the others."""
    model, random = ir.from_onnx_text(HEAD.format(head=head)), np.random.default_rng(0)
    w = random.standard_normal((64, 32), np.float32) / 8
    w[:, -1] *= spread
    arrays = {"g": np.ones(64), "c": random.standard_normal(64) / 4, "w": w, "b": random.standard_normal(32)}
    constants = {
        name: Inserter(model.graph).initializer(name, np.asarray(array, np.float32)) for name, array in arrays.items()
    }
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in constants:
                node.replace_input_with(index, constants[value.name])
    for name in [name for name, value in constants.items() if not value.uses()]:
        del model.graph.initializers[name]
    return model


def rows() -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((8, 64), np.float32)


def operated(model: ir.Model, profile: str = "a100", float_type: str = "float16") -> None:
    def measure(_: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        return dict.fromkeys(names, 5.0)

    surgery(model, Target(load_device(profile), float_type, "w8a8-linear"), measure)  # type: ignore[arg-type]


@pytest.mark.parametrize(("head", "has_bias"), [(IN_THE_LAYER, True), (BEHIND_IT, True), (NONE, False)])
def test_finds_the_layer_and_takes_its_bias_away(head: str, has_bias: bool, run: Run) -> None:
    model = filled(head)
    (found,) = answering_layers(model.graph)
    bias = bias_of(found)
    assert (bias is not None) == has_bias
    before = run(model, x=rows())
    remove_bias(found)
    assert [value.name for value in model.graph.outputs] == ["y"]
    shift = np.float32(0) if bias is None else np.asarray(array_of(bias), np.float32)
    np.testing.assert_allclose(run(model, x=rows()), before - shift, rtol=0, atol=1e-6)
    (found,) = answering_layers(model.graph)
    assert bias_of(found) is None


@pytest.mark.parametrize("head", ["[head] p = MatMul(n, w) y = Relu(p)", "[head] p = MatMul(n, w) y = Mul(p, b)"])
def test_a_layer_with_something_behind_it_does_not_answer(head: str) -> None:
    assert list(answering_layers(filled(head).graph)) == []


def test_one_scale_is_enough_for_channels_that_are_alike() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 32), np.float32)
    assert one_scale_is_enough(weight)  # 0.01 of it is lost
    assert not one_scale_is_enough(weight * np.where(np.arange(32) == 0, 8, 1).astype(np.float32))
    assert not one_scale_is_enough(np.zeros((64, 32), np.float32))
    assert not one_scale_is_enough(np.where(np.arange(32) == 3, np.nan, weight))


@pytest.mark.parametrize("head", [IN_THE_LAYER, BEHIND_IT, NONE])
def test_the_answering_weight_gets_one_scale_for_tensorrt(head: str, run: Run) -> None:
    model = filled(head)
    before = run(model, x=rows())
    operated(model)
    (found,) = answering_layers(model.graph)
    assert found.weight_scale is not None
    assert found.weight_scale.shape == ()
    assert bias_of(found) is None
    assert found.node.outputs[0].dtype == ir.DataType.FLOAT  # what the GEMM writes, with no Cast behind it
    after = run(model, x=rows())
    # steps of 5 / 127 for x around 1, and of 0.4 / 127 for weights around 0.125: 1.4 % of the answers
    assert np.linalg.norm(after - before) < 0.02 * np.linalg.norm(before)


@pytest.mark.parametrize(("profile", "spread"), [("cpu", 1.0), ("a100", 20.0)])
def test_it_keeps_a_scale_for_each_channel_where_that_costs_nothing_or_one_is_not_enough(
    profile: str, spread: float
) -> None:
    model = filled(NONE, spread)
    operated(model, profile, "float32" if profile == "cpu" else "float16")
    (found,) = find_linears(model.graph)
    assert found.weight_scale is not None
    assert found.weight_scale.shape == (32,)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="compiling ahead of time needs tensorrt-rtx"
)
@pytest.mark.parametrize(("spread", "kernels"), [(1.0, 2), (20.0, 3)])
def test_one_kernel_gives_the_answer(spread: float, kernels: int, tmp_path: Path) -> None:
    """The normalization with its quantizer, the GEMM, and, where that has several scales and a bias, what adds it."""
    model = filled(IN_THE_LAYER, spread)
    operated(model)
    ahead = load_device("a100").ahead_of_time
    assert ahead is not None
    ir.save(model, tmp_path / "model.onnx")
    plan = compile_ahead(tmp_path / "model.onnx", ahead, graph=model, usual={"x": (8, 64)}).plan
    assert len(plan.kernels) == kernels
    assert plan.linear_gemms_int8 == plan.linear_gemms == 1


def test_turing_gets_no_product_that_writes_float32(tmp_path: Path) -> None:
    """TensorRT-RTX refuses one there: "FP32 GEMM is not supported"."""
    pytest.importorskip("tensorrt_rtx")
    model = filled(IN_THE_LAYER)
    operated(model, "t4")
    device = load_device("t4")
    assert device.ahead_of_time is not None
    (linear,) = find_linears(model.graph)
    assert linear.weight_scale is not None
    assert linear.weight_scale.shape == (32,)
    ir.save(model, tmp_path / "model.onnx")
    plan = compile_ahead(tmp_path / "model.onnx", device.ahead_of_time, graph=model, usual={"x": (8, 64)}).plan
    assert plan.linear_gemms_int8 == plan.linear_gemms == 1
