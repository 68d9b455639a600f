"""2:4 structured sparsity: is a weight 2:4, can a sparse kernel take it, how many bytes does it need.

A weight is 2:4 if every group of four consecutive values along K, the axis that the GEMM sums over, holds at least two
zeros. It is decided on the stored values: the integers of a quantized weight, where only 0 is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from profiles.device import SparseKernels

GROUP = 4
KEPT = 2
INDEX_BITS = 2


@dataclass(frozen=True)
class Sparsity:
    """The 2:4 state of one weight, and whether the target's sparse kernels can take it.

    Attributes:
        pattern: what the stored values are.
        axis: the axis of the stored weight along which groups of four run, K.
        zeros: share of the values that are zero.
        broken_groups: groups of four with more than two values; 0 where K is no multiple of four.
        eligible: whether the weight fits the sparse kernels' rules; the builder may still choose a dense one.
        reason: why it is not eligible, or what is still asked of it; empty where nothing is.
    """

    pattern: Literal["2:4", "dense"]
    axis: int
    zeros: float
    broken_groups: int
    eligible: bool
    reason: str


def sparsity_of(
    weight: npt.NDArray[np.generic], k_axis: int, rules: SparseKernels | None, *, int8_output: bool = False
) -> Sparsity:
    """Judge one stored weight by the rules of a target.

    Args:
        weight: [K, N] or [N, K], int8 or float, not empty.
        k_axis: the axis that the GEMM sums over.
        rules: the target's; None where it has no sparse kernels.
        int8_output: whether a quantizer follows the layer.
    """
    zeros = 1.0 - float(np.count_nonzero(weight)) / weight.size
    k = weight.shape[k_axis]
    if k % GROUP:
        return Sparsity("dense", k_axis, zeros, 0, False, f"K = {k} is no multiple of {GROUP}")
    broken = count_broken_groups(weight, k_axis)
    if broken:
        share = broken / (weight.size // GROUP)
        return Sparsity(
            "dense",
            k_axis,
            zeros,
            broken,
            False,
            f"{100 * share:.1f} % of the groups of four hold more than two values",
        )
    reason, eligible = _judge(weight, k, rules, int8_output=int8_output)
    return Sparsity("2:4", k_axis, zeros, 0, eligible, reason)


def count_broken_groups(weight: npt.NDArray[np.generic], k_axis: int) -> int:
    """Count the groups of four along `k_axis` with more than two values that are not zero."""
    groups = np.moveaxis(weight, k_axis, -1).reshape(-1, GROUP)
    return int(np.count_nonzero(np.count_nonzero(groups, axis=1) > KEPT))


def compressed_bytes(weight: npt.NDArray[np.generic], *, bits: int) -> int:
    """Bytes of a 2:4 weight: two values of `bits` and two 2-bit indices for each four (GPUSQ-ViT, section 3.1)."""
    groups = weight.size // GROUP
    return -(-groups * KEPT * (bits + INDEX_BITS) // 8)


def _judge(
    weight: npt.NDArray[np.generic], k: int, rules: SparseKernels | None, *, int8_output: bool
) -> tuple[str, bool]:
    if rules is None:
        return "this runtime has no 2:4 kernels", False
    multiples = {"int8": rules.int8_k_multiple, "float16": rules.float16_k_multiple}
    kind = weight.dtype.name
    if kind not in multiples:
        return f"sparse kernels take int8 and float16, not {kind}", False
    if k % multiples[kind]:
        return f"sparse {kind} kernels need K to be a multiple of {multiples[kind]}; it is {k}", False
    if kind == "int8" and rules.int8_wants_int8_output and not int8_output:
        return (
            "NVIDIA reports sparse INT8 kernels chosen only where the output is INT8; no quantizer follows here",
            True,
        )
    return "", True
