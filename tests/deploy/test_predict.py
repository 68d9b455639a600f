from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

from deploy import tensorrt_api
from deploy.cli import main
from deploy.predict import predict, predict_point
from deploy.prediction import Predicted
from exporters.signature import parse_input
from profiles.device import load_device
from profiles.errors import GpusqError

pytestmark = pytest.mark.skipif(not tensorrt_api.has_api("tensorrt-rtx"), reason="tensorrt-rtx is not installed")

# Two linear layers with a GELU between them, on sixteen tokens, in {type}.
MLP = """<ir_version: 11, opset_import: ["": 20]>
g ({type}[N, 16, 256] x) => ({type}[N, 16, 256] y) <{type}[256, 1024] first, {type}[1024, 256] second> {{
    h = MatMul(x, first)
    a = Gelu(h)
    y = MatMul(a, second)
}}"""


def save_mlp(path: Path, *, kind: str = "float", pruned: bool = False, text: str = MLP) -> Path:
    proto = onnx.parser.parse_model(text.format(type=kind))
    for node, name in zip(proto.graph.node, ("fc1", "act", "fc2"), strict=True):
        node.name = f"/mlp/{name}/{node.op_type}"
    rng = np.random.default_rng(0)
    for name, shape in (("first", (256, 1024)), ("second", (1024, 256))):
        scaled = 0.05 * rng.normal(size=shape)
        weight = scaled.astype(np.float16 if kind == "float16" else np.float32)
        if pruned:
            weight.reshape(shape[0] // 4, 4, shape[1])[:, :2] = 0
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mlp(tmp_path_factory.mktemp("mlp") / "mlp.onnx")


@pytest.fixture(scope="module")
def predicted(mlp: Path) -> Predicted:
    return predict(mlp, ["a100", "agx-orin"], batches=(1, 8, 64, 512), precision="fp16", baseline=mlp)


def test_one_point_for_each_profile_and_batch(predicted: Predicted) -> None:
    found = [(point.profile, point.batch) for point in predicted.points]
    assert found == [(name, batch) for name in ("a100-sxm-80gb", "agx-orin-64gb") for batch in (1, 8, 64, 512)]


def test_one_point_is_that_of_the_prediction(tmp_path: Path) -> None:
    path = save_mlp(tmp_path / "mlp.onnx", kind="float16")
    assert predict_point(path, load_device("a100"), 64) == predict(path, ["a100"], batches=(64,)).points[0]


def test_intervals_hold_their_values_and_throughput_follows(predicted: Predicted) -> None:
    for point in predicted.points:
        assert point.low_ms < point.latency_ms < point.high_ms
        assert point.throughput_per_s == pytest.approx(1e3 * point.batch / point.latency_ms)


def test_the_kernels_of_a_point_add_up_to_it(predicted: Predicted) -> None:
    point = predicted.points[3]
    own = [k for k in predicted.kernels if (k.profile, k.batch) == (point.profile, point.batch)]
    assert len(own) == point.kernels
    assert sum(kernel.latency_ms for kernel in own) < point.latency_ms
    assert {"mlp.fc1", "mlp.fc2"} <= {module for kernel in own for module in kernel.modules}


def test_float16_is_faster_than_the_float32_baseline_where_there_is_work(predicted: Predicted) -> None:
    point = predicted.points[3]
    assert point.speedup is not None
    assert point.speedup.low > 1.5
    assert point.speedup.baseline_ms == pytest.approx(point.speedup.value * point.latency_ms)


def test_a_small_batch_is_bound_by_launches(predicted: Predicted) -> None:
    assert predicted.points[0].bound_by == "launch"


def test_sparse_kernels_help_a_pruned_model_at_a_large_batch(tmp_path: Path) -> None:
    dense = save_mlp(tmp_path / "dense.onnx", kind="float16")
    pruned = save_mlp(tmp_path / "pruned.onnx", kind="float16", pruned=True)
    found = predict(pruned, ["a100"], batches=(4096,), baseline=dense).points[0]
    assert found.sparse_kernels == 2
    assert found.speedup is not None
    assert 1.0 < found.speedup.value < 2.0


def test_a_pruned_model_in_int8_is_placed_so_that_sparse_kernels_write_int8(tmp_path: Path) -> None:
    path = save_mlp(tmp_path / "pruned.onnx", pruned=True)
    (point,) = predict(path, ["a100"], batches=(512,), precision="int8").points
    assert point.sparse_kernels > 0


def test_json_has_the_fields_of_its_schema(mlp: Path) -> None:
    result = CliRunner().invoke(
        main, ["predict", str(mlp), "--profile", "agx-orin", "--power-mode", "30W", "--batch", "4", "--json"]
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["schema"] == 1
    assert printed["origin"] == "predicted"
    (point,) = printed["points"]
    fields = ("profile", "batch", "latency_ms", "low_ms", "high_ms", "throughput_per_s", "bound_by", "power_mode")
    assert [point[field] for field in ("profile", "batch", "power_mode")] == ["agx-orin-64gb", 4, "30W"]
    assert set(fields) <= point.keys()
    assert printed["kernels"]


def test_text_says_that_it_is_predicted(predicted: Predicted) -> None:
    assert "predicted, not measured" in predicted.to_text().splitlines()[0]
    assert "80 % interval" in predicted.to_text()


def test_an_open_axis_without_a_length_is_an_error(tmp_path: Path) -> None:
    path = save_mlp(tmp_path / "open.onnx", kind="float16", text=MLP.replace("[N, 16, 256]", "[N, T, 256]"))
    with pytest.raises(GpusqError, match="varies in axis 1 too, 'T'"):
        predict(path, ["a100"])
    given = predict(path, ["a100"], batches=(2,), inputs=[parse_input("x=8x16x256")])
    assert given.points[0].batch == 2


ATTENTION = """<ir_version: 11, opset_import: ["": 23]>
g (float[N, 4, 16, 64] q, float[N, 4, 16, 64] k, float[N, 4, 16, 64] v) => (float[N, 4, 16, 64] y) {
    y = Attention(q, k, v)
}"""


def test_a_float32_attention_is_predicted_without_its_operator(tmp_path: Path) -> None:
    path = tmp_path / "attention.onnx"
    onnx.save(onnx.parser.parse_model(ATTENTION), path)
    assert predict(path, ["a100"], batches=(8,)).points[0].kernels > 1


def test_a_bundle_is_predicted_for_its_own_kind_of_device(bundles: dict[str, Path]) -> None:
    point = predict(bundles["a100"], ["a100-pcie-80gb"], batches=(8,)).points[0]
    assert point.kernels > 0
    assert point.sparse_kernels == 0  # its INT8 products write float
    with pytest.raises(GpusqError, match="was made for a100-sxm-80gb, whose kernels are not those of agx-orin-64gb"):
        predict(bundles["a100"], ["agx-orin"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.onnx", "--profile", "a100"], "no such file: missing.onnx"),
        (["{mlp}", "--profile", "a1000"], "no device profile 'a1000' (did you mean 'a100'?)"),
        (["{mlp}", "--profile", "cpu"], "cpu has no [gpu] in its profile"),
        (["{mlp}", "--profile", "thor-t4000"], "thor-t4000 has no gpu.l2_mib"),
        (["{mlp}", "--profile", "a100", "--power-mode", "30W"], "a100-sxm-80gb has no power modes"),
        (["{mlp}", "--profile", "agx-orin", "--power-mode", "31W"], "has no power mode '31W'"),
    ],
)
def test_what_cannot_be_predicted_is_said(mlp: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["predict", *(argument.format(mlp=mlp) for argument in arguments)])
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.parametrize("batches", ["", "0", "1,x", "1,,8"])
def test_batches_that_are_none_are_a_usage_error(mlp: Path, batches: str) -> None:
    assert CliRunner().invoke(main, ["predict", str(mlp), "--profile", "a100", "--batch", batches]).exit_code == 2
