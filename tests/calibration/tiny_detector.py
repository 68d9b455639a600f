"""A detector small enough to be trained in minutes: where a garment of Fashion-MNIST lies in an image, and which it is.

Images are 96 × 96 in grey: three garments, 24 to 48 pixels large, on noise. The network answers as YOLOv8 does when it
is exported: [B, 4 + 10, 144], centre and size in pixels and the scores of each of 12 × 12 cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.samples import InputSpec
from calibration.synthetic.boxes import overlap
from students.fashion_vit.data import DEFAULT_ROOT, MEAN, SCALE, STD, read_idx

SIDE = 96
CLASSES = 10
SPEC = InputSpec((1, SIDE, SIDE), "float32", SCALE, MEAN, STD)
_STRIDE = 8
_CELLS = SIDE // _STRIDE
_OBJECTS = 3
_RATE = 3e-3


@dataclass(frozen=True)
class Scenes:
    """Images float32 [N, 1, 96, 96], the boxes [N, 3, 4] of their garments as corners, and their classes [N, 3]."""

    images: Tensor
    boxes: Tensor
    labels: Tensor


class TinyDetector(nn.Module):
    """Eight convolutions with BatchNorm, then scores and distances of the box's sides for each cell."""

    def __init__(self, width: int = 16, classes: int = CLASSES) -> None:
        super().__init__()
        sizes = [1, width, 2 * width, 2 * width, 4 * width, 4 * width, 4 * width, 4 * width, 4 * width]
        strides = [2, 1, 2, 1, 2, 1, 1, 1]
        self.backbone = nn.Sequential(
            *(_block(a, b, stride) for a, b, stride in zip(sizes, sizes[1:], strides, strict=False))
        )
        self.scores = nn.Conv2d(sizes[-1], classes, 1)
        self.sides = nn.Conv2d(sizes[-1], 4, 1)
        nn.init.constant_(self.scores.bias, -4.0)  # type: ignore[arg-type]
        nn.init.constant_(self.sides.bias, 1.0)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, H, W] → [B, 4 + C, H / 8 · W / 8]."""
        features = self.backbone(images)
        height, width = features.shape[-2:]
        left, top, right, bottom = (functional.softplus(self.sides(features)) * _STRIDE).flatten(2).unbind(1)
        down = (torch.arange(height * width) // width + 0.5) * _STRIDE
        across = (torch.arange(height * width) % width + 0.5) * _STRIDE
        boxes = [across + (right - left) / 2, down + (bottom - top) / 2, left + right, top + bottom]
        return torch.cat([torch.stack(boxes, 1), self.scores(features).sigmoid().flatten(2)], 1)


def train(steps: int, *, seed: int = 0, batch: int = 32) -> TinyDetector:
    """Return a detector that was trained on scenes of training images, in eval mode; the same for the same seed."""
    torch.manual_seed(seed)
    network = TinyDetector()
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    garments = read_garments("train")
    for step in range(steps):
        made = scenes(garments, batch, seed=seed * steps + step + 1)
        optimizer.zero_grad()
        _loss(network(made.images), made).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return network.eval()


def read_garments(part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The images [N, 28, 28] and labels [N] of `train` or `t10k`."""
    pixels, labels = (read_idx(DEFAULT_ROOT / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    return pixels.reshape(-1, 28, 28), labels


def scenes(garments: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]], count: int, *, seed: int) -> Scenes:
    """Compose `count` images, each of three garments drawn at random; later ones lie on earlier ones."""
    random = np.random.default_rng(seed)
    pixels, labels = garments
    images = random.integers(0, 48, (count, SIDE, SIDE)).astype(np.float32)
    drawn = random.integers(0, len(labels), (count, _OBJECTS))
    boxes = np.zeros((count, _OBJECTS, 4), np.float32)
    for image, chosen, found in zip(images, drawn, boxes, strict=True):
        for index, garment in enumerate(chosen):
            size = int(random.integers(24, 49))
            left, top = random.integers(0, SIDE - size + 1, 2)
            stretched = pixels[garment][np.ix_(*[np.arange(size) * 28 // size] * 2)]
            part = image[top : top + size, left : left + size]
            np.copyto(part, stretched, where=stretched > 0)
            found[index] = _tight(stretched) + np.array([left, top, left, top])
    normalized = (images * np.float32(SCALE) - np.float32(MEAN)) / np.float32(STD)
    return Scenes(
        torch.from_numpy(normalized[:, None]),
        torch.from_numpy(boxes),
        torch.from_numpy(labels[drawn].astype(np.int64)),
    )


def seen_classes(output: Tensor, boxes: Tensor, threshold: float = 0.3) -> Tensor:
    """What is seen at each of `boxes` [N, 4]: scores [N, C + 1], the last for nothing, from outputs [N, 4 + C, A]."""
    rows = []
    for answer, box in zip(output, boxes, strict=True):
        centre, half = answer[:2].T, answer[2:4].T / 2
        near = overlap(torch.cat([centre - half, centre + half], 1), box)[0] >= 0.5
        scores = answer[4:, near].amax(1) if near.any() else torch.zeros(len(answer) - 4)
        rows.append(torch.cat([scores, torch.tensor([threshold])]))
    return torch.stack(rows)


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def _tight(garment: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The box around what is not black."""
    down, across = np.nonzero(garment.any(1))[0], np.nonzero(garment.any(0))[0]
    return np.array([across[0], down[0], across[-1] + 1, down[-1] + 1], np.float32)


def _loss(output: Tensor, made: Scenes) -> Tensor:
    """Cross-entropy of the scores and 1 − GIoU, over the cells near the middle of each box (FCOS, 1904.01355)."""
    wanted = torch.zeros(len(output), CLASSES, _CELLS * _CELLS)
    distances = []
    for index, answer in enumerate(output):
        centre, half = answer[:2].T, answer[2:4].T / 2
        predicted = torch.cat([centre - half, centre + half], 1)
        for box, label in zip(made.boxes[index], made.labels[index].tolist(), strict=True):
            cells = _cells_near(box)
            wanted[index, label, cells] = 1
            distances.append(1 - overlap(predicted[cells], box)[1])
    scores = functional.binary_cross_entropy(output[:, 4:], wanted, reduction="sum") / wanted.sum()
    return scores + torch.cat(distances).mean()


def _cells_near(box: Tensor) -> Tensor:
    column, row = ((box[:2] + box[2:]) / 2 / _STRIDE).int().clamp(1, _CELLS - 2).tolist()
    near = [(row + down) * _CELLS + column + right for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return torch.tensor(near)
