from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from deploy import tensorrt_api
from deploy.fusion_model import fused_kernels
from deploy.kernel_work import ModelWork, works_of
from deploy.predict import compiled_work, predict
from deploy.tensorrt_api import ShapeRange
from profiles.device import load_device

BATCH = ShapeRange()

# A transformer's block: fused QKV, attention written out, and an MLP, each with a residual.
BLOCK = """<ir_version: 10, opset_import: ["": 20]>
g (float16[8, 64, 128] x) => (float16[8, 64, 128] y)
  <float16[128, 384] qkv, float16[128, 128] out, float16[128, 512] up,
   float16[512, 128] down, float16[128] one, float16[128] bias, float16[1] scale,
   int64[5] split = {8, 64, 3, 2, 64}, int64[3] joined = {8, 64, 128},
   int64 q = {0}, int64 k = {1}, int64 v = {2}> {
    n1 = LayerNormalization <axis = -1> (x, one, bias)
    p = MatMul(n1, qkv)
    r = Reshape(p, split)
    t = Transpose <perm = [2, 0, 3, 1, 4]> (r)
    query = Gather <axis = 0> (t, q)
    key = Gather <axis = 0> (t, k)
    value = Gather <axis = 0> (t, v)
    scaled = Mul(query, scale)
    turned = Transpose <perm = [0, 1, 3, 2]> (key)
    scores = MatMul(scaled, turned)
    shares = Softmax <axis = -1> (scores)
    mixed = MatMul(shares, value)
    order = Transpose <perm = [0, 2, 1, 3]> (mixed)
    flat = Reshape(order, joined)
    o = MatMul(flat, out)
    ob = Add(o, bias)
    h = Add(ob, x)
    n2 = LayerNormalization <axis = -1> (h, one, bias)
    u = MatMul(n2, up)
    a = Gelu(u)
    d = MatMul(a, down)
    y = Add(d, h)
}"""

# Two convolutions with a residual, a pooling between them and the head.
NET = """<ir_version: 10, opset_import: ["": 20]>
g (float16[8, 64, 32, 32] x) => (float16[8, 16] y)
  <float16[64, 64, 3, 3] first, float16[64, 64, 1, 1] second, float16[64, 16] head> {
    c = Conv <pads = [1, 1, 1, 1]> (x, first)
    r = Relu(c)
    d = Conv(r, second)
    s = Add(d, x)
    t = Relu(s)
    p = GlobalAveragePool(t)
    f = Flatten(p)
    y = MatMul(f, head)
}"""


def graph(text: str) -> ir.Model:
    """The graph of `text` with random weights."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    given = {
        tensor.name for tensor in proto.graph.initializer if tensor.raw_data or tensor.int64_data or tensor.int32_data
    }
    for value in list(proto.graph.value_info):
        if value.name not in given and not any(value.name in node.output for node in proto.graph.node):
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            weight = (0.1 * rng.normal(size=shape)).astype(np.float16)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, value.name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"
    return ir.from_proto(proto)


def kinds(works: list[ModelWork] | tuple[ModelWork, ...]) -> Counter[str]:
    return Counter(each.work.kind for each in works)


def products(works: list[ModelWork] | tuple[ModelWork, ...]) -> Counter[tuple[object, ...]]:
    found = [each.work for each in works if each.work.m]
    # The compiler may write Q, K and V as three products of a third of the width.
    return Counter((work.kind, work.number, work.m, work.n * work.groups, work.k) for work in found)


@pytest.mark.skipif(not tensorrt_api.has_api("tensorrt-rtx"), reason="tensorrt-rtx is not installed")
@pytest.mark.parametrize("text", [BLOCK, NET], ids=["block", "net"])
def test_products_are_those_of_the_compiled_plan_and_kernels_as_many_but_two(text: str, tmp_path: Path) -> None:
    model = graph(text)
    ir.save(model, tmp_path / "g.onnx")
    compiled = compiled_work(tmp_path / "g.onnx", load_device("a100")).works
    fused = works_of(fused_kernels(model, BATCH, {}))
    assert products(fused) == products(compiled)
    # What the compiler has more are changes of layout where images come in.
    assert 0 <= len(compiled) - len(fused) <= 2


def test_a_block_is_four_products_an_attention_and_what_lies_between() -> None:
    fused = works_of(fused_kernels(graph(BLOCK), BATCH, {}))
    assert kinds(fused) == {"gemm": 4, "attention": 1, "pointwise": 3}


def test_a_graph_stays_as_it_is() -> None:
    model = graph(BLOCK)
    before = ir.to_proto(model).SerializeToString()
    fused_kernels(model, BATCH, {})
    assert ir.to_proto(model).SerializeToString() == before


def test_an_operator_of_another_domain_is_a_kernel_that_is_not_known() -> None:
    text = """<ir_version: 10, opset_import: ["": 20, "mine": 1]>
    g (float16[N, 64] x) => (float16[N, 64] y) { h = Relu(x)  y = mine.Twist(h) }"""
    fused = works_of(fused_kernels(ir.from_proto(onnx.parser.parse_model(text)), BATCH, {}))
    assert kinds(fused) == {"pointwise": 1, "other": 1}


def test_without_the_compiler_the_prediction_says_where_its_kernels_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ir.save(graph(BLOCK), tmp_path / "g.onnx")
    monkeypatch.setattr(tensorrt_api, "has_api", lambda runtime: False)
    found = predict(tmp_path / "g.onnx", ["a100"], batches=[8])
    assert found.source == "the fusion model (TensorRT-RTX is not installed)"
    assert found.points[0].kernels == 8
    assert "kernels: by the fusion model" in found.to_text()
