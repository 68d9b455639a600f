"""Compiled kernels as the cost model counts them: sizes of products, bytes that move, and which weights are 2:4.

| kernel | sizes from |
|---|---|
| gemm, fused-gemm | the largest constant is the weight, the activation's last axis is K; without one, the two inputs |
| convolution | weight [N, K / kernel, kernel…], output [batch, N, …], groups by the activation's channels |
| attention | its output [heads, M, K], and keys and values [heads, N, K], or Q, K and V in one [rows, 3 × width] |
| others | the bytes of their tensors |

TensorRT-RTX leaves the arithmetic behind an INT8 product, `dequantize + bias + ReLU + quantize`, to a kernel of its
own, and the product writes float32 for it. TensorRT's builder writes it in the product's epilogue. So a kernel that
does nothing but arithmetic, value by value, on what one product has just written counts as that product's epilogue:

    convolution INT8 → float32    pointwise float32 → INT8        one work: convolution INT8 → INT8

Channels that are made up for a grouped product, by joining constants to a tensor, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import onnx_ir as ir

from deploy.compiled_kernels import GEMM_KINDS, CompiledKernel, CompiledTensor
from exporters.linears import find_linears
from exporters.sparsity import sparsity_of
from profiles.device import Device
from profiles.work import Kind, Work

_NUMBERS = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "BF16": "bf16", "Int8": "int8", "FP8": "fp8"}
_KINDS: dict[str, Kind] = {
    "gemm": "gemm",
    "fused-gemm": "gemm",
    "convolution": "convolution",
    "attention": "attention",
    "pointwise": "pointwise",
    "pooling": "pooling",
}
# The names of generated kernels list their operations in four letters; these work value by value.
_BY_VALUE = re.compile(
    r"__myl_(?:Mul|Cast|Add|Sub|Div|Relu|Silu|Gelu|Min|Max|Roun|Erf|Tanh|Sigm|Exp|Neg|Clip|Resh|Move|Pow|Sele|Wher|Rcp|Conc)+_myl"
)


@dataclass(frozen=True)
class ModelWork:
    """A work of a model, and the indices of the compiled kernels that it counts."""

    work: Work
    kernels: tuple[int, ...]


def works_of(kernels: Sequence[CompiledKernel], pruned: Collection[str] = ()) -> list[ModelWork]:
    """Return what `kernels` compute and move, epilogues joined with their products.

    Args:
        kernels: compiled with all sizes fixed, in their order.
        pruned: names of the nodes with a 2:4 weight.
    """
    kernels = _narrowed(kernels)
    padded = _padded(kernels)
    works = {
        index: ModelWork(work_of(_unpadded(kernel, padded), pruned), (index,)) for index, kernel in enumerate(kernels)
    }
    for index, product in _epilogues(kernels):
        joined, epilogue = works[product], works.pop(index)
        works[product] = ModelWork(_with_epilogue(joined.work, epilogue.work), (*joined.kernels, index))
    return list(works.values())


def _narrowed(kernels: Sequence[CompiledKernel]) -> list[CompiledKernel]:
    """The kernels with float16 where an INT8 product writes float32, as TensorRT's builder has it."""
    wide = {
        tensor.name
        for kernel in kernels
        if "Int8" in kernel.operands
        for tensor in kernel.outputs
        if tensor.dtype == "Float"
    }

    def half(tensors: Sequence[CompiledTensor]) -> tuple[CompiledTensor, ...]:
        return tuple(replace(tensor, dtype="Half") if tensor.name in wide else tensor for tensor in tensors)

    return [replace(kernel, inputs=half(kernel.inputs), outputs=half(kernel.outputs)) for kernel in kernels]


def _padded(kernels: Sequence[CompiledKernel]) -> dict[str, float]:
    """The share that is no padding of each tensor that ends in constants: channels made up for a grouped product."""
    shares: dict[str, float] = {}
    for kernel in kernels:
        if kernel.kind != "pointwise" or "Conc" not in kernel.name or len(kernel.outputs) != 1:
            continue
        constants = sum(prod(tensor.dims) for tensor in kernel.constants)
        total = prod(kernel.outputs[0].dims)
        if total / 2 < constants < total:
            shares[kernel.outputs[0].name] = 1 - constants / total
    return shares


