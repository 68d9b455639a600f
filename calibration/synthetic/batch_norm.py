"""How far the inputs of a network's BatchNorms are from what they were in training.

BatchNorm keeps the mean μ and the variance σ² of each channel over the training set. Inputs that give the same ones
are, to the network, like its training set (ZeroQ, arXiv 2001.00281, section 3.1; DeepInversion, arXiv 1912.08795,
equation 4). The distance of two normal distributions is taken, which has no unit, so that each channel of each layer
counts the same:

    KL(N(m, s²) ‖ N(μ, σ²)) = ½ ((s² + (m − μ)²) / σ² − 1 − log(s² / σ²))        ε is added to both variances
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.synthetic.watch import Normalized


def statistics_distance(norms: Sequence[Normalized]) -> torch.Tensor:
    """The mean over `norms` of the mean over channels of the divergence, in nats; a scalar with a gradient."""
    return torch.stack([_distance(norm) for norm in norms]).mean()


def _distance(norm: Normalized) -> torch.Tensor:
    axes = [axis for axis in range(norm.input.dim()) if axis != 1]
    variance, mean = torch.var_mean(norm.input, dim=axes, unbiased=False)
    ratio = (variance + norm.epsilon) / (norm.variance + norm.epsilon)
    shift = (mean - norm.mean).square() / (norm.variance + norm.epsilon)
    return 0.5 * (ratio + shift - 1 - ratio.log()).mean()
