"""Regressions planted into the graph of a small transformer are found without a GPU, and the block is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from deploy import tensorrt_api
from deploy.compare import Comparison, compare, compare_subjects
from deploy.comparison.formats import to_markdown
from deploy.comparison.metrics import Gate
from deploy.comparison.subject import Subject, read_subject
from exporters.surgery import Target, surgery
from profiles.device import load_device

pytestmark = pytest.mark.skipif(not tensorrt_api.has_api("tensorrt-rtx"), reason="tensorrt-rtx is not installed")
Plant = Callable[[ir.Model], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, quantized_student: ir.Model, exported_student: ir.Model) -> Path:
    """`good.onnx`, INT8 with quantized attentions for an A100, and `float.onnx`; both of four images."""
    folder = tmp_path_factory.mktemp("planted")
    model = quantized_student.clone()
    target = Target(load_device("a100"), "float16", "w8a8-mha")
    surgery(model, target, measure=lambda _, names: dict.fromkeys(names, 4.0))
    for graph, name in ((model, "good"), (exported_student.clone(), "float")):
        graph.graph.inputs[0].shape = ir.Shape([4, 1, 28, 28])
        ir.save(graph, folder / f"{name}.onnx")
    return folder


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def quantize_residual(model: ir.Model) -> None:
    """Put Q/DQ where the residual of the second block branches off, with a scale that is too small."""
    add, later = node(model, "blocks.1/Add"), node(model, "blocks.1/Add_2")
    like = node(model, "blocks.1.mlp.fc1/QuantizeLinear")
    (dequantizer,) = (user for user, _ in like.outputs[0].uses())
    q = ir.node("QuantizeLinear", [add.outputs[0], *like.inputs[1:]], name="planted_q")
    dq = ir.node("DequantizeLinear", [q.outputs[0], *dequantizer.inputs[1:]], name="planted_dq")
    q.outputs[0].name, dq.outputs[0].name = "planted_q:0", "planted_dq:0"
    model.graph.insert_after(add, [q, dq])
    later.replace_input_with(0, dq.outputs[0])


def take_quantizer_behind_softmax(model: ir.Model) -> None:
    softmax = next(node for node in model.graph if node.op_type == "Softmax" and "blocks.1" in (node.name or ""))
    ((q, _),) = softmax.outputs[0].uses()
    ((dq, _),) = q.outputs[0].uses()
    ((product, index),) = dq.outputs[0].uses()
    product.replace_input_with(index, softmax.outputs[0])
    model.graph.remove([dq, q], safe=True)


def fill_zeros(model: ir.Model) -> None:
    """Make one weight dense: a pruned value becomes one step of its scale."""
    weight = model.graph.initializers["blocks.1.mlp.fc1.weight_int8"]
    assert weight.const_value is not None
    values = weight.const_value.numpy()
    weight.const_value = ir.tensor(np.where(values == 0, np.int8(1), values), name=weight.name)


def double_scale(model: ir.Model) -> None:
    scale = model.graph.initializers["blocks.0.attn.qkv.input_scale"]
    assert scale.const_value is not None
    scale.const_value = ir.tensor(2 * scale.const_value.numpy(), name=scale.name)


@pytest.fixture(scope="module")
def good(folder: Path) -> Subject:
    return read_subject(str(folder / "good.onnx"), "a100", folder / "float.onnx")


def planted(folder: Path, good: Subject, plant: Plant) -> Comparison:
    model = ir.load(folder / "good.onnx")
    plant(model)
    candidate = folder / f"{plant.__name__}.onnx"
    ir.save(model, candidate)
    return compare_subjects(good, read_subject(str(candidate), "a100", folder / "float.onnx"), Gate())


@pytest.mark.parametrize(
    ("plant", "metric", "sentence"),
    [
        (quantize_residual, "accuracy", "Q/DQ after the Add of blocks.1 is new"),
        (
            take_quantizer_behind_softmax,
            "kernels",
            "blocks.1.attn: the attention is no longer fused: Q/DQ after the Softmax of blocks.1.attn is gone",
        ),
        (fill_zeros, "size", "blocks.1.mlp.fc1 is dense, it was 2:4"),
        (double_scale, "accuracy", "the input scale of blocks.0.attn.qkv is 2 times what it was"),
    ],
)
def test_finds_what_was_planted_and_names_the_block(
    folder: Path, good: Subject, plant: Plant, metric: str, sentence: str
) -> None:
    found = planted(folder, good, plant)
    text = to_markdown(found)
    assert found.verdict == "regression", text
    assert metric in [one.metric for one in found.metrics if one.verdict == "regression"], text
    assert any(difference.sentence.startswith(sentence) for difference in found.differences), text


def test_finds_nothing_where_nothing_was_planted(folder: Path) -> None:
    good = str(folder / "good.onnx")
    found = compare(good, good, profile="a100", reference=folder / "float.onnx")
    assert (found.verdict, found.differences) == ("pass", ())
    assert {metric.metric for metric in found.metrics} == {"accuracy", "size", "kernels", "peak-memory"}
