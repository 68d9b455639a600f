"""Images made of a network alone: noise that is changed, step by step, until the network takes it for its own data.

    loss = distance of the BatchNorm statistics − diversity of the patches + loss of the sampled boxes + 0.1 · TV

Each term is there where the network has what it needs; the total variation TV keeps the images smooth. Images are
shifted and mirrored at random before each step, as DeepInversion (arXiv 1912.08795) does, so that no pixel is special.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from calibration.synthetic.batch_norm import statistics_distance
from calibration.synthetic.boxes import Target, box_loss, detected, sample_targets
from calibration.synthetic.detections import Detections, detections_of
from calibration.synthetic.noise import photo_noise
from calibration.synthetic.patches import diversity
from calibration.synthetic.watch import Watch

Advance = Callable[[float], None]
Bounds = tuple[torch.Tensor, torch.Tensor]
_BETAS = (0.5, 0.9)
_TRIES = 3


@dataclass(frozen=True)
class Recipe:
    """How images are made.

    Attributes:
        steps: of Adam, for each batch.
        batch: images that are made together, and whose statistics are matched together.
        rate: the learning rate at the start; it falls to 0 as a cosine.
        smooth: the weight of the total variation.
        shift: pixels by which an image is rolled at most.
    """

    steps: int = 30
    batch: int = 16
    rate: float = 0.1
    smooth: float = 0.1
    shift: int = 4


@dataclass(frozen=True)
class Seen:
    """What a network has that tells synthetic images from noise."""

    norms: int
    attentions: int
    classes: int

    def __str__(self) -> str:
        """In words, for the report."""
        parts = {
            f"the statistics of {self.norms} BatchNorms": self.norms,
            f"the patch diversity of {self.attentions} attentions": self.attentions,
            f"sampled boxes of {self.classes} classes": self.classes,
        }
        return ", ".join(words for words, count in parts.items() if count)


def look(network: torch.nn.Module, shape: tuple[int, int, int], batch: int) -> Seen:
    """Run `network` on a batch of noise [batch, C, H, W] and return what it has."""
    with torch.no_grad(), Watch() as watch:
        found = detections_of(network(photo_noise((batch, *shape), torch.Generator().manual_seed(0))))
    return Seen(len(watch.norms), len(watch.attentions), 0 if found is None else found.scores.shape[-1])


def make_images(
    network: torch.nn.Module,
    shape: tuple[int, int, int],
    bounds: Bounds,
    count: int,
    generator: torch.Generator,
    recipe: Recipe,
    advance: Advance,
) -> torch.Tensor:
    """Return at most `count` images, float32 [N, C, H, W]; of a detector only those in which it finds what was asked.

    Args:
        network: in eval mode; its parameters need no gradient.
        shape: of one image, C, H, W.
        bounds: the least and the greatest value of each channel, [C, 1, 1].
        count: images.
        generator: of all random numbers.
        recipe: how.
        advance: is told the share that is done.
    """
    classes = look(network, shape, recipe.batch).classes
    made: list[torch.Tensor] = []
    batches = -(-count // recipe.batch)
    for index in range(batches * (_TRIES if classes else 1)):
        targets = sample_targets(recipe.batch, classes, shape, generator) if classes else []
        told = _share(advance, index, batches, recipe.steps)
        images = _make_batch(network, (recipe.batch, *shape), bounds, targets, generator, recipe, told)
        made.append(images[_kept(network, images, targets)] if targets else images)
        if sum(map(len, made)) >= count:
            break
    return torch.cat(made)[:count]


def _make_batch(
    network: torch.nn.Module,
    shape: tuple[int, int, int, int],
    bounds: Bounds,
    targets: list[Target],
    generator: torch.Generator,
    recipe: Recipe,
    advance: Advance,
) -> torch.Tensor:
    images = torch.clamp(photo_noise(shape, generator), *bounds).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=recipe.rate, betas=_BETAS)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.rate * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        optimizer.zero_grad()
        moved = images if targets else _moved(images, recipe.shift, generator)  # boxes stay where they were sampled
        loss = _loss(network, moved, targets) + recipe.smooth * _variation(images)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            images.clamp_(*bounds)
        advance((step + 1) / recipe.steps)
    return images.detach()


def _loss(network: torch.nn.Module, images: torch.Tensor, targets: list[Target]) -> torch.Tensor:
    with Watch() as watch:
        output = network(images)
    return sum(_terms(watch, output, targets, len(images)), torch.zeros(()))


def _terms(watch: Watch, output: object, targets: list[Target], batch: int) -> Iterator[torch.Tensor]:
    if watch.norms:
        yield statistics_distance(watch.norms)
    if watch.attentions:
        yield -diversity(watch.attentions, batch)
    if targets:
        yield box_loss(_found(output), targets)


def _kept(network: torch.nn.Module, images: torch.Tensor, targets: list[Target]) -> torch.Tensor:
    with torch.no_grad():
        return detected(_found(network(images)), targets)


def _found(output: object) -> Detections:
    found = detections_of(output)
    assert found is not None  # `look` saw that these are detections
    return found


def _moved(images: torch.Tensor, shift: int, generator: torch.Generator) -> torch.Tensor:
    down, right, mirror = torch.randint(-shift, shift + 1, (3,), generator=generator).tolist()
    rolled = torch.roll(images, (down, right), (2, 3))
    return rolled.flip(3) if mirror > 0 else rolled


def _variation(images: torch.Tensor) -> torch.Tensor:
    """The mean absolute difference of neighbours, down plus across."""
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


def _share(advance: Advance, index: int, batches: int, steps: int) -> Advance:
    return lambda share: advance(min((index + share) / batches, 1.0))
