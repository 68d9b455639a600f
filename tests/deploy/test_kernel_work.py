from __future__ import annotations

from deploy.compiled_kernels import CompiledKernel, CompiledTensor
from deploy.kernel_work import work_of, works_of


def tensor(name: str, *dims: int, dtype: str = "Half") -> CompiledTensor:
    strides = tuple(1 for _ in dims)
    return CompiledTensor(name, dims, strides, dtype)


def kernel(
    kind: str,
    inputs: list[CompiledTensor],
    outputs: list[CompiledTensor],
    constants: list[CompiledTensor] | None = None,
    name: str = "k",
) -> CompiledKernel:
    return CompiledKernel(name, kind, tuple(inputs), tuple(constants or []), tuple(outputs), ("node",))


def test_a_gemm_has_the_sizes_of_its_weight() -> None:
    bias, weight = tensor("b", 1, 1152), tensor("w", 384, 1152)
    found = work_of(kernel("fused-gemm", [tensor("x", 1576, 384)], [tensor("y", 1576, 1152)], [bias, weight]))
    assert (found.kind, found.number, found.m, found.n, found.k) == ("gemm", "fp16", 1576, 1152, 384)
    assert found.weights == 2 * (1152 + 384 * 1152)
    assert found.read == 2 * 1576 * 384


def test_a_residual_is_not_taken_for_the_activation() -> None:
    inputs = [tensor("residual", 1576, 384), tensor("x", 1576, 1536)]
    found = work_of(kernel("fused-gemm", inputs, [tensor("y", 1576, 384)], [tensor("w", 1536, 384)]))
    assert (found.m, found.n, found.k) == (1576, 384, 1536)


def test_a_convolution_is_the_gemm_over_its_patches() -> None:
    found = work_of(
        kernel("convolution", [tensor("x", 8, 64, 56, 56)], [tensor("y", 8, 128, 28, 28)], [tensor("w", 128, 64, 3, 3)])
    )
    assert (found.kind, found.m, found.n, found.k, found.groups) == ("convolution", 8 * 28 * 28, 128, 576, 1)


def test_a_depthwise_convolution_has_a_group_for_each_channel() -> None:
    found = work_of(
        kernel("fused-gemm", [tensor("x", 8, 96, 56, 56)], [tensor("y", 8, 96, 56, 56)], [tensor("w", 96, 1, 3, 3)])
    )
    assert (found.kind, found.n, found.k, found.groups) == ("convolution", 1, 9, 96)


def test_an_attention_has_its_heads() -> None:
    inputs = [tensor("q", 48, 197, 64), tensor("k", 48, 64, 197), tensor("v", 48, 197, 64)]
    found = work_of(kernel("attention", inputs, [tensor("o", 48, 197, 64)]))
    assert (found.m, found.n, found.k, found.groups) == (197, 197, 64, 48)
    assert found.operations == 4 * 48 * 197 * 197 * 64


def test_a_pruned_weight_is_marked() -> None:
    product = kernel("gemm", [tensor("x", 8, 64)], [tensor("y", 8, 64)], [tensor("w", 64, 64)])
    assert work_of(product, {"node"}).pruned
    assert not work_of(product, {"another"}).pruned


def test_arithmetic_behind_an_int8_product_is_its_epilogue() -> None:
    product = kernel(
        "convolution",
        [tensor("x", 8, 64, 56, 56, dtype="Int8")],
        [tensor("t", 8, 64, 56, 56, dtype="Float")],
        [tensor("w", 64, 64, 3, 3, dtype="Int8")],
    )
    arithmetic = kernel(
        "pointwise",
        [tensor("t", 8, 64, 56, 56, dtype="Float")],
        [tensor("y", 8, 64, 56, 56, dtype="Int8")],
        name="__myl_MulCastAddReluMulMinMaxRounCast_myl0_5",
    )
    (found,) = works_of([product, arithmetic])
    assert found.kernels == (0, 1)
    assert found.work.written == 8 * 64 * 56 * 56
    assert found.work.kind == "convolution"


def test_a_reduction_behind_a_product_stays_a_kernel() -> None:
    product = kernel(
        "gemm", [tensor("x", 8, 64, dtype="Int8")], [tensor("t", 8, 64)], [tensor("w", 64, 64, dtype="Int8")]
    )
    norm = kernel("pointwise", [tensor("t", 8, 64)], [tensor("y", 8, 64)], name="__myl_CastMeanSubMulMean_myl0_5")
    assert len(works_of([product, norm])) == 2


def test_a_product_that_two_read_keeps_its_output() -> None:
    product = kernel(
        "gemm", [tensor("x", 8, 64, dtype="Int8")], [tensor("t", 8, 64)], [tensor("w", 64, 64, dtype="Int8")]
    )
    readers = [
        kernel("pointwise", [tensor("t", 8, 64)], [tensor(name, 8, 64)], name=f"__myl_MulAdd_myl0_{name}")
        for name in "ab"
    ]
    assert len(works_of([product, *readers])) == 3


def test_channels_made_up_for_a_grouped_product_are_left_out() -> None:
    padding = kernel(
        "pointwise",
        [tensor("x", 8, 32, 14, 14, dtype="Int8")],
        [tensor("p", 8, 128, 14, 14, dtype="Int8")],
        [tensor("zeros", 8, 96, 14, 14, dtype="Int8")],
        name="__myl_Conc_myl0_3",
    )
    found = works_of([padding])[0].work
    assert found.written == 8 * 32 * 14 * 14
    assert found.weights == 0


def test_a_kernel_of_an_unknown_kind_keeps_its_bytes() -> None:
    found = work_of(kernel("other", [tensor("x", 8, 64)], [tensor("y", 8, 64)]))
    assert (found.kind, found.read, found.written) == ("other", 1024, 1024)
