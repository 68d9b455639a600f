"""How different the patches of an image are to a transformer's attentions.

On photos, some patches of an image resemble each other and others do not; on noise, all resemble each other the
same. PSAQ-ViT (arXiv 2203.02250, section 3.2) measures that by the entropy of the similarities, and raises it:

    Γ[i, j] = cos(o[i], o[j])              o [N, D]: what an attention makes of the patches, mean over its heads
    f(x) = mean over i, j of N(x; Γ[i, j], h²)            a kernel density, h = 0.05
    H = −∫ f log f dx                                     over −1 … 1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_WIDTH = 0.05
_POINTS = 41
_PAIRS = 1024
_TINY = 1e-4


def diversity(attentions: Sequence[torch.Tensor], batch: int) -> torch.Tensor:
    """The entropy H in nats: the mean over images and attentions; a scalar with a gradient.

    Args:
        attentions: what each made, float [batch, heads, N, D], or [batch · heads, N, D].
        batch: the number of images.
    """
    return torch.stack([_entropy(_similarities(one, batch)) for one in attentions]).mean()


def _similarities(attention: torch.Tensor, batch: int) -> torch.Tensor:
    """Γ of at most 1,024 pairs of patches, [batch, pairs]; which ones depends on N alone."""
    per_patch = attention.reshape(batch, -1, *attention.shape[-2:]).mean(dim=1)
    unit = torch.nn.functional.normalize(per_patch, dim=-1)
    count = unit.shape[1]
    first, second = torch.triu_indices(count, count, offset=1)
    if len(first) > _PAIRS:
        drawn = torch.randperm(len(first), generator=torch.Generator().manual_seed(count))[:_PAIRS]
        first, second = first[drawn], second[drawn]
    return (unit[:, first] * unit[:, second]).sum(dim=-1)


def _entropy(values: torch.Tensor) -> torch.Tensor:
    points = torch.linspace(-1, 1, _POINTS)
    kernels = torch.exp(-0.5 * ((values[:, None, :] - points[:, None]) / _WIDTH).square())
    density = kernels.mean(dim=-1) / (_WIDTH * (2 * torch.pi) ** 0.5)
    return torch.trapezoid(-density * torch.log(density + _TINY), points, dim=-1).mean()
