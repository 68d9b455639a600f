r"""Read the kernels of a TensorRT engine from the JSON of its inspector, which `trtexec --exportLayerInfo` writes, too.

    {"Layers": [{"Name": …, "LayerType": "CaskConvolution", "Inputs": [{"Name": …, "Dimensions": [2,160,16,30],
      "Format/Datatype": "Channel major FP16 format where channel % 16 == 0"}], "Outputs": […],
      "Weights": {"Type": "Int8", "Count": 294912}, "OutMaps": 256, "HasSparseWeights": 1,
      "TacticName": "sm80_xmma_fprop_…", "Metadata": "[ONNX Layer: Conv_276]\u001e[ONNX Layer: Relu_278]"}, …]}

`HasSparseWeights` says that the weights would do; the tactic's name says whether a sparse kernel was taken. An engine
that was built without detailed profiling has names in the place of the objects.

| LayerType | kind |
|---|---|
| …Conv…, …Deconv… | convolution |
| …Gemm…, …MatMul…, …MatrixMultiply… | gemm |
| named `_gemm_mha…` or `_gemv_mha…`, or fused_mha… | attention |
| …Pooling… | pooling |
| DLA… | dla |
| NoOp, Constant, signal, wait, shape_call | no kernel |
| anything else | pointwise |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from deploy.compiled_kernels import ATTENTION, NO_KERNELS, ONNX_NODE, CompiledKernel, CompiledTensor
from profiles.errors import GpusqError

_SKIPPED = NO_KERNELS | {"NoOp", "Constant"}
_KINDS = (
    (re.compile("deconv|conv", re.IGNORECASE), "convolution"),
    (re.compile("gemm|matmul|matrixmultiply", re.IGNORECASE), "gemm"),
    (re.compile("mha", re.IGNORECASE), "attention"),
    (re.compile("pooling", re.IGNORECASE), "pooling"),
    (re.compile("^dla", re.IGNORECASE), "dla"),
)
# The words for types in "Format/Datatype", and the names that the log of TensorRT-RTX has for them.
_TYPES = {
    "Int8": "Int8",
    "UInt8": "UInt8",
    "Half": "Half",
    "FP16": "Half",
    "BFloat16": "BFloat16",
    "BF16": "BFloat16",
    "FP8": "FP8",
    "FP4": "FP4",
    "INT4": "Int4",
    "Int4": "Int4",
    "Float": "Float",
    "FP32": "Float",
    "Int32": "Int32",
    "INT32": "Int32",
    "Int64": "Int64",
    "Bool": "Bool",
}
_TYPE = re.compile(rf"\b({'|'.join(_TYPES)})\b")


def read_inspector(text: str) -> tuple[CompiledKernel, ...]:
    """The kernels of an engine, in its order.

    Raises:
        GpusqError: `text` is not the inspector's, or the engine was built without detailed profiling.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        raise GpusqError(
            "this is no layer information of TensorRT's inspector",
            hint="trtexec writes it with --profilingVerbosity=detailed --exportLayerInfo=FILE",
        ) from None
    if any(isinstance(layer, str) for layer in layers):
        raise GpusqError(
            "the engine names its layers, and says nothing more of them",
            hint="build it with detailed profiling: trtexec --profilingVerbosity=detailed",
        )
    return tuple(_kernels(layers))


def _kernels(layers: list[Mapping[str, Any]]) -> Iterator[CompiledKernel]:
    for layer in layers:
        name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", ""))
        if kind in _SKIPPED:
            continue
        yield CompiledKernel(
            name=name,
            kind=_kind(name, kind),
            inputs=tuple(map(_tensor, layer.get("Inputs", ()))),
            constants=tuple(_constants(layer)),
            outputs=tuple(map(_tensor, layer.get("Outputs", ()))),
            nodes=tuple(ONNX_NODE.findall(str(layer.get("Metadata", "")))),
            tactic=str(layer.get("TacticName", "")),
        )


def _kind(name: str, layer_type: str) -> str:
    if ATTENTION.search(name):
        return "attention"
    return next((kind for pattern, kind in _KINDS if pattern.search(layer_type)), "pointwise")


def _constants(layer: Mapping[str, Any]) -> Iterator[CompiledTensor]:
    yield from map(_tensor, layer.get("Constants", ()))
    weights = layer.get("Weights")
    if isinstance(weights, Mapping) and "Type" in weights:
        count, rows = int(weights.get("Count", 0)), int(layer.get("OutMaps", 1)) or 1
        yield CompiledTensor("weights", (rows, count // rows), (count // rows, 1), _type(str(weights["Type"])))


def _tensor(tensor: Mapping[str, Any]) -> CompiledTensor:
    dims = tuple(int(dim) for dim in tensor.get("Dimensions", ()))
    said = str(tensor.get("Format/Datatype") or tensor.get("Datatype") or "")
    strides = tensor.get("Strides") or [1] * len(dims)
    return CompiledTensor(str(tensor.get("Name", "")), dims, tuple(map(int, strides)), _type(said))


def _type(said: str) -> str:
    match = _TYPE.search(said)
    return _TYPES[match[1]] if match else said or "unknown"