def _unpadded(kernel: CompiledKernel, shares: Mapping[str, float]) -> CompiledKernel:
    """The kernel without the padding that it reads or makes: its first axis stands for what is left."""
    if not any(tensor.name in shares for tensor in (*kernel.inputs, *kernel.outputs)):
        return kernel
    makes = any(tensor.name in shares for tensor in kernel.outputs)
    return replace(
        kernel,
        inputs=tuple(_smaller(tensor, shares) for tensor in kernel.inputs),
        constants=() if makes else kernel.constants,
        outputs=tuple(_smaller(tensor, shares) for tensor in kernel.outputs),
    )


def _smaller(tensor: CompiledTensor, shares: Mapping[str, float]) -> CompiledTensor:
    if tensor.name not in shares or len(tensor.dims) < 2:
        return tensor
    channels = max(1, round(tensor.dims[1] * shares[tensor.name]))
    return replace(tensor, dims=(tensor.dims[0], channels, *tensor.dims[2:]))


def _epilogues(kernels: Sequence[CompiledKernel]) -> Iterator[tuple[int, int]]:
    """The index of each epilogue, and that of its product: of several that it reads, the last."""
    products = {
        tensor.name: index
        for index, kernel in enumerate(kernels)
        if kernel.kind in ("gemm", "convolution") and "Int8" in kernel.operands
        for tensor in kernel.outputs
    }
    readers: dict[str, int] = {}
    for kernel in kernels:
        for tensor in kernel.inputs:
            readers[tensor.name] = readers.get(tensor.name, 0) + 1
    for index, kernel in enumerate(kernels):
        if kernel.kind != "pointwise" or not _BY_VALUE.match(kernel.name):
            continue
        if "Conc" in kernel.name and len(kernel.inputs) > 1:
            continue
        own = [products[t.name] for t in kernel.inputs if products.get(t.name, index) < index and readers[t.name] == 1]
        if own:
            yield index, max(own)


def _with_epilogue(product: Work, epilogue: Work) -> Work:
    return replace(product, read=product.read + max(0.0, epilogue.read - product.written), written=epilogue.written)


def pruned_nodes(model: ir.Model, device: Device) -> frozenset[str]:
    """The names of the nodes whose weight is 2:4 and that TensorRT's builder has a sparse kernel of `device` for.

    NVIDIA reports sparse INT8 kernels chosen only where what the product writes stays INT8, so an INT8 product that
    writes float counts as dense.
    """
    if device.sparse is None:
        return frozenset()
    return frozenset(
        linear.node.name or ""
        for linear in find_linears(model.graph)
        if sparsity_of(linear, device.sparse).eligible and (linear.input_q is None or _writes_int8(linear.node))
    )


def _writes_int8(node: ir.Node) -> bool:
    """Whether all that becomes of its output, behind a bias and a ReLU, is quantized."""
    readers = [use.node for use in node.outputs[0].uses()]
    if len(readers) == 1 and (readers[0].op_type == "Relu" or _adds_constant(readers[0])):
        return _writes_int8(readers[0])
    return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)


def _adds_constant(node: ir.Node) -> bool:
    return node.op_type == "Add" and any(
        value is not None and (value.is_initializer() or value.const_value is not None) for value in node.inputs
    )


def work_of(kernel: CompiledKernel, pruned: Collection[str] = ()) -> Work:
    """Return what `kernel` computes and moves; an axis of unknown length counts as one.

    Args:
        kernel: compiled with all sizes fixed.
        pruned: names of the nodes with a 2:4 weight.
    """
    kind = _kind(kernel)
    m, n, k, groups = _sizes(kernel)
    weights = float(sum(_bytes(tensor) for tensor in _distinct(kernel.constants)))
    return Work(
        kind=kind if m else "pointwise" if kind in ("gemm", "convolution", "attention") else kind,
        number=_number(kernel),
        m=m,
        n=n,
        k=k,
        groups=groups,
        read=float(sum(_bytes(tensor) for tensor in _distinct(kernel.inputs))),
        weights=weights,
        written=float(sum(_bytes(tensor) for tensor in kernel.outputs)),
        pruned=kind in ("gemm", "convolution") and any(node in pruned for node in kernel.nodes),
    )


def _kind(kernel: CompiledKernel) -> Kind:
    """What the compiler calls it; but a product is a convolution by its window or groups, however it is fused."""
    weight = _weight(kernel) if kernel.kind in GEMM_KINDS and kernel.outputs else None
    if weight is None or not _is_convolution(kernel, weight):
        return _KINDS.get(kernel.kind, "other")
    return "convolution" if prod(weight.dims[2:]) > 1 or _convolution(kernel, weight)[3] > 1 else "gemm"


