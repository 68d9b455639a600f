from __future__ import annotations

from fractions import Fraction
from math import ceil, prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.linears import Linear, find_linears
from exporters.sparsity import compressed_bytes, kernel_type, sparsity_of
from exporters.zero_pattern import FOUR_EIGHT
from profiles.device import SparseKernels, load_device

Weight = npt.NDArray[Any]

FREE = SparseKernels(int8_k_multiple=32, float16_k_multiple=16, int8_wants_int8_output=False, source="this test")


def two_four(k: int, n: int, dtype: npt.DTypeLike = np.int8) -> Weight:
    """[n, k], half of it zeros."""
    return np.tile(np.array([[1, 0, 0, -3]], np.float32), (n, k // 4)).astype(dtype)


def layer(weight: Weight, body: str = "y = Gemm<transB=1>(x, w)") -> Linear:
    """The one layer of a graph whose `w` is `weight`."""
    model = ir.from_onnx_text(f"""
        <ir_version: 11, opset_import: ["": 23]>
        g (float[N,C] x, float[1,C,9,9] image, float w) => (float[M,R] y)
        <float s = {{0.5}}, int8 z = {{0}}, int8 three = {{3}}>
        {{ {body} }}
    """)
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(weight, name="w")
    value.dtype, value.shape = value.const_value.dtype, ir.Shape(weight.shape)
    model.graph.register_initializer(value)
    (linear,) = find_linears(model.graph)
    return linear


CONV = "y = Conv(image, w)"


def convolution(o: int, i: int, kernel: int = 3, dtype: npt.DTypeLike = np.float16) -> Weight:
    """[o, i, kernel, kernel], 2:4 along its input channels."""
    weight = two_four(i, o * kernel * kernel, dtype).reshape(o, kernel, kernel, i)
    return np.ascontiguousarray(weight.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("weight", "eligible", "reason"),
    [
        (two_four(32, 8), True, ""),
        (two_four(16, 8, np.float16), True, ""),
        (two_four(48, 8), False, "sparse int8 kernels need K to be a multiple of 32; it is 48"),
        (two_four(8, 8, np.float16), False, "sparse float16 kernels need K to be a multiple of 16; it is 8"),
        (two_four(32, 8, np.float32), False, "sparse kernels take int8 and float16, not float32"),
        (two_four(32, 8, ml_dtypes.bfloat16), False, "sparse kernels take int8 and float16, not bfloat16"),
        (two_four(32, 8, ml_dtypes.float8_e4m3fn), False, "sparse kernels take int8 and float16, not float8_e4m3fn"),
        (two_four(32, 8, ml_dtypes.int4), False, "sparse kernels take int8 and float16, not int4"),
    ],
)
def test_eligible_by_type_and_alignment(weight: Weight, eligible: bool, reason: str) -> None:
    found = sparsity_of(layer(weight), FREE)
    assert (found.pattern, found.zeros, found.eligible, found.reason) == ("2:4", 0.5, eligible, reason)


def test_a_target_without_sparse_kernels_takes_none() -> None:
    found = sparsity_of(layer(two_four(32, 8)), None)
    assert (found.pattern, found.eligible, found.reason) == ("2:4", False, "this runtime has no 2:4 kernels")


def test_counts_the_groups_that_break_the_pattern() -> None:
    weight = two_four(32, 8)
    weight[3, 4:8] = [5, 5, 5, 0]
    found = sparsity_of(layer(weight), FREE)
    assert (found.pattern, found.eligible, found.broken_groups, found.groups) == ("dense", False, 1, 64)
    assert found.broken_share == 1 / 64
    assert found.reason == "1 of 64 groups of four (1.6 %) hold more than two values"


def test_zeros_along_n_do_not_count() -> None:
    assert sparsity_of(layer(two_four(4, 4)), None).pattern == "2:4"
    found = sparsity_of(layer(two_four(4, 4), "y = MatMul(x, w)"), None)
    assert (found.pattern, found.axis, found.broken_groups) == ("dense", 0, 2)


@pytest.mark.parametrize("body", ["y = MatMul(x, w)", "y = Gemm(x, w)", "y = Gemm<transA=1>(w, x)"])
def test_k_follows_the_operator(body: str) -> None:
    transposed = np.ascontiguousarray(two_four(32, 8).T)
    assert sparsity_of(layer(transposed, body), FREE).eligible


def test_k_that_is_no_multiple_of_four_is_dense() -> None:
    found = sparsity_of(layer(np.zeros((8, 6), np.int8)), FREE)
    assert (found.pattern, found.eligible, found.groups) == ("dense", False, 0)
    assert found.reason == "K is 6, no multiple of 4"


def test_a_nan_is_told() -> None:
    weight = two_four(32, 8, np.float16)
    weight[0, 0] = np.nan
    found = sparsity_of(layer(weight), FREE)
    assert (found.pattern, found.nans, found.reason) == ("2:4", 1, "NaN among its values: 1")
    weight[0, :4] = np.nan
    assert sparsity_of(layer(weight), FREE).reason.endswith("hold more than two values; NaN among its values: 4")


def test_a_stored_0_is_no_zero_beside_another_zero_point() -> None:
    body = "d = DequantizeLinear(w, s, three) y = Gemm<transB=1>(x, d)"
    assert sparsity_of(layer(two_four(32, 8), body.replace("three", "z")), FREE).pattern == "2:4"
    found = sparsity_of(layer(two_four(32, 8), body), FREE)
    assert (found.pattern, found.eligible, found.groups) == ("dense", False, 0)
    assert found.reason == "its zero-point is not 0, so a stored 0 is no zero"


def test_values_in_a_file_are_unmapped_again(tmp_path: Path) -> None:
    linear = layer(two_four(512, 512))
    model = ir.Model(linear.node.graph, ir_version=11) if isinstance(linear.node.graph, ir.Graph) else None
    assert model is not None
    ir.save(model, tmp_path / "net.onnx", external_data="net.data")
    (read,) = find_linears(ir.load(tmp_path / "net.onnx").graph)
    assert sparsity_of(read, FREE).eligible
    assert "net.data" not in Path("/proc/self/maps").read_text()


def test_four_bits_are_4_8_in_pairs() -> None:
    pairs = np.tile(np.array([1, -3, 5, 7, 0, 0, 0, 0], np.float32), (8, 4)).astype(ml_dtypes.int4)
    found = sparsity_of(layer(pairs), FREE)
    assert (found.pattern, found.eligible, found.groups) == ("4:8", False, 32)
    assert found.reason == "TensorRT takes int4 for weights only: it has no kernel that multiplies by 4:8 ones"
    assert sparsity_of(layer(pairs.astype(np.int8)), FREE).pattern == "dense"
    pairs[0, 4] = 1
    assert sparsity_of(layer(pairs), FREE).reason == (
        "1 of 32 groups of eight (3.1 %) hold more than two pairs with a value"
    )


def test_a_convolution_is_judged_along_its_input_channels() -> None:
    found = sparsity_of(layer(convolution(32, 32), CONV), FREE)
    assert (found.pattern, found.axis, found.eligible, found.reason) == ("2:4", 1, True, "")
    flat = convolution(32, 32).reshape(32, -1)
    assert sparsity_of(layer(flat), FREE).pattern == "dense"  # along 3 × 3 × channels it is not


@pytest.mark.parametrize(
    ("weight", "body", "reason"),
    [
        (
            convolution(8, 3 * 4),
            CONV,
            "sparse float16 kernels need the number of input channels to be a multiple of 16",
        ),
        (np.zeros((8, 3, 7, 7), np.float16), CONV, "the number of input channels is 3, no multiple of 4"),
        (np.zeros((8, 1, 3, 3), np.float16), "y = Conv<group=8>(image, w)", "the number of input channels is 1,"),
        (convolution(32, 16), "y = Conv<group=2>(image, w)", "TensorRT considers no sparse kernels for grouped"),
        (np.zeros((16, 8, 3, 3), np.float16), "y = ConvTranspose(image, w)", "NVIDIA documents sparse kernels for"),
    ],
)
def test_convolutions_that_no_sparse_kernel_takes(weight: Weight, body: str, reason: str) -> None:
    found = sparsity_of(layer(weight, body), FREE)
    assert not found.eligible
    assert reason in found.reason


@pytest.mark.parametrize(("o", "i", "kernel", "told"), [(256, 256, 1, False), (256, 32, 3, False), (64, 64, 1, True)])
def test_says_of_a_small_convolution_that_dense_may_be_faster(o: int, i: int, kernel: int, told: bool) -> None:
    found = sparsity_of(layer(convolution(o, i, kernel), CONV), load_device("a100").sparse)
    assert found.eligible
    assert ("at least 256" in found.reason) == told


def test_the_a100_asks_for_an_int8_output_besides() -> None:
    found = sparsity_of(layer(two_four(32, 8)), load_device("a100").sparse)
    assert found.eligible
    assert "only where the output is INT8" in found.reason


def test_of_an_int8_convolution_it_does_not() -> None:
    found = sparsity_of(layer(convolution(256, 256, 1, np.int8), CONV), load_device("a100").sparse)
    assert (found.eligible, found.reason) == (True, "")


@pytest.mark.parametrize(
    ("chain", "kind"),
    [
        ("t = QuantizeLinear(w, s, z) d = DequantizeLinear(t, s, z)", "int8"),
        ("t = QuantizeLinear<output_dtype=22>(w, s) d = DequantizeLinear(t, s)", "int4"),
        ("d = Cast<to=10>(w)", "float32"),  # its output has no declared type
        ("d = Identity(w)", "float32"),
    ],
)
def test_the_type_is_what_the_kernel_reads(chain: str, kind: str) -> None:
    assert kernel_type(layer(two_four(32, 8, np.float32), f"{chain} y = Gemm<transB=1>(x, d)")) == kind


def test_a_float_weight_behind_q_and_dq_is_eligible_as_int8() -> None:
    body = "q = QuantizeLinear(w, s, z) d = DequantizeLinear(q, s, z) y = Gemm<transB=1>(x, d)"
    assert sparsity_of(layer(two_four(32, 8, np.float32), body), FREE).eligible


@given(groups=st.integers(0, 10_000), bits=st.sampled_from([4, 8, 16, 32]))
def test_compressed_bytes_are_two_units_and_two_indices_a_group(groups: int, bits: int) -> None:
    assert compressed_bytes(4 * groups, bits=bits) == ceil(Fraction(groups * (2 * bits + 4), 8))
    assert compressed_bytes(8 * groups, bits=bits, pattern=FOUR_EIGHT) == ceil(Fraction(groups * (4 * bits + 4), 8))


@pytest.mark.parametrize(("bits", "ratio"), [(32, 128 / 68), (16, 64 / 36), (8, 32 / 20)])
def test_compression_of_a_whole_weight(bits: int, ratio: float) -> None:
    size = prod((64, 16))
    assert size * bits / 8 / compressed_bytes(size, bits=bits) == pytest.approx(ratio)


def test_four_bits_take_two_and_a_half() -> None:
    assert compressed_bytes(1024, bits=4, pattern=FOUR_EIGHT) * 8 / 1024 == 2.5
