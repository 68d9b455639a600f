from __future__ import annotations

import torch

from calibration.synthetic.noise import photo_noise


def made(channels: int = 3, seed: int = 0) -> torch.Tensor:
    return photo_noise((4, channels, 32, 24), torch.Generator().manual_seed(seed))


def test_has_mean_0_and_variance_1_in_each_image() -> None:
    flat = made().flatten(1)
    assert flat.shape == (4, 3 * 32 * 24)
    assert float(flat.mean(1).abs().max()) <= 1e-5
    assert float((flat.std(1) - 1).abs().max()) <= 1e-5


def test_neighbours_and_channels_are_alike_as_in_photos() -> None:
    x = made()
    neighbours = torch.corrcoef(torch.stack([x[..., 1:].flatten(), x[..., :-1].flatten()]))[0, 1]
    channels = torch.corrcoef(torch.stack([x[:, 0].flatten(), x[:, 1].flatten()]))[0, 1]
    assert float(neighbours) > 0.6
    assert float(channels) > 0.7


def test_repeats_with_its_seed_alone() -> None:
    assert torch.equal(made(), made())
    assert not torch.equal(made(), made(seed=1))
