"""Structured sparsity of a layer: which pattern its weight has, whether a sparse kernel can take it, how many bytes.

A weight is 2:4 if every group of four consecutive values along K, the axis that the GEMM sums over, holds at least two
zeros; of a convolution K are the input channels: "for each output channel and for each spatial pixel in the kernel
weights, every four input channels must have at least two zeros" (TensorRT, Structured Sparsity). A 4-bit weight is 4:8
if of every four pairs two are zero. It is decided on the stored values: the integers of a quantized weight, where only
0 is zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from exporters.derived_tensor import release
from exporters.linears import Linear, type_name
from exporters.passes.fold_quantized import quantized_type
from exporters.qdq_scales import constant_of, input_at
from exporters.zero_pattern import FOUR_BIT, FOUR_EIGHT, KEPT, TWO_FOUR, Census, Pattern, count_zeros
from profiles.device import SparseKernels

INDEX_BITS = 2
PatternName = Literal["2:4", "4:8", "dense"]
PATTERNS: dict[str, Pattern] = {"2:4": TWO_FOUR, "4:8": FOUR_EIGHT}


@dataclass(frozen=True)
class Sparsity:
    """The structured sparsity of one weight, and whether the target's sparse kernels can take it.

    Attributes:
        pattern: what the stored values are; `4:8`, in pairs, only for 4-bit ones.
        axis: the axis of the stored weight along which groups run, K.
        zeros: share of the values that are zero.
        broken_groups: groups that break the pattern of the weight's type; 0 where there are no groups.
        eligible: whether the weight fits the sparse kernels' rules; the builder may still choose a dense one.
        reason: why it is not eligible, or what is still asked of it; empty where nothing is.
        groups: groups along K; 0 where K is no multiple of a group, and where a stored 0 is no zero.
        nans: values that are NaN; they are not zeros.
    """

    pattern: PatternName
    axis: int
    zeros: float
    broken_groups: int
    eligible: bool
    reason: str
    groups: int = 0
    nans: int = 0

    @property
    def broken_share(self) -> float:
        """Share of the groups that break the pattern."""
        return self.broken_groups / self.groups if self.groups else 0.0


def sparsity_of(linear: Linear, rules: SparseKernels | None) -> Sparsity:
    """Judge the stored weight of a layer by the rules of a target; None where it has no sparse kernels."""
    kind = kernel_type(linear)
    pattern, census = _counted(linear, pattern_of(kind))
    release(linear.weight.const_value)
    if _shifted(linear):
        pattern, census = "dense", replace(census, groups=0, broken=0)
        reason, eligible = "its zero-point is not 0, so a stored 0 is no zero", False
    elif pattern == "dense":
        reason, eligible = _why_dense(census, linear, pattern_of(kind)), False
    else:
        reason, eligible = _judge(linear, pattern, kind, rules)
    if census.nans:
        reason = f"{reason}; NaN among its values: {census.nans}".removeprefix("; ")
    return Sparsity(
        pattern=pattern,
        axis=linear.k_axis,
        zeros=census.zeros,
        broken_groups=census.broken,
        eligible=eligible,
        reason=reason,
        groups=census.groups,
        nans=census.nans,
    )


def _shifted(linear: Linear) -> bool:
    """Whether the stored integers have a zero-point other than 0."""
    dq = linear.weight_dq
    producer = None if dq is None or dq.inputs[0] is None else dq.inputs[0].producer()
    if dq is None or (producer is not None and producer.op_type == "QuantizeLinear"):
        return False
    zero = constant_of(input_at(dq, 2))
    return zero is not None and bool(np.any(zero != 0))


def _counted(linear: Linear, asked: Pattern) -> tuple[PatternName, Census]:
    """The pattern of the weight: the one asked for, else 2:4."""
    weight = linear.values
    census = count_zeros(weight, linear.k_axis, asked)
    if census.fits:
        return "4:8" if asked is FOUR_EIGHT else "2:4", census
    if asked is FOUR_EIGHT and (two_four := count_zeros(weight, linear.k_axis)).fits:
        return "2:4", two_four
    return "dense", census


def pattern_of(kind: str) -> Pattern:
    """The pattern that the sparse tensor cores read for operands of a type."""
    return FOUR_EIGHT if kind in FOUR_BIT else TWO_FOUR


def kernel_type(linear: Linear) -> str:
    """The type in which a kernel reads the weight: what the dequantizer reads, else what the operator does."""
    quantized = None if linear.weight_dq is None else linear.weight_dq.inputs[0]
    if quantized is None:
        operand = linear.node.inputs[1 - linear.activation_input]
        return type_name(linear.weight if operand is None or operand.dtype is None else operand)
    producer = quantized.producer()
    if producer is not None and producer.op_type == "QuantizeLinear":
        return quantized_type(producer).numpy().name
    return type_name(linear.weight if quantized.dtype is None else quantized)


def compressed_bytes(size: int, *, bits: int, pattern: Pattern = TWO_FOUR) -> int:
    """Bytes of a sparse weight of `size` values of `bits`: two units and two 2-bit indices for each four units.

    Of 2:4 INT8 5 bits a value, of 4:8 INT4 2.5 bits (GPUSQ-ViT, section 3.1).
    """
    return -(-(size // pattern.group) * KEPT * (pattern.width * bits + INDEX_BITS) // 8)


def _why_dense(census: Census, linear: Linear, asked: Pattern) -> str:
    if not census.groups:
        return f"{_along(linear)} is {linear.shape[linear.k_axis]}, no multiple of {asked.group}"
    group, unit = ("four", "values") if asked is TWO_FOUR else ("eight", "pairs with a value")
    share = 100 * census.broken / census.groups
    return f"{census.broken} of {census.groups} groups of {group} ({share:.1f} %) hold more than two {unit}"


def _along(linear: Linear) -> str:
    return "K" if linear.kind == "gemm" else "the number of input channels"


def _judge(linear: Linear, pattern: str, kind: str, rules: SparseKernels | None) -> tuple[str, bool]:
    """Why the layer is not eligible, or what is still asked of it; and whether it is eligible."""
    if rules is None:
        return "this runtime has no 2:4 kernels", False
    if pattern == "4:8":
        return f"TensorRT takes {kind} for weights only: it has no kernel that multiplies by 4:8 ones", False
    multiples = {"int8": rules.int8_k_multiple, "float16": rules.float16_k_multiple}
    if kind not in multiples:
        return f"sparse kernels take int8 and float16, not {kind}", False
    if linear.kind == "conv" and (reason := _refused_convolution(linear, rules)):
        return reason, False
    length = linear.shape[linear.k_axis]
    if length % multiples[kind]:
        return (
            f"sparse {kind} kernels need {_along(linear)} to be a multiple of {multiples[kind]}; it is {length}",
            False,
        )
    return _still_asked(linear, kind, rules), True


def _refused_convolution(linear: Linear, rules: SparseKernels) -> str:
    if linear.node.op_type == "ConvTranspose":
        return "NVIDIA documents sparse kernels for convolutions and GEMMs, not for transposed convolutions"
    if linear.group > 1 and not rules.grouped_convolutions:
        return "TensorRT considers no sparse kernels for grouped convolutions"
    return ""


def _still_asked(linear: Linear, kind: str, rules: SparseKernels) -> str:
    if linear.kind == "gemm" and kind == "int8" and rules.int8_wants_int8_output and not linear.int8_output:
        return "NVIDIA reports sparse INT8 kernels chosen only where the output is INT8; no quantizer follows here"
    smallest = rules.faster_convolution_channels
    if linear.kind == "conv" and smallest is not None and min(linear.k, linear.n) < smallest:
        return (
            f"NVIDIA finds sparse convolutions faster where input channels × kernel and output channels are at least "
            f"{smallest}; here {linear.k} and {linear.n}"
        )
    return ""
