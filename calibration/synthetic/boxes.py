"""Objects that a detector is asked to see: sampled boxes and classes, their loss, and whether it saw them.

After Task-Specific Zero-shot Quantization-Aware Training for Object Detection (arXiv 2507.16782): one box of a class is
sampled for each image, uniformly over classes, places and sizes; the image is changed by the detection loss; and what
the detector itself does not find in the end with confidence is no sample.

    loss = − log score[class] + (1 − GIoU), mean over the 10 predictions nearest to the box by GIoU
           − log (1 − scores), sum over classes, mean over all other predictions

GIoU (arXiv 1902.09630) is the intersection over union, and below 0 where boxes do not meet: the more, the farther.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibration.synthetic.detections import Detections

CONFIDENT = 0.5
_NEAREST = 10
_SMALLEST, _LARGEST = 0.15, 0.6  # of the image's sides
_TINY = 1e-6


@dataclass(frozen=True)
class Target:
    """One object: its box [4] as left, top, right, bottom in pixels, and its class."""

    box: torch.Tensor
    label: int


def sample_targets(count: int, classes: int, shape: tuple[int, int, int], generator: torch.Generator) -> list[Target]:
    """Return one object for each of `count` images of `shape` [C, H, W], wholly inside."""
    sides = torch.tensor([shape[2], shape[1]])
    targets = []
    for _ in range(count):
        size = sides * (_SMALLEST + (_LARGEST - _SMALLEST) * torch.rand(2, generator=generator))
        start = (sides - size) * torch.rand(2, generator=generator)
        label = int(torch.randint(classes, (1,), generator=generator))
        targets.append(Target(torch.cat([start, start + size]), label))
    return targets


def box_loss(found: Detections, targets: list[Target]) -> torch.Tensor:
    """The detection loss; a scalar with a gradient."""
    losses = [
        _loss_of(boxes, scores, target)
        for boxes, scores, target in zip(found.boxes, found.scores, targets, strict=True)
    ]
    return torch.stack(losses).mean()


def detected(found: Detections, targets: list[Target]) -> torch.Tensor:
    """Whether each target is found: bool [B]; the class scores at least 0.5 in a box with an IoU of at least 0.5."""
    hits = [
        bool(((scores[:, target.label] >= CONFIDENT) & (overlap(boxes, target.box)[0] >= CONFIDENT)).any())
        for boxes, scores, target in zip(found.boxes, found.scores, targets, strict=True)
    ]
    return torch.tensor(hits, dtype=torch.bool)


def overlap(boxes: torch.Tensor, box: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The IoU and the GIoU of `boxes` [A, 4] with `box` [4], each [A]."""
    low, high = torch.maximum(boxes[:, :2], box[:2]), torch.minimum(boxes[:, 2:], box[2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    union = _area(boxes) + _area(box[None]) - shared
    hull = (torch.maximum(boxes[:, 2:], box[2:]) - torch.minimum(boxes[:, :2], box[:2])).prod(dim=1)
    iou = shared / (union + _TINY)
    return iou, iou - (hull - union) / (hull + _TINY)


def _loss_of(boxes: torch.Tensor, scores: torch.Tensor, target: Target) -> torch.Tensor:
    nearness = overlap(boxes, target.box)[1]
    nearest = nearness.detach().topk(min(_NEAREST, len(boxes))).indices
    others = torch.ones(len(boxes), dtype=torch.bool)
    others[nearest] = False
    seen = -(scores[nearest, target.label] + _TINY).log() + 1 - nearness[nearest]
    unseen = -(1 - scores[others] + _TINY).log().sum(dim=1)
    return seen.mean() + (unseen.mean() if len(unseen) else 0)


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
