from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from deploy import tensorrt_api
from deploy.graph_file import read_graph
from deploy.manifest import Plan, read_manifest
from deploy.show_plan import ShownPlan, show_plan
from exporters.signature import parse_input
from profiles.errors import GpusqError

needs_rtx = pytest.mark.skipif(not tensorrt_api.has_api("tensorrt-rtx"), reason="tensorrt-rtx is not installed")

# Attention as it is written by hand, a convolution and a linear layer, in float16; some nodes have no name.
BLOCK = """<ir_version: 11, opset_import: ["": 23]>
g (float16[N, 8, 4, 4] x) => (float16[N, 16, 32] y, float16[N, 16, 32] p)
<float16[32, 8, 1, 1] w, float16[32, 96] qkv, float16[32, 32] proj, int64[3] tokens = {-1, 16, 32},
 int64[5] heads = {-1, 16, 3, 2, 16}, int64[3] merged = {-1, 16, 32}, float16 scale = {13312},
 int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}> {
    [conv] c = Conv(x, w)
    f = Reshape(c, tokens)
    [qkv] t = MatMul(f, qkv)
    h = Reshape(t, heads)
    s = Transpose<perm=[2, 0, 3, 1, 4]>(h)
    q5 = Slice(s, zero, one, zero) k5 = Slice(s, one, two, zero) v5 = Slice(s, two, three, zero)
    q = Squeeze(q5, zero) k = Squeeze(k5, zero) v = Squeeze(v5, zero)
    [attn] a = Attention(q, k, v)
    m = Transpose<perm=[0, 2, 1, 3]>(a)
    o = Reshape(m, merged)
    y = MatMul(o, proj)
    [head] p = Softmax(y)
}"""


NAMES = {
    "conv": "/blocks.0/conv/Conv",
    "qkv": "/blocks.0/qkv/MatMul",
    "attn": "/blocks.0/attn/Attention",
    "head": "/head/Softmax",
}


def save(text: str, path: Path) -> Path:
    ir.save(ir.from_onnx_text(text), path)
    return path


def save_block(path: Path) -> Path:
    """The model of BLOCK with the names of torch's exporter and random weights for what has no values."""
    proto = onnx.parser.parse_model(BLOCK)
    for node in proto.graph.node:
        node.name = NAMES.get(node.name, node.name)
    rng = np.random.default_rng(0)
    for weight in proto.graph.value_info:
        shape = [dim.dim_value for dim in weight.type.tensor_type.shape.dim]
        values = rng.standard_normal(shape).astype(np.float16)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, weight.name))
    proto.graph.ClearField("value_info")
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_block(tmp_path_factory.mktemp("plan") / "block.onnx")


@pytest.fixture(scope="module")
def shown(model: Path) -> ShownPlan:
    if not tensorrt_api.has_api("tensorrt-rtx"):
        pytest.skip("tensorrt-rtx is not installed")
    return show_plan(model, "a100")


def test_compiles_a_model_and_finds_its_linears_convolution_and_attention(shown: ShownPlan) -> None:
    plan = shown.plan
    assert (shown.profile, shown.nearest, plan.target) == ("a100-sxm-80gb", False, "SM80")
    assert (plan.linear_gemms, plan.linear_gemms_int8) == (2, 0)  # one of the two has no name
    assert (plan.convolutions, plan.convolutions_int8) == (1, 0)
    assert [(a.module, a.fused) for a in plan.attentions] == [("blocks.0.attn", True)]  # the head's Softmax is none
    assert set(plan.gemms_by_type) | set(plan.convolutions_by_type) == {"Half"}
    assert plan.weights_bytes
    assert plan.scratch_bytes


def test_bytes_are_those_of_the_usual_batch(shown: ShownPlan, model: Path) -> None:
    plan = shown.plan
    assert plan.sizes == {"x": (8, 8, 4, 4)}
    assert plan.bytes_moved is not None
    least = 2 * 8 * (8 * 16 + 16 * 32 * 2)  # the input and the two outputs
    assert plan.bytes_moved > least
    half = show_plan(model, "a100", [parse_input("x=4x8x4x4")]).plan
    assert half.sizes == {"x": (4, 8, 4, 4)}
    assert half.bytes_moved is not None
    weights = 2 * (32 * 8 + 32 * 96 + 32 * 32)
    assert plan.bytes_moved / 2 < half.bytes_moved < plan.bytes_moved / 2 + weights
    attention = next(kernel for kernel in plan.kernels if kernel.kind == "attention")
    assert (attention.bytes_in, attention.bytes_out) == (3 * 2 * 8 * 16 * 32, 2 * 8 * 16 * 32)


def test_text_says_what_json_says(shown: ShownPlan) -> None:
    text = shown.to_text()
    assert "attentions    1 of 1 fused" in text
    assert f"{shown.plan.bytes_moved:,} for x 8×8×4×4" in text
    assert "blocks.0.attn" in text
    found = json.loads(shown.to_json())
    assert found["schema"] == 1
    assert Plan.model_validate_json(json.dumps(found["plan"])) == shown.plan
    assert ShownPlan.model_validate_json(shown.to_json()) == shown


