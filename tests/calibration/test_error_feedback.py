from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.error_feedback import round_with_feedback
from calibration.hessians import Product, measure_hessians
from calibration.probes import Feed

Float = npt.NDArray[np.float32]


def inputs(rows: int, k: int, seed: int = 0) -> Float:
    """Inputs whose columns go together, as activations do."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((k, k)) / np.sqrt(k) + np.eye(k)
    return np.asarray(generator.standard_normal((rows, k)) @ mixing, np.float32)


def sparse(k: int, n: int, seed: int = 0) -> Float:
    """A 2:4 weight [K, N]: the larger two of each four along K."""
    w = np.random.default_rng(seed).standard_normal((k // 4, 4, n)).astype(np.float32)
    order = np.abs(w).argsort(axis=1)
    np.put_along_axis(w, order[:, :2], 0, axis=1)
    return w.reshape(k, n)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 100), st.sampled_from([4, 8, 16]))
def test_keeps_the_mask_and_the_grid(seed: int, n: int) -> None:
    w, x = sparse(160, n, seed), inputs(400, 160, seed)
    scale = np.abs(w).max(axis=0) / np.float32(7)
    found = round_with_feedback(w, x.T @ x, scale, -8, 7)
    assert not found.values[w == 0].any()
    steps = found.values / scale
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    assert np.abs(steps).max() <= 8 + 1e-4


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "2:4"])
def test_lowers_the_error_of_the_products(dense: bool) -> None:
    w = np.random.default_rng(1).standard_normal((160, 16)).astype(np.float32) if dense else sparse(160, 16)
    x = inputs(600, 160)
    scale = np.abs(w).max(axis=0) / np.float32(7)
    found = round_with_feedback(w, x.T @ x, scale, -8, 7)
    plain = np.clip(np.rint(w / scale), -8, 7) * scale
    assert found.error < (0.6 if dense else 0.9) * found.plain_error
    assert found.error == pytest.approx(np.square(x @ (w - found.values)).sum(), rel=1e-2)
    assert found.plain_error == pytest.approx(np.square(x @ (w - plain)).sum(), rel=1e-2)


def test_inputs_that_do_not_go_together_give_plain_rounding() -> None:
    w = np.random.default_rng(2).standard_normal((8, 4)).astype(np.float32)
    scale = np.full((8, 4), 0.1, np.float32)
    found = round_with_feedback(w, np.eye(8, dtype=np.float32), scale, -128, 127)
    np.testing.assert_allclose(found.values, np.rint(w / scale) * scale, atol=1e-6)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    w, x = sparse(16, 4), inputs(50, 16)
    x[:, :8] = 0
    found = round_with_feedback(w, x.T @ x, np.float32(0.1) * np.ones_like(w), -128, 127)
    assert np.isfinite(found.values).all()


def hessians(text: str, products: list[Product], x: Float, **options: int) -> list[Float]:
    return [found for _, found in measure_hessians(ir.from_onnx_text(text), products, Feed({"x": x}, 2), **options)]


GEMM = """
    <ir_version: 8, opset_import: ["": 18]>
    g (float[N,3,4] x) => (float[N,3,4] y) { y = Neg(x) }
"""
CONV = """
    <ir_version: 8, opset_import: ["": 18]>
    g (float[N,4,5,5] x) => (float[N,4,5,5] y) { y = Neg(x) }
"""


def test_hessian_of_a_gemm_agrees_with_numpy() -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 4), np.float32)
    right, left = hessians(GEMM, [Product("x", 4), Product("x", 3, axis=-2)], x)
    np.testing.assert_allclose(right[0], x.reshape(-1, 4).T @ x.reshape(-1, 4), rtol=1e-4, atol=1e-4)
    columns = x.transpose(1, 0, 2).reshape(3, -1)
    np.testing.assert_allclose(left[0], columns @ columns.T, rtol=1e-4, atol=1e-4)


def test_several_runs_give_the_same_as_one() -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 4), np.float32)
    products = [Product("x", 4), Product("x", 3, axis=-2)]
    for one, several in zip(hessians(GEMM, products, x), hessians(GEMM, products, x, memory_mib=0), strict=True):
        np.testing.assert_array_equal(one, several)


def test_hessian_of_a_convolution_is_that_of_its_patches() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4, 5, 5), np.float32)
    window = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    (found,) = hessians(CONV, [Product("x", 18, kernel=(3, 3), groups=2, window=window)], x)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    for group in range(2):
        rows = patches[:, 2 * group : 2 * group + 2].transpose(0, 2, 3, 1, 4, 5).reshape(-1, 18)
        np.testing.assert_allclose(found[group], rows.T @ rows, rtol=1e-4, atol=1e-4)
