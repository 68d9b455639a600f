from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.passes.quantize_pools import QuantizePools
from exporters.passes.repair_qdq import RepairQdq

Run = Callable[..., npt.NDArray[np.float32]]
POOL = "MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>"
# The pooling pyramid of YOLO: what three poolings make of x, each of the last one's, is put together.
PYRAMID = f"""
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,2,6,6] image) => (float[N,8,6,6] y)
    <float s = {{0.05}}, int8 z = {{0}}, float[N,2,6,6] x, float[N,2,6,6] a, float[N,2,6,6] b, float[N,2,6,6] c,
     float[N,8,6,6] all>
    {{
        x = Sigmoid(image) a = {POOL}(x) b = {POOL}(a) c = {POOL}(b) all = Concat<axis=1>(x, a, b, c)
        q = QuantizeLinear(all, s, z) y = DequantizeLinear(q, s, z)
    }}
"""


def replaced(old: str, new: str) -> str:
    assert old in PYRAMID
    return PYRAMID.replace(old, new)


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_every_pooling_reads_and_gives_integers(run: Run) -> None:
    model = ir.from_onnx_text(PYRAMID)
    image = np.random.default_rng(0).standard_normal((2, 2, 6, 6), np.float32)
    before = run(model, image=image)
    assert [change.where for change in QuantizePools()(model).changes] == ["x", "a", "b", "c"]
    for node in model.graph:
        if node.op_type in ("MaxPool", "Concat"):
            assert {value.producer().op_type for value in node.inputs} == {"DequantizeLinear"}  # type: ignore[union-attr]
    assert np.array_equal(run(model, image=image), before)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-8, 8, width=16), min_size=2, max_size=9), st.sampled_from([0.0498, 0.05, 1.5, 2**-6]))
def test_the_largest_of_rounded_values_is_the_largest_rounded(values: list[float], scale: float) -> None:
    """In float16, where what an integer stands for is rounded too."""
    step = np.float16(scale)

    def integers(x: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
        return np.asarray(np.clip(np.rint(x.astype(np.float32) / np.float32(step)), -128, 127), np.float32)

    x = np.array(values, np.float16)
    largest = (integers(x) * step).astype(np.float16).max()
    assert integers(largest) == integers(x.max())


def test_a_second_run_changes_nothing_nor_does_the_repair() -> None:
    model = ir.from_onnx_text(PYRAMID)
    QuantizePools()(model)
    written = op_types(model)
    assert QuantizePools()(model).changed == RepairQdq()(model).changed == 0
    assert op_types(model) == written


@pytest.mark.parametrize(
    "text",
    [
        replaced(f"b = {POOL}(a) c = {POOL}(b)", "b = Relu(a) c = Relu(b)"),  # one pooling
        replaced("q = QuantizeLinear(all, s, z) y = DequantizeLinear(q, s, z)", "y = Relu(all)"),  # ends in float
        replaced("(float[N,8,6,6] y)", "(float[N,8,6,6] y, float[N,8,6,6] all)"),  # it is answered as float, too
        replaced("int8 z = {0}", "int8 z = {3}"),
    ],
)
def test_leaves_what_ends_in_no_single_quantizer(text: str) -> None:
    model = ir.from_onnx_text(text)
    before = op_types(model)
    assert QuantizePools()(model).changed == 0
    assert op_types(model) == before