@needs_rtx
def test_compiles_for_the_nearest_relative_and_says_so(model: Path) -> None:
    shown = show_plan(model, "agx-orin")
    assert (shown.nearest, shown.plan.target) == (True, "SM86")
    assert "SM86, the device's nearest relative" in shown.to_text()


@needs_rtx
def test_an_attention_in_float32_is_told_to_take_the_surgery_first(tmp_path: Path) -> None:
    path = save(
        '<ir_version: 11, opset_import: ["": 23]> g (float[N,2,8,16] q, float[N,2,8,16] k, float[N,2,8,16] v) '
        "=> (float[N,2,8,16] y) {[att] y = Attention(q, k, v)}",
        tmp_path / "m.onnx",
    )
    with pytest.raises(GpusqError) as caught:
        show_plan(path, "a100")
    assert "m.onnx: TensorRT has no float32 kernel for the Attention operator, such as 'att'" in caught.value.message
    assert "gpusq surgery" in caught.value.hint


@needs_rtx
def test_another_refusal_beside_such_an_attention_keeps_its_words(tmp_path: Path) -> None:
    path = save(
        '<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]> g (float[N,2,8,16] q) => (float[N,2,8,16] y) '
        "{[att] a = Attention(q, q, q) [f] y = com.microsoft.FusedMatMul(a, a)}",
        tmp_path / "m.onnx",
    )
    with pytest.raises(GpusqError, match="cannot parse m"):
        show_plan(path, "a100")


@needs_rtx
def test_a_model_that_varies_in_more_than_the_batch_takes_the_usual_shape(tmp_path: Path) -> None:
    path = save(
        '<ir_version: 11, opset_import: ["": 23]> g (float16[N, T, 8] x) => (float16[N, T, 8] y) {y = Relu(x)}',
        tmp_path / "m.onnx",
    )
    with pytest.raises(GpusqError, match="varies in axis 1"):
        show_plan(path, "a100")
    plan = show_plan(path, "a100", [parse_input("x=2x5x8")]).plan
    assert (plan.sizes, plan.bytes_moved) == ({"x": (2, 5, 8)}, 2 * 2 * 5 * 8 * 2)


def test_shows_the_plan_that_a_bundle_holds_without_compiling(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_api, "build_engine", None)
    for name, nearest in (("a100", False), ("agx-orin", True), ("cpu", False)):
        shown = show_plan(bundles[name])
        assert (shown.plan, shown.nearest) == (read_manifest(bundles[name]).plan, nearest)
        assert "linears" in shown.to_text()
    assert show_plan(bundles["a100"], "a100").plan.bytes_moved
    with pytest.raises(GpusqError, match="was made for a100-sxm-80gb, not for agx-orin"):
        show_plan(bundles["a100"], "agx-orin")


def test_a_manifest_from_before_the_bytes_still_reads(bundles: dict[str, Path], tmp_path: Path) -> None:
    fields = json.loads((bundles["a100"] / "manifest.json").read_text())
    plan = fields["plan"]
    for key in ("convolutions_by_type", "convolutions", "convolutions_int8", "bytes_moved", "sizes"):
        del plan[key]
    for kernel in plan["kernels"]:
        for key in ("outputs", "operands", "bytes_in", "bytes_out"):
            del kernel[key]
    for attention in plan["attentions"]:
        del attention["node"]
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    text = show_plan(tmp_path).to_text()
    assert "bytes moved" not in text
    assert "convolutions" not in text
    assert "per block" in text


def test_a_bundle_without_a_plan_says_how_to_get_one(bundles: dict[str, Path], tmp_path: Path) -> None:
    fields = json.loads((bundles["a100"] / "manifest.json").read_text())
    fields["plan"] = None
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(GpusqError) as caught:
        show_plan(tmp_path)
    assert "holds no plan" in caught.value.message
    assert caught.value.hint == "pip install tensorrt-rtx, and convert again"


def test_one_error_for_what_cannot_be_shown(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "text.onnx", "is no ONNX model")):
        with pytest.raises(GpusqError, match=message):
            read_graph(path)
    monkeypatch.setattr(tensorrt_api, "has_api", lambda runtime: False)
    for model_path, profile, message in (
        (tmp_path / "nowhere", "a100", "no such file"),
        (model, None, "no profile to compile block.onnx for"),
        (model, "a1000", "no device profile 'a1000'"),
        (model, "cpu", "nothing compiles for the CPU of this host ahead of time"),
        (model, "a100", "needs TensorRT-RTX"),
    ):
        with pytest.raises(GpusqError, match=message):
            show_plan(model_path, profile)


def test_nodes_without_a_name_are_called_as_the_parser_calls_them(model: Path) -> None:
    assert "node_of_y" in {node.name for node in read_graph(model).graph}
