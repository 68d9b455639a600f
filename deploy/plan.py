"""Read the compiled plan back from the builder's verbose log.

TensorRT-RTX ends its log with one message that begins `Layers:` and has one line a kernel:

    Name: …, LayerType: gemm, Inputs: [{… Datatype: Int8 …}], Constants: […], Outputs: […], Metadata: [ONNX Layer: …]…

| LayerType | kind |
|---|---|
| gemm | gemm |
| correlation, convolution | convolution |
| runtime_fusion | fused-gemm: a GEMM with its epilogue |
| kgen `_gemm_mha…`, runtime_function | attention, fused |
| kgen | pointwise: arithmetic, reductions, data movement |

Anything else (`signal`, `wait`, `shape_call`) is no kernel. The metadata names the ONNX nodes, and those carry modules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from deploy.manifest import BlockAttention, Kernel, Plan
from exporters.linears import find_linears
from exporters.module_names import MODULE_KEY
from profiles.errors import GpusqError

GEMM_KINDS = ("gemm", "fused-gemm", "convolution")
_KINDS = {
    "gemm": "gemm",
    "correlation": "convolution",
    "convolution": "convolution",
    "runtime_fusion": "fused-gemm",
    "runtime_function": "attention",
    "kgen": "pointwise",
}
_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), (?P<tensors>.*?), Outputs: .*?Metadata: (?P<meta>.*)"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_BLOCK = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_MEMORY = {"weights_bytes": "Total Weights Memory", "scratch_bytes": "Max Scratch Memory"}


@dataclass(frozen=True)
class _Compiled:
    """A kernel and the names of the ONNX nodes that it computes."""

    kernel: Kernel
    nodes: tuple[str, ...]


def read_plan(log: Sequence[str], model: ir.Model, *, source: str, target: str) -> Plan:
    """Return the kernels that the compiler made of `model`, and what they mean for its linear layers and attentions.

    Raises:
        GpusqError: the log holds no layer list.
    """
    compiled = list(_kernels(log, model))
    kernels = tuple(c.kernel for c in compiled)
    gemm_of = {node: c.kernel for c in compiled if c.kernel.kind in GEMM_KINDS for node in c.nodes}
    linears = [linear for linear in find_linears(model.graph) if linear.kind == "gemm"]
    gemms = [kernel for linear in linears if (kernel := gemm_of.get(linear.node.name or ""))]
    return Plan(
        source=source,
        target=target,
        kernels=kernels,
        gemms_by_type=dict(Counter(_gemm_type(k) for k in kernels if k.kind in GEMM_KINDS)),
        linear_gemms=len(gemms),
        linear_gemms_int8=sum(_gemm_type(kernel) == "Int8" for kernel in gemms),
        attentions=tuple(_attentions(compiled, model)),
        kernels_per_block=dict(Counter(block for k in kernels if (block := _block(k.modules)))),
        **{field: _memory(log, label) for field, label in _MEMORY.items()},
    )


def _kernels(log: Sequence[str], model: ir.Model) -> Iterator[_Compiled]:
    listing = next((message for message in reversed(log) if message.startswith("Layers:")), None)
    if listing is None:
        raise GpusqError(
            "the compiler's log holds no layer list",
            hint="this compiler's log is not understood; please report its version",
        )
    module_of = {node.name: node.metadata_props.get(MODULE_KEY, "") for node in model.graph}
    for line in listing.splitlines():
        match = _LAYER.match(line)
        if match is None or match["type"] not in _KINDS:
            continue
        nodes = tuple(_NODE.findall(match["meta"]))
        modules = tuple(dict.fromkeys(module for node in nodes if (module := module_of.get(node, ""))))
        kind = "attention" if "_gemm_mha" in match["name"] else _KINDS[match["type"]]
        types = tuple(_DATATYPE.findall(match["tensors"]))
        yield _Compiled(Kernel(name=match["name"], kind=kind, types=types, modules=modules), nodes)


def _gemm_type(kernel: Kernel) -> str:
    """The type of a GEMM: of both operands if they agree, else the wider story, such as `Half×Int8` for weight-only."""
    operands = kernel.types[:2]
    return operands[0] if len(set(operands)) == 1 else "×".join(operands)


def _attentions(compiled: Iterable[_Compiled], model: ir.Model) -> Iterator[BlockAttention]:
    fused = {node for c in compiled if c.kernel.kind == "attention" for node in c.nodes}
    for node in model.graph:
        if node.op_type in ("Attention", "Softmax"):
            yield BlockAttention(
                module=node.metadata_props.get(MODULE_KEY) or node.name or "", fused=node.name in fused
            )


def _block(modules: Sequence[str]) -> str | None:
    """The block of a kernel: that of its first module, `blocks.0` of `blocks.0.mlp.fc2`."""
    match = _BLOCK.match(modules[0]) if modules else None
    return match[1] if match else None


def _memory(log: Sequence[str], label: str) -> int | None:
    found = [match for message in log if (match := re.search(rf"{label}: (\d+) bytes", message))]
    return int(found[-1][1]) if found else None
