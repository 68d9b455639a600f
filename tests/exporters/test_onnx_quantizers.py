"""Models that onnxruntime quantized: each becomes symmetric Q/DQ with the same numbers, or is refused with the cure."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from exporters.linears import QDQ
from exporters.lint import lint
from exporters.onnx_file import read_onnx
from exporters.passes.qoperator_to_qdq import QOperatorToQdq
from exporters.passes.symmetric_qdq import SymmetricQdq
from exporters.qdq_scales import constant_of
from profiles.errors import GpusqError

SHAPES = {"cnn": (2, 3, 8, 8), "mlp": (2, 16)}
NETWORKS = {
    "cnn": """
        c = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(c) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
        d = Conv(m, w1, b1) a = GlobalAveragePool(d) f = Flatten(a) y = Gemm<transB=1>(f, w2, b2)
    """,
    "mlp": "h = MatMul(x, w0) i = Add(h, b0) t = Tanh(i) k = MatMul(t, w1) l = Add(k, b1) y = Add(l, x)",
}
WEIGHTS: dict[str, dict[str, tuple[int, ...]]] = {
    "cnn": {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 8, 3, 3), "b1": (8,), "w2": (10, 8), "b2": (10,)},
    "mlp": {"w0": (16, 32), "b0": (32,), "w1": (32, 16), "b1": (16,)},
}


class Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.left: Iterator[int] = iter(range(4))
        self.shape = shape

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        seed = next(self.left, None)
        return None if seed is None else {"x": sample(self.shape, seed)}


def sample(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def float_model(path: Path, name: str) -> Path:
    dims = ",".join(map(str, SHAPES[name]))
    out = "2,10" if name == "cnn" else "2,16"
    rng = np.random.default_rng(1)
    held = ", ".join(f"float[{','.join(map(str, shape))}] {key}" for key, shape in WEIGHTS[name].items())
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[{dims}] x, {held}) => (float[{out}] y) {{ {NETWORKS[name]} }}"""
    proto = onnx.parser.parse_model(text)
    del proto.graph.input[1:]
    for index, node in enumerate(proto.graph.node):
        node.name = f"blocks.{index}/{node.op_type}"
    for key, shape in WEIGHTS[name].items():
        array = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:], dtype=float))).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    onnx.save_model(proto, path)
    return path


def quantized(folder: Path, name: str, fmt: QuantFormat, **options: Any) -> Path:
    symmetric = options.pop("symmetric")
    logging.disable(logging.WARNING)
    try:
        quantize_static(
            float_model(folder / "float.onnx", name),
            folder / "quantized.onnx",
            Samples(SHAPES[name]),
            quant_format=fmt,
            extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": symmetric},
            **options,
        )
    finally:
        logging.disable(logging.NOTSET)
    return folder / "quantized.onnx"


def as_written(path: Path, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return np.asarray(onnxruntime.InferenceSession(path, options).run(None, {"x": x})[0])


def all_scales(model: ir.Model) -> set[bytes]:
    found = (constant_of(node.inputs[1]) for node in model.graph if node.op_type in QDQ)
    return {scale.tobytes() for scale in found if scale is not None}


@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("activations", [QuantType.QInt8, QuantType.QUInt8], ids=["int8", "uint8"])
@pytest.mark.parametrize("fmt", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["qdq", "qoperator"])
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_a_symmetric_model_becomes_clean_with_the_same_numbers(
    tmp_path: Path, name: str, fmt: QuantFormat, activations: QuantType, per_channel: bool
) -> None:
    path = quantized(
        tmp_path,
        name,
        fmt,
        symmetric=True,
        activation_type=activations,
        weight_type=QuantType.QInt8,
        per_channel=per_channel,
    )
    x = sample(SHAPES[name], 9)
    model = read_onnx(path)
    stored = {
        array.tobytes() for value in model.graph.initializers.values() if (array := constant_of(value)) is not None
    }
    QOperatorToQdq()(model)
    SymmetricQdq()(model)
    assert lint(model) == []
    assert all_scales(model) <= stored  # bit for bit
    ir.save(model, tmp_path / "clean.onnx")
    onnx.checker.check_model(tmp_path / "clean.onnx", full_check=True)
    before, after = as_written(path, x), as_written(tmp_path / "clean.onnx", x)
    assert np.abs(after - before).max() <= 0.02 * np.abs(before).max()  # at most two steps of the output
    assert (QOperatorToQdq()(model).changed, SymmetricQdq()(model).changed) == (0, 0)


@pytest.mark.parametrize("fmt", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["qdq", "qoperator"])
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_an_asymmetric_model_is_refused_with_a_module_and_the_cure(tmp_path: Path, name: str, fmt: QuantFormat) -> None:
    path = quantized(
        tmp_path, name, fmt, symmetric=False, activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8
    )
    model = read_onnx(path)
    QOperatorToQdq()(model)
    with pytest.raises(GpusqError, match=r"^\d+ Q/DQ nodes cannot become symmetric int8.*blocks\.\d") as caught:
        SymmetricQdq()(model)
    assert "ActivationSymmetric" in caught.value.hint


def test_a_dynamically_quantized_model_is_refused(tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(float_model(tmp_path / "float.onnx", "mlp"), tmp_path / "dynamic.onnx")
    finally:
        logging.disable(logging.NOTSET)
    with pytest.raises(GpusqError, match="and 3 more: dynamic quantization computes its scales at run time") as caught:
        QOperatorToQdq()(read_onnx(tmp_path / "dynamic.onnx"))
    assert "quantize_static" in caught.value.hint
