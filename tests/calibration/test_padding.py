from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from calibration.collect import collect
from calibration.hessians import Product, measure_hessians
from calibration.padding import mask_of, without_padded
from calibration.probes import Feed, measure_channels

TEXT = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,3,2] x, int64[N,3] attention_mask) => (float[N,3,2] y) { y = Neg(x) }
"""
X = np.array([[[1, 2], [3, 4], [90, 80]], [[5, 6], [70, 60], [70, 60]]], np.float32)
MASK = np.array([[1, 1, 0], [1, 0, 0]])
KEPT = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
FEED = {"x": X, "attention_mask": MASK}


def test_ranges_leave_padding_out() -> None:
    found = collect(ir.from_onnx_text(TEXT), ["y"], FEED)["y"]
    assert found.amax == 6
    assert found.counts.sum() == KEPT.size


def test_channels_leave_padding_out() -> None:
    found = measure_channels(ir.from_onnx_text(TEXT), {"y": 2}, Feed(FEED))["y"]
    np.testing.assert_array_equal(found.amax, [5, 6])


def test_products_leave_padding_out() -> None:
    ((_, found),) = measure_hessians(ir.from_onnx_text(TEXT), [Product("y", 2)], Feed(FEED))
    np.testing.assert_allclose(found[0], KEPT.T @ KEPT, rtol=1e-6)


def test_tensors_of_another_shape_are_measured_whole() -> None:
    turned = np.swapaxes(X, 1, 2)
    assert without_padded(turned, FEED) is turned
    assert without_padded(X, {"x": X}) is X


@pytest.mark.parametrize(("shape", "masked"), [("N,3,2", True), ("M,3,2", True), ("N,2,3", False), ("N,3", False)])
def test_which_values_the_mask_is_of_is_told_by_their_shapes(shape: str, masked: bool) -> None:
    graph = ir.from_onnx_text(TEXT.replace("float[N,3,2] x", f"float[{shape}] x")).graph
    assert (mask_of(graph, graph.inputs[0]) is not None) is masked