def _weight(kernel: CompiledKernel) -> CompiledTensor | None:
    """The largest constant that is no vector."""
    weights = [tensor for tensor in kernel.constants if sum(dim != 1 for dim in tensor.dims) > 1]
    return max(weights, key=lambda tensor: prod(tensor.dims)) if weights else None


def _sizes(kernel: CompiledKernel) -> tuple[float, float, float, float]:
    """M, N, K and the number of such products; zeros where there is none, or its sizes are not understood."""
    if kernel.kind == "attention":
        return _attention(kernel)
    if kernel.kind not in GEMM_KINDS or not kernel.inputs or not kernel.outputs:
        return 0, 0, 0, 1
    weight = _weight(kernel)
    if weight is None:
        return _of_two_inputs(kernel)
    if _is_convolution(kernel, weight):
        return _convolution(kernel, weight)
    return _linear(kernel, weight)


def _linear(kernel: CompiledKernel, weight: CompiledTensor) -> tuple[float, float, float, float]:
    """The output's width is N; where it was split or transposed, the axis of the weight that is no activation's."""
    rows, columns = weight.dims[-2], weight.dims[-1]
    widths = {tensor.dims[-1] for tensor in kernel.inputs if tensor.dims}
    written = max(prod(tensor.dims) for tensor in kernel.outputs)
    total = sum(prod(tensor.dims) for tensor in kernel.outputs)
    width = {tensor.dims[-1] for tensor in kernel.outputs if tensor.dims}
    if columns in width or (rows in widths and rows not in width):
        k, n = rows, columns
    else:
        k, n = columns, rows
    groups = prod(weight.dims[:-2]) or 1
    outputs = (
        total if written * len(kernel.outputs) == total and len(kernel.outputs) > 1 and n not in width else written
    )
    return outputs / n / groups, n, k, groups


def _is_convolution(kernel: CompiledKernel, weight: CompiledTensor) -> bool:
    """By its weight: a convolution may be fused as a GEMM is, and then the compiler calls it one."""
    output = kernel.outputs[0].dims
    return 3 <= len(weight.dims) == len(output) and (kernel.kind == "convolution" or weight.dims[0] == output[1])


def _convolution(kernel: CompiledKernel, weight: CompiledTensor) -> tuple[float, float, float, float]:
    outputs, inputs, *window = weight.dims
    activation = next((t for t in kernel.inputs if len(t.dims) == len(weight.dims)), kernel.inputs[0])
    groups = max(1, activation.dims[1] // inputs) if len(activation.dims) > 1 else 1
    positions = prod(kernel.outputs[0].dims) / outputs
    return positions, outputs / groups, inputs * prod(window), groups


def _of_two_inputs(kernel: CompiledKernel) -> tuple[float, float, float, float]:
    if len(kernel.inputs) < 2:
        return 0, 0, 0, 1
    left, right = kernel.inputs[:2]
    if len(left.dims) < 2 or len(right.dims) < 2:
        return 0, 0, 0, 1
    out = kernel.outputs[0].dims
    m, n = (out[-2], out[-1]) if len(out) > 1 else (1, out[-1])
    return m, n, left.dims[-1], prod(out) / (m * n)


def _attention(kernel: CompiledKernel) -> tuple[float, float, float, float]:
    """M and K from what it writes, [heads, M, K]; N from keys and values, or from Q, K and V in one tensor."""
    written = next((tensor.dims for tensor in kernel.outputs if len(tensor.dims) >= 3), None)
    if written is None or not kernel.inputs:
        return 0, 0, 0, 1
    m, k = written[-2:]
    heads = prod(written[:-2])
    given = [tensor.dims for tensor in kernel.inputs if len(tensor.dims) >= 3 and k in tensor.dims[-2:]]
    if given:
        return m, max(prod(dims[-2:]) / k for dims in given), k, heads
    packed = max(prod(tensor.dims) for tensor in kernel.inputs)
    return m, packed / 3 / (heads * k), k, heads


def _number(kernel: CompiledKernel) -> str:
    types = [tensor.dtype for tensor in kernel.inputs[:1]] if kernel.kind == "attention" else list(kernel.operands)
    types = types or [tensor.dtype for tensor in (*kernel.inputs, *kernel.outputs)[:1]]
    known = [_NUMBERS[dtype] for dtype in types if dtype in _NUMBERS]
    return max(known, key=("fp8", "int8", "fp16", "bf16", "fp32").index) if known else "fp16"


def _distinct(tensors: Sequence[CompiledTensor]) -> list[CompiledTensor]:
    return list(dict.fromkeys(tensors))


def _bytes(tensor: CompiledTensor) -> int:
    return tensor.bytes or 0
