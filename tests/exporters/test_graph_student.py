"""Models that somebody else quantized, as ONNX: they come out with their very scales and answer as they did.

A small convolutional network and a small transformer are trained in torch until their classes lie apart, exported, and
quantized by onnxruntime. What onnxruntime computes from its own file is compared with what it computes from the graph
that `read_graph` makes of it, on 256 inputs.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from deploy.onnxruntime_api import open_session
from exporters.graph_student import read_graph
from exporters.lint import lint
from exporters.qdq_scales import constant_of
from exporters.signature import Input
from exporters.to_onnx import to_onnx
from profiles.errors import GpusqError

CLASSES, COUNT, SHAPE = 10, 256, (3, 8, 8)
Array = npt.NDArray[Any]


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.depthwise, self.point = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool2d(torch.relu(self.bn(self.stem(x))), 2)
        y = torch.relu(y + self.point(self.depthwise(y)))
        logits: Tensor = self.head(y.flatten(1))
        return logits


class Transformer(nn.Module):
    """One block over the 16 patches of an image."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, CLASSES)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        shares = (q @ k.transpose(-2, -1) / 4).softmax(-1)
        x = x + self.proj((shares @ v).transpose(1, 2).flatten(2))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


NETWORKS: dict[str, type[nn.Module]] = {"convolutions": ConvNet, "transformer": Transformer}


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """[count, 3, 8, 8] images of ten patterns in noise, and their classes."""
    patterns = torch.randn(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return patterns[labels] + 0.5 * torch.randn(count, *SHAPE, generator=generator), labels


@cache
def trained(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = NETWORKS[name]()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for step in range(60):
        x, labels = images(64, 100 + step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module.eval()


class Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.left: Iterator[Tensor] = iter(images(64, 1)[0].split(16))  # type: ignore[no-untyped-call]

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self.left, None)
        return None if batch is None else {"x": batch.numpy()}


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained networks, as torch itself exports them."""
    folder = tmp_path_factory.mktemp("floats")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by torch's exporter about itself
        for name in NETWORKS:
            torch.onnx.export(
                trained(name),
                (torch.zeros(2, *SHAPE),),
                folder / f"{name}.onnx",
                input_names=["x"],
                output_names=["logits"],
                opset_version=18,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    return {name: folder / f"{name}.onnx" for name in NETWORKS}


def quantize(source: Path, target: Path, fmt: QuantFormat, activations: QuantType, **how: Any) -> Path:
    """Quantize a float model with onnxruntime, symmetrically unless `symmetric` is false."""
    symmetric = how.pop("symmetric", True)
    logging.disable(logging.WARNING)
    try:
        quantize_static(
            source,
            target,
            Samples(),
            quant_format=fmt,
            activation_type=activations,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True},
            **how,
        )
    finally:
        logging.disable(logging.NOTSET)
    return target


def answers(path: Path, x: Array) -> Array:
    """As onnxruntime answers with its integer kernels."""
    answer: Array = open_session(path).run(None, {"x": x})[0]
    return answer


def answers_as_written(path: Path, x: Array) -> Array:
    """As it answers without fusing anything: the meaning of the file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return np.asarray(onnxruntime.InferenceSession(path, options).run(None, {"x": x})[0])


# Where integer operators have a tensor and its scale; those of their output come last.
_INTEGER = {
    "QLinearConv": ((0, 1), (3, 4), (-1, 6)),
    "QLinearMatMul": ((0, 1), (3, 4), (-1, 6)),
    "QLinearAdd": ((0, 1), (3, 4), (-1, 6)),
    "QLinearMul": ((0, 1), (3, 4), (-1, 6)),
    "QGemm": ((0, 1), (3, 4), (-1, 7)),
    "QuantizeLinear": ((-1, 1),),
    "DequantizeLinear": ((0, 1),),
}

_MOVES = ("Reshape", "Transpose", "Slice", "Squeeze", "MaxPool", "Relu")  # integers keep their scale


def scales_of(model: onnx.ModelProto) -> Counter[bytes]:
    """The scales of all quantized tensors but biases, whose int32 has the product of two others."""
    held = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    found: dict[str, bytes] = {}
    for node in model.graph.node:
        if node.op_type in _MOVES and node.input[0] in found:
            found.update(dict.fromkeys(node.output, found[node.input[0]]))
        for place, scale in _INTEGER.get(node.op_type, ()):
            tensor = node.output[0] if place == -1 else node.input[place]
            if tensor not in held or held[tensor].dtype != np.int32:
                found[tensor] = held[node.input[scale]].tobytes()
    return Counter(found.values())


# As PaddleSlim and paddle2onnx lay it out, written by hand: pairs of Q and DQ around each activation, every zero-point
# an explicit int8 tensor, weights as integers behind a DQ per output channel.
PADDLE = """
    <ir_version: 8, opset_import: ["": 13]>
    g (float[N,4] x) => (float[N,3] y)
    <float[1] sx = {0.03}, float[1] sh = {0.07}, float[1] sy = {0.1},
     int8[1] zx = {0}, int8[1] zh = {0}, int8[1] zy = {0},
     int8[4,4] w = {127,-3,5,9, -8,127,1,0, 4,4,-127,2, 0,0,7,127}, float[4] sw = {0.01,0.02,0.005,0.03},
     int8[4,3] v = {127,0,3, 1,-127,-9, 0,5,127, 60,61,-62}, float[3] sv = {0.02,0.01,0.03},
     int8[4] zw = {0,0,0,0}, int8[3] zv = {0,0,0}>
    {
        [q0] xq = QuantizeLinear(x, sx, zx) [d0] xd = DequantizeLinear(xq, sx, zx)
        [dw] wd = DequantizeLinear<axis=1>(w, sw, zw) [mul0] h = MatMul(xd, wd) [relu] r = Relu(h)
        [q1] hq = QuantizeLinear(r, sh, zh) [d1] hd = DequantizeLinear(hq, sh, zh)
        [dv] vd = DequantizeLinear<axis=1>(v, sv, zv) [mul1] m = MatMul(hd, vd)
        [q2] yq = QuantizeLinear(m, sy, zy) [d2] y = DequantizeLinear(yq, sy, zy)
    }
"""


def test_the_layout_of_paddle_slim_answers_as_it_did_with_its_very_scales(tmp_path: Path) -> None:
    path = tmp_path / "paddle.onnx"
    ir.save(ir.from_onnx_text(PADDLE), path)
    model = read_graph(path).export().model
    assert lint(model) == []
    ir.save(model, tmp_path / "again.onnx")
    assert scales_of(ir.to_proto(model)) == scales_of(onnx.load(path))
    x = np.random.default_rng(0).standard_normal((COUNT, 4), np.float32)
    expected, answered = answers_as_written(path, x), answers(tmp_path / "again.onnx", x)
    assert (answered.argmax(1) == expected.argmax(1)).all()
    assert np.abs(answered - expected).max() <= 1.001 * step_of(model)


def step_of(model: ir.Model) -> float:
    """The scale of the quantizer that gives the output."""
    producer = model.graph.outputs[0].producer()
    assert producer is not None
    assert producer.op_type == "DequantizeLinear"
    scale = constant_of(producer.inputs[1])
    assert scale is not None
    return float(scale)


def test_the_networks_have_learned_and_their_classes_lie_apart() -> None:
    x, labels = images(COUNT, 2)
    for name in NETWORKS:
        module = trained(name)
        with torch.inference_mode():
            logits = module(x)
        best, second = logits.topk(2).values.unbind(1)
        assert (logits.argmax(1) == labels).all()
        assert float((best - second).min()) > 0.5


@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("activations", [QuantType.QInt8, QuantType.QUInt8], ids=["int8", "uint8"])
@pytest.mark.parametrize("fmt", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["qdq", "qoperator"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_that_onnxruntime_quantized_answers_as_it_did_with_its_very_scales(
    tmp_path: Path, floats: dict[str, Path], name: str, fmt: QuantFormat, activations: QuantType, per_channel: bool
) -> None:
    softmax = ["node_softmax"] if fmt is QuantFormat.QOperator else []  # see the next test
    how: dict[str, Any] = {"per_channel": per_channel, "nodes_to_exclude": softmax}
    path = quantize(floats[name], tmp_path / "quantized.onnx", fmt, activations, **how)
    model = read_graph(path).export().model
    assert lint(model) == []
    ir.save(model, tmp_path / "again.onnx")
    assert scales_of(ir.to_proto(model)) == scales_of(onnx.load(path))
    x, _ = images(COUNT, 2)
    expected = answers_as_written(path, x.numpy())
    for answered in (
        answers_as_written(tmp_path / "again.onnx", x.numpy()),
        answers(tmp_path / "again.onnx", x.numpy()),
    ):
        assert (answered.argmax(1) == expected.argmax(1)).all()
        assert np.abs(answered - expected).max() <= 1.001 * step_of(model)


def test_integer_operators_in_a_graph_of_gpusqs_own_keep_its_names_apart(tmp_path: Path) -> None:
    """onnxruntime renames nodes, blocks.0/Conv_quant, but not their outputs, blocks.0/Conv:0."""
    inputs = (Input("x", (2, *SHAPE), dynamic={0: "batch"}),)
    ir.save(to_onnx(trained("convolutions"), inputs, ["logits"], opset=18).model, tmp_path / "float.onnx")
    path = quantize(tmp_path / "float.onnx", tmp_path / "quantized.onnx", QuantFormat.QOperator, QuantType.QUInt8)
    ir.save(read_graph(path).export().model, tmp_path / "again.onnx")
    onnx.checker.check_model(tmp_path / "again.onnx", full_check=True)
    x = images(COUNT, 2)[0].numpy()
    assert (answers(tmp_path / "again.onnx", x).argmax(1) == answers(path, x).argmax(1)).all()


def test_onnxruntimes_integer_softmax_has_a_zero_point_even_when_symmetry_is_asked_for(
    tmp_path: Path, floats: dict[str, Path]
) -> None:
    how = (QuantFormat.QOperator, QuantType.QInt8)
    with pytest.raises(GpusqError, match=r"node_softmax_quant: int8 with zero-point -128"):
        read_graph(quantize(floats["transformer"], tmp_path / "quantized.onnx", *how))


@pytest.mark.parametrize("fmt", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["qdq", "qoperator"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_cannot_be_folded_exactly_is_refused(
    tmp_path: Path, floats: dict[str, Path], name: str, fmt: QuantFormat
) -> None:
    path = quantize(floats[name], tmp_path / "quantized.onnx", fmt, QuantType.QUInt8, symmetric=False)
    with pytest.raises(GpusqError, match=r"^\d+ Q/DQ nodes cannot become symmetric int8 without changing numbers"):
        read_graph(path)
