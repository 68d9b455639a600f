"""2:4 pruning: of every 4 consecutive input weights, the 2 of the largest magnitude stay; the mask never changes again.

Pruned as in GPUSQ-ViT (arXiv 2305.10727): the patch embedding as a GEMM, Q/K/V, the attention's projection and both MLP
linears. The head stays dense.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUP = 4
KEPT = 2
DENSE = ("head",)


class SparseLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a constant mask, so that pruned weights get no gradient either."""

    mask: Tensor

    def __init__(self, source: nn.Linear, mask: Tensor) -> None:
        super().__init__(source.in_features, source.out_features)
        self.load_state_dict(source.state_dict())
        self.register_buffer("mask", mask, persistent=False)
        with torch.no_grad():
            self.weight.mul_(mask)

    def forward(self, x: Tensor) -> Tensor:
        """[…, K] → […, N]."""
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def two_four_mask(weight: Tensor) -> Tensor:
    """float32 [N, K] of ones and zeros for a weight [N, K], K a multiple of 4; of equal magnitudes the first stay."""
    rows, columns = weight.shape
    if columns % GROUP:
        raise ValueError(f"K is {columns}, 2:4 needs a multiple of {GROUP}")
    groups = weight.detach().abs().reshape(rows, columns // GROUP, GROUP)
    kept = groups.argsort(dim=-1, descending=True, stable=True)[..., :KEPT]
    return torch.zeros_like(groups).scatter_(-1, kept, 1.0).reshape(rows, columns)


def prune(model: nn.Module) -> None:
    """Replace, in place, every linear of `model` by a SparseLinear; those named in DENSE get a mask of ones."""
    for name, linear in linears(model).items():
        mask = torch.ones_like(linear.weight) if name in DENSE else two_four_mask(linear.weight)
        replace(model, name, SparseLinear(linear, mask.detach()))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of `model` by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is in `model`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
