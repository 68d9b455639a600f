"""One kernel as arithmetic: what it multiplies, and what it moves. The cost model knows kernels by nothing else.

A convolution is the GEMM over its patches: M = batch × output positions, N = outputs and K = inputs × kernel of one
group. An attention has one GEMM pair for each of its `groups` heads: M queries, N keys, K channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["gemm", "convolution", "attention", "pointwise", "pooling", "other"]
KINDS: tuple[Kind, ...] = ("gemm", "convolution", "attention", "pointwise", "pooling", "other")
BYTES = {"fp32": 4.0, "tf32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5, "fp4": 0.5}


@dataclass(frozen=True)
class Work:
    """A kernel, `count` times.

    Attributes:
        kind: what it is.
        number: type of its operands; of a weight-only product, of what the tensor cores multiply.
        m: rows of the activation, the batch among them; of an attention, its queries.
        n: outputs of one group; of an attention, its keys.
        k: length of the sums; of an attention, the channels of a head.
        groups: products of that size: groups of a convolution, batch × heads of an attention.
        read: bytes of the activations that it reads.
        weights: bytes of the constants that it reads, as they are stored dense.
        written: bytes that it writes.
        pruned: whether its weight is 2:4, so that a sparse kernel can take it.
        count: how often the model has just this kernel.
    """

    kind: Kind
    number: str
    m: float = 0
    n: float = 0
    k: float = 0
    groups: float = 1
    read: float = 0
    weights: float = 0
    written: float = 0
    pruned: bool = False
    count: int = 1

    @property
    def operations(self) -> float:
        """A multiply-add counted as two, of one of the `count`."""
        products = 2 if self.kind == "attention" else 1
        return products * 2.0 * self.m * self.n * self.k * self.groups

    @property
    def bytes(self) -> float:
        """What one of the `count` reads and writes."""
        return self.read + self.weights + self.written

    def scaled(self, factor: float) -> Work:
        """The same kernel when the batch is `factor` times as large: its constants stay."""
        heads = self.kind == "attention"
        return replace(
            self,
            m=self.m if heads else self.m * factor,
            groups=self.groups * factor if heads else self.groups,
            read=self.read * factor,
            written=self.written * factor,
        )
