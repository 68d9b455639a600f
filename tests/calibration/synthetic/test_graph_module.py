from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch

from calibration.synthetic.graph_module import graph_module
from calibration.synthetic.watch import Watch
from profiles.errors import GpusqError

Run = Callable[..., npt.NDArray[np.float32]]

NODES = {
    "asymmetric convolution": (
        "<float[4,1,3,3] w = {W36}>",
        "y = Conv<group=4, pads=[1,0,2,1], strides=[2,1]>(x, w)",
    ),
    "transposed convolution": (
        "<float[4,2,3,3] w = {W72}>",
        "y = ConvTranspose<strides=[2,2], pads=[1,1,1,1]>(x, w)",
    ),
    "pooling": (
        "",
        "a = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(x) b = GlobalAveragePool(a) y = Mul(a, b)",
    ),
    "batch normalization": (
        "<float[4] s = {1,2,3,4}, float[4] b = {0,1,0,1}, float[4] m = {1,0,-1,0}, float[4] v = {1,2,3,4}>",
        "y = BatchNormalization<epsilon=0.01>(x, s, b, m, v)",
    ),
    "layer normalization": ("<float[6] s = {1,2,3,4,5,6}>", "y = LayerNormalization<axis=-1>(x, s)"),
    "moves": (
        "<int64[1] two = {2}, int64[3] sh = {0,-1,12}>",
        "a = Reshape(x, sh) b = Transpose<perm=[0,2,1]>(a) c = Unsqueeze(b, two) y = Squeeze(c, two)",
    ),
    "a slice backwards": (
        "<int64[1] from = {-1}, int64[1] to = {-9}, int64[1] axis = {2}, int64[1] by = {-2}>",
        "y = Slice(x, from, to, axis, by)",
    ),
    "pieces": (
        "<int64 one = {1}, int64[2] parts = {1,3}, int64[4] sh = {2,1,6,6}>",
        "a, b = Split<axis=1>(x, parts) c = Gather<axis=1>(b, one) d = Reshape(c, sh) e = Concat<axis=1>(a, d)"
        " y = Softmax(e)",
    ),
    "padding and resizing": (
        "<int64[8] p = {0,0,1,0,0,0,0,2}, float[4] s = {1,1,2,2}>",
        'a = Pad(x, p) y = Resize<mode="nearest", nearest_mode="floor",'
        ' coordinate_transformation_mode="asymmetric">(a, , s)',
    ),
    "reductions": ("<int64[2] ax = {1,-1}>", "a = ReduceMean<keepdims=0>(x, ax) y = ReduceMax<keepdims=1>(a)"),
    "pointwise": (
        "<float lo = {-1}, float half = {0.5}>",
        "k = Greater(x, lo) a = Clip(x, lo) b = Sigmoid(a) c = Max(a, b, half) d = Where(k, c, x) y = HardSwish(d)",
    ),
    "shapes": (
        "<int64[1] rest = {-1}>",
        "s = Shape<start=0, end=1>(x) t = Concat<axis=0>(s, rest) y = Reshape(x, t)",
    ),
}
"""Constants and nodes, from x float[2,4,6,6] to y."""


def model_of(constants: str, body: str) -> ir.Model:
    numbers = np.random.default_rng(0).standard_normal(72).round(2)
    for count in (36, 72):
        constants = constants.replace(f"{{W{count}}}", "{" + ",".join(map(str, numbers[:count])) + "}")
    head = '<ir_version: 8, opset_import: ["": 18]> g (float[2,4,6,6] x) => (float y)'
    return ir.from_onnx_text(f"{head} {constants} {{ {body} }}")


@pytest.mark.parametrize("name", NODES)
def test_gives_the_numbers_of_onnxruntime(run: Run, name: str) -> None:
    model = model_of(*NODES[name])
    x = np.random.default_rng(1).standard_normal((2, 4, 6, 6), np.float32)
    model.graph.outputs[0].shape = None
    expected = run(model, x=x)
    leaf = torch.from_numpy(x).requires_grad_()
    (found,) = graph_module(model)(leaf)
    assert found.shape == expected.shape
    assert np.abs(found.detach().numpy() - expected).max() <= 1e-5
    found.square().sum().backward()
    assert leaf.grad is not None
    assert float(leaf.grad.abs().sum()) > 0


def test_the_statistics_of_a_batch_norm_are_seen() -> None:
    with Watch() as watch:
        graph_module(model_of(*NODES["batch normalization"]))(torch.randn(2, 4, 6, 6))
    (norm,) = watch.norms
    assert (norm.variance.tolist(), norm.epsilon) == ([1, 2, 3, 4], pytest.approx(0.01))


def test_an_attention_is_seen_and_gives_the_numbers_of_onnxruntime(run: Run) -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["": 23]>
        g (float[2,5,8] x) => (float[2,5,8] y) { y = Attention<q_num_heads=2, kv_num_heads=2>(x, x, x) }
    """)
    x = np.random.default_rng(0).standard_normal((2, 5, 8), np.float32)
    with Watch() as watch:
        (found,) = graph_module(model)(torch.from_numpy(x))
    assert [attention.shape for attention in watch.attentions] == [(2, 2, 5, 4)]
    assert np.abs(found.numpy() - run(model, x=x)).max() <= 1e-5


def test_operators_without_a_gradient_are_counted_in_one_error() -> None:
    model = model_of("", "a = Round(x)\n b = Round(a)\n y = Det(b)")
    with pytest.raises(GpusqError, match="no gradient through 1 × Det, 2 × Round") as caught:
        graph_module(model)
    assert "--data" in caught.value.hint


def test_a_form_of_an_operator_that_is_not_known_names_its_node() -> None:
    model = model_of("", "y = AveragePool<kernel_shape=[2,2], pads=[1,0,0,1]>(x)")
    with pytest.raises(GpusqError, match=r"\(AveragePool\) has no gradient here: pads \[1, 0, 0, 1\]"):
        graph_module(model)(torch.randn(2, 4, 6, 6))
