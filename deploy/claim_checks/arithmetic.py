"""Size and FLOPs ratios from the shapes of a graph alone; the arithmetic is told line by line.

Size, in bits: a 2:4 group of four INT8 values keeps two values and two 2-bit indices, (2·8 + 2·2) / 4 = 5 bits a
weight; INT4 keeps two pairs of eight, (4·4 + 2·2) / 8 = 2.5 bits (GPUSQ-ViT, section 3.1).

    pruned layers     32·W / (bits·W)
    all parameters    32·P / (bits·W + rest·(P − W))

FLOPs, by the formula `bit-operations`: a multiply-add of a- by w-bit operands costs a·w; 2:4 halves it; FP32 costs
32·32. INT8 gives so 2·32·32 / (8·8) = 32. The paper does not print its formula; INT4's figures, twice those of INT8,
fit 4-bit weights with 8-bit activations, 2·32·32 / (8·4) = 64, and not 4-bit activations, which would be 128.

    pruned layers     the pruned layers alone
    linear layers     and those that stay dense, at 32·32
    all products      and the products of activations, which 2:4 cannot thin: a·a
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from deploy.claim_checks.graph_cost import GraphCost, LayerCost
from exporters.sparsity import INDEX_BITS, pattern_of
from exporters.zero_pattern import KEPT, Pattern
from profiles.claim import Claim
from profiles.errors import GpusqError

_FP32 = 32
_DENSE_TIMES = 2  # what 2:4 leaves out: every second multiply-add


@dataclass(frozen=True)
class Computed:
    """A figure and how it was computed."""

    value: float
    steps: tuple[str, ...]


def ratio_of(claim: Claim, cost: GraphCost) -> Computed:
    """The ratio that `claim` speaks of, for a graph.

    Raises:
        GpusqError: the claim does not say the bits or the scope.
    """
    if claim.weight_bits is None or claim.scope is None or (claim.what == "FLOPs ratio" and not claim.activation_bits):
        raise GpusqError(
            f"claim {claim.id} does not say what it is taken over", hint="give scope, weight_bits and activation_bits"
        )
    pruned = [layer for layer in cost.layers if is_pruned(layer, claim)]
    return _size(claim, cost, pruned) if claim.what == "size ratio" else _flops(claim, cost, pruned)


def is_pruned(layer: LayerCost, claim: Claim) -> bool:
    """Whether the layer is 2:4 in the claim's format: it is not named dense, and its K divides into groups."""
    group = _pattern(claim).group
    return layer.k % group == 0 and not any(fnmatchcase(layer.module, name) for name in claim.dense)


def bits_a_weight(claim: Claim) -> float:
    """What a pruned weight takes, its share of the indices included."""
    assert claim.weight_bits is not None
    pattern = _pattern(claim)
    return KEPT * (pattern.width * claim.weight_bits + INDEX_BITS) / pattern.group


def _pattern(claim: Claim) -> Pattern:
    return pattern_of(f"int{claim.weight_bits}")


def _size(claim: Claim, cost: GraphCost, pruned: list[LayerCost]) -> Computed:
    weights, bits = sum(layer.weights for layer in pruned), bits_a_weight(claim)
    rest = cost.parameters - weights if claim.scope == "all parameters" else 0
    before, after = _FP32 * (weights + rest), bits * weights + claim.rest_bits * rest
    steps = (
        f"{len(pruned)} pruned layers of {cost.name}: {weights:,} weights at {bits:g} bits",
        f"the rest: {rest:,} parameters at {claim.rest_bits} bits" if rest else "the rest is not counted",
        f"{before:,.0f} / {after:,.0f} bits = {before / after:.3f}",
    )
    return Computed(before / after, steps)


def _flops(claim: Claim, cost: GraphCost, pruned: list[LayerCost]) -> Computed:
    assert claim.weight_bits is not None
    assert claim.activation_bits is not None
    sparse = sum(layer.macs for layer in pruned)
    dense = sum(layer.macs for layer in cost.layers) - sparse if claim.scope != "pruned layers" else 0
    products = cost.product_macs if claim.scope == "all products" else 0
    price = claim.activation_bits * claim.weight_bits / _DENSE_TIMES
    before = prod((_FP32, _FP32)) * (sparse + dense + products)
    after = price * sparse + _FP32**2 * dense + claim.activation_bits**2 * products
    steps = (
        f"{len(pruned)} pruned layers of {cost.name}: {sparse:,} multiply-adds at {price:g} bit-operations",
        f"dense layers: {dense:,} at {_FP32**2}; products of activations: {products:,} at {claim.activation_bits**2}",
        f"{before:,.0f} / {after:,.0f} bit-operations = {before / after:.3f}",
    )
    return Computed(before / after, steps)
