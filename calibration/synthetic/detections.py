"""What a detector answers, whichever way it writes it: boxes and scores.

| outputs | read as |
|---|---|
| [B, 4 + C, A] | centre, size and scores of C classes, as YOLOv8 and its successors are exported |
| [B, A, 5 + C] | centre, size, objectness and scores, as YOLOv5 and YOLOv7 are: score = objectness · score |
| [B, A, 4] and [B, A, C] | corners and scores |

A is the number of boxes and more than 4 + C; boxes are in pixels. Scores outside 0 … 1 are none, and the outputs of
another kind of network then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Detections:
    """Boxes [B, A, 4] as left, top, right, bottom in pixels, and scores [B, A, C] in 0 … 1."""

    boxes: torch.Tensor
    scores: torch.Tensor


def detections_of(output: object) -> Detections | None:
    """Read the outputs of a network; None where they are not those of a detector."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    found = _pair(tensors[:2]) or (_one(tensors[0]) if tensors else None)
    if found is None or not bool(((found.scores >= 0) & (found.scores <= 1)).all()):
        return None
    return found


def _pair(tensors: Sequence[torch.Tensor]) -> Detections | None:
    if len(tensors) < 2 or any(tensor.dim() != 3 for tensor in tensors):
        return None
    boxes, scores = tensors
    return Detections(boxes, scores) if boxes.shape[-1] == 4 and boxes.shape[:2] == scores.shape[:2] else None


def _one(tensor: torch.Tensor) -> Detections | None:
    if tensor.dim() != 3:
        return None
    rows, columns = tensor.shape[1:]
    if 4 < rows < columns:
        by_box = tensor.transpose(1, 2)
        return Detections(_corners(by_box[..., :4]), by_box[..., 4:])
    if 5 < columns < rows:
        return Detections(_corners(tensor[..., :4]), tensor[..., 4:5] * tensor[..., 5:])
    return None


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)
