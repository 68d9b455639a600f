"""Every profile's ahead-of-time target takes the types that the profile says its device has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from deploy.ahead_of_time import compile_ahead
from profiles.device import AheadOfTime, list_devices

FP16 = """<ir_version: 10, opset_import: ["": 21]>
product (float16[8, 64, 64] x) => (float16[8, 64, 64] y) { y = MatMul (x, x) }"""
QUANTIZED = """<ir_version: 10, opset_import: ["": 21]>
product (float16[8, 64, 64] x) => (float16[8, 64, 64] y) {{
    step = Constant <value_float = 0.125> ()
    scale = Cast <to = 10> (step)
    q = QuantizeLinear <output_dtype = {onnx_type}> (x, scale)
    d = DequantizeLinear (q, scale)
    y = MatMul (d, d)
}}"""
MODELS = {
    "fp16": FP16,
    "int8": QUANTIZED.format(onnx_type=ir.DataType.INT8.value),
    "fp8": QUANTIZED.format(onnx_type=ir.DataType.FLOAT8E4M3FN.value),
}
KERNEL_TYPES = {"fp16": "Half", "int8": "Int8", "fp8": "FP8"}


def targets() -> Iterator[tuple[str, AheadOfTime, str]]:
    """(compute capability, target, type), once for each compute capability among the profiles and each of its types."""
    by_capability = {device.compute_capability: device for device in list_devices()}
    for capability, device in sorted(by_capability.items(), key=lambda item: float(item[0] or 0)):
        if device.ahead_of_time is not None and device.rates is not None:
            for kind in MODELS:
                if kind != "fp8" or device.rates.dense.fp8 is not None:
                    yield str(capability), device.ahead_of_time, kind


@pytest.mark.parametrize(("capability", "target", "kind"), [*targets()])
def test_a_product_compiles_for_every_target(capability: str, target: AheadOfTime, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling ahead of time needs tensorrt-rtx")
    path = tmp_path / "product.onnx"
    ir.save(ir.from_onnx_text(MODELS[kind]), path)
    compiled = compile_ahead(path, target)
    assert compiled.built.engine
    assert compiled.plan.target == target.compute_capability
    assert any(KERNEL_TYPES[kind] in each for each in compiled.plan.gemms_by_type), compiled.plan.gemms_by_type


CONVOLUTION = """<ir_version: 10, opset_import: ["": 21]>
network (float16[8, 64, 16, 16] x, int8[64, 64, 3, 3] w) => (float16[8, 64, 16, 16] y) {
    step = Constant <value_float = 0.125> ()
    scale = Cast <to = 10> (step)
    zero = Constant <value = int8 {0}> ()
    q = QuantizeLinear (x, scale, zero)
    d = DequantizeLinear (q, scale, zero)
    e = DequantizeLinear (w, scale, zero)
    [conv] y = Conv <pads = [1, 1, 1, 1]> (d, e)
}"""
BY_CAPABILITY = {
    device.ahead_of_time.compute_capability: device.ahead_of_time for device in list_devices() if device.ahead_of_time
}


@pytest.mark.parametrize("target", BY_CAPABILITY.values(), ids=BY_CAPABILITY.keys())
def test_a_target_lacks_int8_convolutions_if_its_compiler_makes_none(target: AheadOfTime, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling ahead of time needs tensorrt-rtx")
    path = tmp_path / "network.onnx"
    model = ir.from_onnx_text(CONVOLUTION)
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(np.ones((64, 64, 3, 3), np.int8), name="w")
    model.graph.register_initializer(weight)
    ir.save(model, path)
    (layer,) = compile_ahead(path, target).plan.layers
    assert (layer.asked, len(layer.compiled)) == (("int8", "int8"), 2)
    assert layer.judged == (layer.compiled == ("Int8", "Int8")) == ("int8-convolution" not in target.lacks)


def test_exact_targets_are_those_that_the_compiler_knows() -> None:
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="compiling ahead of time needs tensorrt-rtx")
    known = {name for name in dir(tensorrt_rtx.ComputeCapability) if name.startswith("SM")}
    for device in list_devices():
        if device.compute_capability is None:
            continue
        own = f"SM{device.compute_capability.replace('.', '')}"
        assert device.ahead_of_time is not None
        assert device.ahead_of_time.compute_capability in known
        assert device.ahead_of_time.nearest == (own not in known)
        assert device.ahead_of_time.nearest or device.ahead_of_time.compute_capability == own
        rtx = any(line.runtime == "tensorrt-rtx" for line in device.runtimes)
        assert rtx == (own in known)
