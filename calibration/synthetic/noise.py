"""Noise with the spectrum of photos: what synthetic images start from.

The amplitudes of natural images fall as 1/f over the spatial frequency f (Field, J. Opt. Soc. Am. A 4, 1987, 2379),
and their colour channels are alike; white noise has neither.
"""

from __future__ import annotations

import torch

_COMMON = 0.9  # the share of the variance that all channels have in common


def photo_noise(shape: tuple[int, int, int, int], generator: torch.Generator) -> torch.Tensor:
    """Return float32 noise [B, C, H, W] with mean 0 and variance 1 in each image."""
    batch, _, height, width = shape
    common = _pink(torch.randn(batch, 1, height, width, generator=generator))
    own = _pink(torch.randn(shape, generator=generator))
    mixed = _COMMON**0.5 * common + (1 - _COMMON) ** 0.5 * own
    flat = mixed.flatten(1)
    unit: torch.Tensor = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
    return unit.reshape(shape)


def _pink(white: torch.Tensor) -> torch.Tensor:
    """Divide the spectrum of `white` by the frequency, each image to variance 1; the mean is removed."""
    height, width = white.shape[-2:]
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    frequency[0, 0] = torch.inf
    pink: torch.Tensor = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    return pink / pink.std(dim=(-2, -1), keepdim=True)
