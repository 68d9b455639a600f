from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.compiled_kernels import CompiledTensor, read_kernels
from profiles.errors import GpusqError

TYPES = {"Float": 32, "Half": 16, "BFloat16": 16, "Int8": 8, "Int4": 4, "FP8": 8, "Int64": 64, "Bool": 8}


def tensor(name: str, dims: str, dtype: str, strides: str = "") -> str:
    strides = strides or ",".join("1" for _ in dims.split(","))
    return (
        f"{{ Name: {name}, Dimensions: [{dims}], Strides: [{strides}], Datatype: {dtype}, Format: (Linear) Row major }}"
    )


def layer(kind: str, inputs: list[str], constants: list[str], outputs: list[str], name: str = "k") -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {', '.join(inputs)}], Constants: [ {', '.join(constants)}], "
        f"Outputs: [ {', '.join(outputs)}], TacticName: , StreamId: 0, "
        "Metadata: [ONNX Layer: a][ONNX Layer: b]\x1f[ONNX Layer: c]"
    )


def read(*lines: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(kernel.kind, kernel.operands) for kernel in read_kernels(["\n".join(("Layers:", *lines))])]


BIAS = tensor("bias", "1,8", "Half")
WEIGHT = tensor("w", "16,8", "Int8")
SCALE = tensor("s", "1", "Float")
X = tensor("x", "-1,16", "Half")
RESIDUAL = tensor("r", "-1,8", "Half")
OUT = tensor("y", "-1,8", "Half")


@pytest.mark.parametrize(
    ("inputs", "constants", "operands"),
    [
        ([X], [BIAS, WEIGHT, SCALE], ("Half", "Int8")),
        ([X], [WEIGHT, BIAS], ("Half", "Int8")),
        ([RESIDUAL, tensor("x", "-1,16", "Int8")], [WEIGHT, SCALE], ("Int8", "Int8")),
        ([tensor("x", "-1,16", "Int8"), RESIDUAL], [BIAS, WEIGHT], ("Int8", "Int8")),
        ([tensor("r", "-1,16", "Half"), tensor("x", "-1,16", "Int8")], [WEIGHT], ("Int8", "Int8")),
        ([X, tensor("w", "16,8", "Int8")], [SCALE], ("Half", "Int8")),
        ([tensor("q", "-1,9,16", "Half"), tensor("k", "-1,16,9", "Half")], [], ("Half", "Half")),
    ],
    ids=["bias first", "weight first", "residual first", "residual last", "K = N", "computed weight", "product"],
)
@pytest.mark.parametrize("kind", ["gemm", "runtime_fusion", "correlation"])
def test_operands_are_activation_and_weight_whatever_stands_beside_them(
    kind: str, inputs: list[str], constants: list[str], operands: tuple[str, ...]
) -> None:
    assert read(layer(kind, inputs, constants, [OUT]))[0][1] == operands


def test_what_is_no_gemm_has_no_operands() -> None:
    assert read(layer("kgen", [X], [BIAS], [OUT])) == [("pointwise", ())]


def test_every_kind_of_kernel_is_counted_and_what_is_none_is_not() -> None:
    kinds = ("gemm", "deconv", "maxpool", "runtime_function", "never_seen", "signal", "wait", "shape_call")
    found = [kind for kind, _ in read(*(layer(kind, [X], [], [OUT]) for kind in kinds), "I/O Tensors:", "")]
    assert found == ["gemm", "convolution", "pooling", "attention", "other"]


def test_reads_the_last_list_and_all_the_nodes_of_a_kernel() -> None:
    (kernel,) = read_kernels(["Layers:\n" + layer("gemm", [], [], []), "Layers:\n" + layer("kgen", [X], [], [OUT])])
    assert (kernel.kind, kernel.nodes) == ("pointwise", ("a", "b", "c"))


def test_a_tensor_that_is_read_twice_counts_once() -> None:
    (kernel,) = read_kernels(["Layers:\n" + layer("kgen", [tensor("x", "3,5", "Half")] * 2, [SCALE], [OUT])])
    assert (kernel.bytes_in, kernel.bytes_out) == (3 * 5 * 2 + 4, None)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from(sorted(TYPES)))
def test_bytes_are_elements_times_bits(dims: list[int], dtype: str) -> None:
    contiguous = CompiledTensor("t", tuple(dims), (1,) * len(dims), dtype)
    assert contiguous.bytes == math.ceil(math.prod(dims) * TYPES[dtype] / 8)
    broadcast = CompiledTensor("t", (*dims, 7), (1,) * len(dims) + (0,), dtype)
    assert broadcast.bytes == contiguous.bytes


def test_bytes_of_an_open_axis_or_an_unknown_type_are_not_known() -> None:
    assert CompiledTensor("t", (-1, 2), (2, 1), "Half").bytes is None
    assert CompiledTensor("t", (1, 2), (2, 1), "Posit").bytes is None


def test_refuses_a_log_without_a_list() -> None:
    with pytest.raises(GpusqError, match="no layer list"):
        list(read_kernels(["nothing"]))
