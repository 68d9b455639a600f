from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.samples import InputSpec, Samples
from calibration.synthetic.batch_norm import statistics_distance
from calibration.synthetic.boxes import detected, sample_targets
from calibration.synthetic.detections import detections_of
from calibration.synthetic.images import Recipe
from calibration.synthetic.noise import photo_noise
from calibration.synthetic.patches import diversity
from calibration.synthetic.synthesize import synthesize
from calibration.synthetic.watch import Watch
from profiles.errors import GpusqError

SPEC = {"image": InputSpec((1, 16, 16), "float32")}
QUICK = Recipe(steps=25, batch=8)


class Patches(nn.Module):
    """One block of a transformer over 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(1, 16, 4, 4)
        self.qkv = nn.Linear(16, 48)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v).mean((1, 2))


class Finds(nn.Module):
    """Sees a bright object: two classes, told by the sign, in one box for each of 16 × 16 pixels, 6 pixels large."""

    def forward(self, images: Tensor) -> Tensor:
        bright = functional.avg_pool2d(images, 5, 1, 2)[:, 0].flatten(1)
        place = torch.arange(256).expand_as(bright)
        size = torch.full_like(bright, 6.0)
        scores = torch.stack([torch.sigmoid(4 * bright - 6), torch.sigmoid(-4 * bright - 6)], 1)
        return torch.cat([torch.stack([place % 16 + 0.5, place // 16 + 0.5, size, size], 1), scores], 1)


def convolutions() -> nn.Module:
    """Two convolutions whose BatchNorms saw bright, smooth images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    for index in range(40):
        network(0.3 * photo_noise((8, 1, 16, 16), torch.Generator().manual_seed(index)) + 1)
    return network.eval()


def made(network: nn.Module, count: int = 8, *, seed: int = 0, recipe: Recipe = QUICK) -> Samples:
    return synthesize(network, SPEC, count, seed=seed, recipe=recipe)


def pixels(samples: Samples) -> npt.NDArray[np.float32]:
    return samples.inputs["image"][np.arange(len(samples))]


def statistics(network: nn.Module, images: Tensor) -> float:
    with torch.no_grad(), Watch() as watch:
        network(images)
    return float(statistics_distance(watch.norms))


def start(count: int = 8) -> Tensor:
    return photo_noise((count, 1, 16, 16), torch.Generator().manual_seed(0)).clamp(-2.64, 2.64)


def test_images_match_the_statistics_of_batch_norm_far_better_than_their_start() -> None:
    network = convolutions()
    samples = made(network)
    assert pixels(samples).shape == (8, 1, 16, 16)
    after = statistics(network, torch.from_numpy(pixels(samples)))
    assert after < 0.2 * statistics(network, start())
    assert samples.source == "8 synthetic inputs (the statistics of 2 BatchNorms, seed 0)"


def test_the_diversity_of_patches_rises() -> None:
    network = Patches().eval()
    samples = made(network)
    found = []
    for images in (start(), torch.from_numpy(pixels(samples))):
        with torch.no_grad(), Watch() as watch:
            network(images)
        found.append(float(diversity(watch.attentions, len(images))))
    assert found[1] > found[0] + 0.1
    assert "the patch diversity of 1 attentions" in samples.source


def test_a_detectors_images_show_what_it_detects_and_no_others_are_kept() -> None:
    network = Finds().eval()
    recipe = replace(QUICK, steps=40, rate=0.3)
    samples = made(network, 6, recipe=recipe)
    assert "sampled boxes of 2 classes" in samples.source
    images = torch.from_numpy(pixels(samples))
    assert 0 < len(images) <= 6
    found = detections_of(network(images))
    assert found is not None
    assert bool((found.scores.amax((1, 2)) >= 0.5).all())
    noise = detections_of(network(start()))
    assert noise is not None
    assert not bool(detected(noise, sample_targets(8, 2, (1, 16, 16), torch.Generator().manual_seed(0))).any())


def test_a_detector_that_finds_nothing_gives_no_samples() -> None:
    with pytest.raises(GpusqError, match="found none of the objects"):
        made(Finds().eval(), recipe=replace(QUICK, steps=1, rate=1e-6))


def test_pixels_stay_what_an_image_can_be() -> None:
    spec = {"image": replace(SPEC["image"], scale=1 / 255, mean=0.5, std=0.25)}
    samples = synthesize(convolutions(), spec, 4, recipe=QUICK)
    assert np.abs(pixels(samples)).max() <= 2.0


def test_repeats_with_its_seed_and_leaves_the_network_as_it_was() -> None:
    network = convolutions()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first, again, other = (made(network, seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert np.array_equal(pixels(first), pixels(again))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_fewer_samples_are_the_first_ones_and_progress_ends_at_1() -> None:
    told: list[float] = []
    network = convolutions()
    more = synthesize(network, SPEC, 10, recipe=replace(QUICK, steps=3), advance=told.append)
    few = synthesize(network, SPEC, 3, recipe=replace(QUICK, steps=3))
    assert (len(more), len(few)) == (10, 3)
    assert np.array_equal(pixels(more)[:3], pixels(few))
    assert told == sorted(told)
    assert told[-1] == 1.0


@pytest.mark.parametrize(
    ("network", "specs", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3)), SPEC, "neither BatchNorm nor attention"),
        (nn.Identity(), {"a": InputSpec((4,), "float32")}, "takes a 4$"),
        (nn.Identity(), {**SPEC, "other": SPEC["image"]}, "takes image 1×16×16, other 1×16×16"),
    ],
    ids=["nothing to match", "no image", "two inputs"],
)
def test_what_cannot_be_done_is_one_clear_error(network: nn.Module, specs: dict[str, InputSpec], message: str) -> None:
    with pytest.raises(GpusqError, match=message) as caught:
        synthesize(network, specs, 2)
    assert "--data" in caught.value.hint
