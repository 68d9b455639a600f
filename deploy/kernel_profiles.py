"""Tell the kernels of an engine's optimization profiles apart: the compiler lists them one profile after the other.

    Name: node_of_a_myl0_0, …             the first profile's
    Name: node_of_a [profile 1]_myl1_0, … the second's: what comes from the model has its number
    Name: __myl_MaxrSubExpSumDiv_myl1_1   the second's too: what the compiler wrote has the number of its graph, myl1

TensorRT-RTX 1.7.1 writes so, measured here; that TensorRT's inspector marks names in the same way is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from deploy.compiled_kernels import CompiledKernel

_PROFILE = re.compile(r"\[profile (\d+)\]")
_GRAPH = re.compile(r"_myl(\d+)(?:_\d+)?$")


def by_profile(kernels: Sequence[CompiledKernel]) -> list[list[CompiledKernel]]:
    """The kernels of each optimization profile, in their order; there is at least one profile."""
    marked = [_marked(kernel) for kernel in kernels]
    of_graph = {
        _graph(kernel): profile for kernel, profile in zip(kernels, marked, strict=True) if profile and _graph(kernel)
    }
    profiles = [profile or of_graph.get(_graph(kernel), 0) for kernel, profile in zip(kernels, marked, strict=True)]
    return [
        [kernel for kernel, profile in zip(kernels, profiles, strict=True) if profile == index]
        for index in range(1 + max(profiles, default=0))
    ]


def _marked(kernel: CompiledKernel) -> int:
    """The number in the names of the kernel and its tensors; 0 where they have none."""
    return max((int(number) for name in _names(kernel) for number in _PROFILE.findall(name)), default=0)


def _names(kernel: CompiledKernel) -> Iterator[str]:
    yield kernel.name
    yield from (tensor.name for tensor in (*kernel.inputs, *kernel.constants, *kernel.outputs))


def _graph(kernel: CompiledKernel) -> str:
    match = _GRAPH.search(kernel.name)
    return match[1] if match else ""
