"""Read the kernels, their tensors and their ONNX nodes from the list that ends the compiler's log.

TensorRT-RTX ends its verbose log with one message that begins `Layers:` and has one line a kernel:

    Name: …, LayerType: gemm, Inputs: [ {…}, … ], Constants: [ {…} ], Outputs: [ {…} ], …, Metadata: [ONNX Layer: …]…
    {} = Name: …, Dimensions: [-1,197,384], Strides: [75648,384,1], …, Datatype: Half, …

| LayerType | kind |
|---|---|
| gemm | gemm |
| correlation, convolution, deconv | convolution |
| runtime_fusion | fused-gemm: a GEMM with its epilogue |
| kgen `_gemm_mha…` or `_gemv_mha…` (one query), runtime_function | attention, fused |
| runtime_function `__myl_…` | pointwise: the operations in its name, such as a concatenation |
| kgen | pointwise: arithmetic, reductions, data movement |
| maxpool, avgpool | pooling |
| signal, wait, shape_call | no kernel |

A type that is not in this table is a kernel of the kind `other`: it is shown rather than lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from profiles.errors import GpusqError

ATTENTION = re.compile("_gem[mv]_mha")
# sm80_xmma_sparse_gemm_f16f16_…_sptensor16x8x32_…, sm80_xmma_fprop_sparse_conv_…
_SPARSE = re.compile("_spars|sptensor|spmma", re.IGNORECASE)
GEMM_KINDS = ("gemm", "fused-gemm", "convolution")
_KINDS = {
    "gemm": "gemm",
    "correlation": "convolution",
    "convolution": "convolution",
    "deconv": "convolution",
    "runtime_fusion": "fused-gemm",
    "runtime_function": "attention",
    "kgen": "pointwise",
    "maxpool": "pooling",
    "avgpool": "pooling",
}
NO_KERNELS = frozenset({"signal", "wait", "shape_call"})
_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>[^,]*).*?Metadata: (?P<meta>.*)"
)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([-\d,]*)\], Strides: \[([-\d,]*)\],.*?Datatype: (\w+)")
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_FP4 = "FP4E2M1"
BITS = {
    "Float": 32,
    "Half": 16,
    "BFloat16": 16,
    "BF16": 16,
    "Int8": 8,
    "UInt8": 8,
    "FP8": 8,
    "Int4": 4,
    "FP4": 4,
    "FP4E2M1": 4,
    "Int32": 32,
    "Int64": 64,
    "Bool": 8,
}


@dataclass(frozen=True)
class CompiledTensor:
    """What a kernel reads or writes; an axis of length -1 is not known before it runs."""

    name: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int | None:
        """Its size; None where that is not known. An axis that is broadcast is stored once."""
        stored = [1 if stride == 0 else dim for dim, stride in zip(self.dims, self.strides, strict=True)]
        if self.dtype not in BITS or any(dim < 0 for dim in stored):
            return None
        return -(-math.prod(stored) * BITS[self.dtype] // 8)


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel, its tensors, the names of the ONNX nodes that it computes, and what its maker calls it."""

    name: str
    kind: str
    inputs: tuple[CompiledTensor, ...]
    constants: tuple[CompiledTensor, ...]
    outputs: tuple[CompiledTensor, ...]
    nodes: tuple[str, ...]
    tactic: str = ""

    @property
    def sparse(self) -> bool:
        """Whether its maker's name for it is that of a kernel for sparse weights."""
        return _SPARSE.search(self.tactic) is not None

    @property
    def bytes_in(self) -> int | None:
        """Bytes of its distinct inputs and constants."""
        return _bytes((*self.inputs, *self.constants))

    @property
    def bytes_out(self) -> int | None:
        """Bytes of its outputs."""
        return _bytes(self.outputs)

    @property
    def operands(self) -> tuple[str, ...]:
        """The types of a GEMM's or convolution's two operands; () for any other kernel.

        The weight is the largest constant; the biases and scales beside it are vectors. The activation has the
        weight's K as its last axis, where a residual, which is added, has its N; where both fit, it is the narrower.
        """
        if self.kind not in GEMM_KINDS:
            return ()
        inputs, constants = (_without_block_scales(tensors) for tensors in (self.inputs, self.constants))
        weights = [tensor for tensor in constants if sum(dim != 1 for dim in tensor.dims) > 1]
        if not weights or not inputs:
            return tuple(tensor.dtype for tensor in (*inputs, *constants)[:2])
        weight = max(weights, key=lambda tensor: math.prod(tensor.dims))
        return _activation(inputs, self.outputs).dtype, weight.dtype


def _without_block_scales(tensors: Sequence[CompiledTensor]) -> Sequence[CompiledTensor]:
    """Beside 4-bit floats, 8-bit floats are the scales of their blocks."""
    if any(tensor.dtype == _FP4 for tensor in tensors):
        return [tensor for tensor in tensors if tensor.dtype != "FP8"]
    return tensors


def _activation(inputs: Sequence[CompiledTensor], outputs: Sequence[CompiledTensor]) -> CompiledTensor:
    shapes = {tensor.dims for tensor in outputs}
    candidates = [tensor for tensor in inputs if tensor.dims not in shapes] or inputs
    return min(candidates, key=lambda tensor: BITS.get(tensor.dtype, 0))


def read_kernels(log: Sequence[str]) -> Iterator[CompiledKernel]:
    """Yield the kernels of the last list in `log`, in its order.

    Raises:
        GpusqError: there is no such list.
    """
    listing = next((message for message in reversed(log) if message.startswith("Layers:")), None)
    if listing is None:
        raise GpusqError(
            "the compiler's log holds no layer list",
            hint="this compiler's log is not understood; please report its version",
        )
    for line in listing.splitlines():
        match = _LAYER.match(line)
        if match is None or match["type"] in NO_KERNELS:
            continue
        kind = _kind(match["name"], match["type"])
        inputs, constants, outputs = (tuple(_tensors(match[key])) for key in ("inputs", "constants", "outputs"))
        yield CompiledKernel(
            match["name"], kind, inputs, constants, outputs, tuple(ONNX_NODE.findall(match["meta"])), match["tactic"]
        )


def _kind(name: str, layer_type: str) -> str:
    if ATTENTION.search(name):
        return "attention"
    generated = layer_type == "runtime_function" and name.startswith("__myl_")
    return "pointwise" if generated else _KINDS.get(layer_type, "other")


def _tensors(text: str) -> Iterator[CompiledTensor]:
    for name, dims, strides, dtype in _TENSOR.findall(text):
        yield CompiledTensor(name, _integers(dims), _integers(strides), dtype)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _bytes(tensors: Iterable[CompiledTensor]) -> int | None:
    """The bytes of the tensors, each name once; None where one is not known."""
    sizes = {tensor.name: tensor.bytes for tensor in tensors}.values()
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None
