"""What the compiled kernels mean for the model: its linear layers, convolutions and attentions, block by block.

The kernels name the ONNX nodes that they compute, and those carry modules. Where the batch is dynamic, the compiler
leaves the sizes of the tensors open; a second compilation with the sizes fixed (`sized`) tells the bytes that move.

Of an engine with several optimization profiles the kernels are the first's. What is said of a layer holds for all: it
is INT8 if it is so in each profile, and an attention is fused if it is so in each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from math import inf

import onnx_ir as ir

from deploy.compiled_kernels import BITS, GEMM_KINDS, CompiledKernel, read_kernels
from deploy.kernel_profiles import by_profile
from deploy.manifest import BlockAttention, CompiledLayer, Kernel, Plan
from exporters.attentions import find_attentions
from exporters.linears import Linear, find_linears
from exporters.module_names import MODULE_KEY, label_of
from profiles.architecture import CompilerLack

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_BLOCK = re.compile(r"^(.*?\.\d+(?:\.(?:blocks|layers)\.\d+)?)(?:\.|$)")
_MEMORY = {"weights_bytes": "Total Weights Memory", "scratch_bytes": "Max Scratch Memory"}


def read_plan(
    log: Sequence[str],
    model: ir.Model,
    *,
    source: str,
    target: str,
    sized: Sequence[str] | None = None,
    sizes: Mapping[str, tuple[int, ...]] | None = None,
    lacks: Sequence[CompilerLack] = (),
) -> Plan:
    """Return the kernels that the compiler made of `model`, and what they mean for its layers.

    Args:
        log: what the compiler said.
        model: the graph that it compiled.
        source: the compiler and its version.
        target: what it compiled for.
        sized: what it said when the inputs had the shapes `sizes`; None where `log` is that already.
        sizes: the shapes of the inputs that the bytes are for.
        lacks: what the compiler has no kernels for at `target`, and is no judge of.

    Raises:
        GpusqError: a log holds no layer list.
    """
    compiled = list(read_kernels(log))
    measured = compiled if sized is None else list(read_kernels(sized))
    return plan_of(compiled, model, source=source, target=target, measured=measured, sizes=sizes, log=log, lacks=lacks)


def plan_of(
    compiled: Sequence[CompiledKernel],
    model: ir.Model,
    *,
    source: str,
    target: str,
    measured: Sequence[CompiledKernel] | None = None,
    sizes: Mapping[str, tuple[int, ...]] | None = None,
    log: Sequence[str] = (),
    lacks: Sequence[CompilerLack] = (),
) -> Plan:
    """Return what the `compiled` kernels mean for the layers of `model`.

    Args:
        compiled: the kernels.
        model: the graph that was compiled.
        source: the compiler and its version.
        target: what it compiled for.
        measured: the kernels for inputs of the shapes `sizes`, which tell the bytes; None where `compiled` does.
        sizes: the shapes of the inputs that the bytes are for.
        log: what the compiler said of its memory.
        lacks: what the compiler has no kernels for at `target`, and is no judge of.
    """
    first, *others = by_profile(compiled)
    measured = first if measured is None else by_profile(measured)[0]
    kernels = tuple(_kernels(first, measured, model))
    linears = list(find_linears(model.graph))
    gemm_of = _gemms(first)
    gemms = _found(gemm_of, (x.node for x in linears if x.kind == "gemm"))
    convolutions = _found(gemm_of, (n for n in model.graph if n.op_type in _CONVOLUTIONS and not n.domain))
    return Plan(
        source=source,
        target=target,
        kernels=kernels,
        gemms_by_type=_by_type(first, ("gemm", "fused-gemm")),
        convolutions_by_type=_by_type(first, ("convolution",)),
        linear_gemms=len(gemms),
        linear_gemms_int8=gemms.count("Int8"),
        convolutions=len(convolutions),
        convolutions_int8=convolutions.count("Int8"),
        attentions=tuple(_attentions([first, *others], model)),
        kernels_per_block=dict(Counter(block for k in kernels if (block := _block(k.modules)))),
        bytes_moved=_bytes_moved(measured),
        sizes=dict(sizes or {}),
        layers=tuple(_layers(linears, [first, *others], lacks)),
        sparse_kernels=sum(kernel.sparse for kernel in first),
        **{field: _memory(log, label) for field, label in _MEMORY.items()},
    )


def _gemms(compiled: Iterable[CompiledKernel]) -> dict[str, CompiledKernel]:
    return {node: kernel for kernel in compiled if kernel.kind in GEMM_KINDS for node in kernel.nodes}


def _layers(
    linears: Iterable[Linear], profiles: Iterable[Sequence[CompiledKernel]], lacks: Sequence[CompilerLack]
) -> Iterator[CompiledLayer]:
    """Each layer with a constant weight: the types that its Q/DQ ask for, and those of the kernel that computes it.

    Of the kernels of several optimization profiles it is the one with the widest types.
    """
    kernel_of = [{**{node: kernel for kernel in each for node in kernel.nodes}, **_gemms(each)} for each in profiles]
    for linear in linears:
        kernel = max((found.get(linear.node.name or "") for found in kernel_of), key=_operand_bits)
        yield CompiledLayer(
            module=linear.module,
            asked=(linear.activation_type, linear.weight_type),
            compiled=kernel.operands if kernel else (),
            kernel=kernel.name if kernel else "",
            sparse=kernel.sparse if kernel else False,
            judged=not ("int8-convolution" in lacks and _is_int8_convolution(linear)),
        )


def _is_int8_convolution(linear: Linear) -> bool:
    return linear.kind == "conv" and linear.activation_type == linear.weight_type == "int8"


def _operand_bits(kernel: CompiledKernel | None) -> float:
    """The bits of one element of each operand together; more than any where they are not known."""
    return sum(BITS.get(operand, inf) for operand in kernel.operands) if kernel and kernel.operands else inf


def _kernels(
    compiled: Sequence[CompiledKernel], measured: Sequence[CompiledKernel], model: ir.Model
) -> Iterator[Kernel]:
    """The kernels; each knows its bytes where the other compilation has the same one."""
    module_of = {node.name: node.metadata_props.get(MODULE_KEY, "") for node in model.graph}
    same = _same_kernels(compiled, measured)
    for index, kernel in enumerate(compiled):
        yield Kernel(
            name=kernel.name,
            kind=kernel.kind,
            types=tuple(tensor.dtype for tensor in (*kernel.inputs, *kernel.constants)),
            modules=tuple(dict.fromkeys(module for node in kernel.nodes if (module := module_of.get(node, "")))),
            outputs=tuple(tensor.dtype for tensor in kernel.outputs),
            operands=kernel.operands,
            bytes_in=same[index].bytes_in if index in same else None,
            bytes_out=same[index].bytes_out if index in same else None,
        )


def _same_kernels(compiled: Sequence[CompiledKernel], measured: Sequence[CompiledKernel]) -> dict[int, CompiledKernel]:
    """By index in `compiled`, the kernel of `measured` that computes the same nodes in the same way, in order."""
    here, there = (
        [(kernel.kind, kernel.operands, kernel.nodes) for kernel in kernels] for kernels in (compiled, measured)
    )
    blocks = SequenceMatcher(a=here, b=there, autojunk=False).get_matching_blocks()
    return {a + offset: measured[b + offset] for a, b, size in blocks for offset in range(size)}


def _found(gemm_of: Mapping[str, CompiledKernel], nodes: Iterable[ir.Node]) -> list[str]:
    """The types of the kernels that compute `nodes`, for those that have one."""
    return [_type(gemm_of[name]) for node in nodes if (name := node.name or "") in gemm_of]


def _by_type(compiled: Iterable[CompiledKernel], kinds: Sequence[str]) -> dict[str, int]:
    return dict(Counter(_type(kernel) for kernel in compiled if kernel.kind in kinds))


def _type(kernel: CompiledKernel) -> str:
    """The type of both operands if they agree, else the wider story, such as `Half×Int8` for weight-only."""
    return "×".join(dict.fromkeys(kernel.operands))


def _attentions(profiles: Iterable[Sequence[CompiledKernel]], model: ir.Model) -> Iterator[BlockAttention]:
    of_each = [
        {node for kernel in compiled if kernel.kind == "attention" for node in kernel.nodes} for compiled in profiles
    ]
    fused = set.intersection(*of_each)
    nodes = list(find_attentions(model.graph))
    modules = Counter(label_of(node) for node in nodes)
    for node in nodes:
        module, name = label_of(node), node.name or ""
        yield BlockAttention(module=module, fused=name in fused, node=name if modules[module] > 1 else "")


def _block(modules: Sequence[str]) -> str | None:
    """The block of a kernel: that of its first module, `blocks.0` of `blocks.0.mlp`, `layers.2.blocks.5` of Swin's."""
    return block_of(modules[0]) if modules else None


def block_of(module: str) -> str | None:
    """The block that a module belongs to; None where its name holds no number."""
    match = _BLOCK.match(module)
    return match[1] if match else None


def _bytes_moved(kernels: Iterable[CompiledKernel]) -> int | None:
    sizes = [size for kernel in kernels for size in (kernel.bytes_in, kernel.bytes_out)]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _memory(log: Sequence[str], label: str) -> int | None:
    found = [match for message in log if (match := re.search(rf"{label}: (\d+) bytes", message))]
    return int(found[-1][1]) if found else None
