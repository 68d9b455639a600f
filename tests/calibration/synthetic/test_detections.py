from __future__ import annotations

import pytest
import torch

from calibration.synthetic.detections import detections_of

BOX = torch.tensor([20.0, 30, 8, 4])  # centre and size
CORNERS = [16.0, 28, 24, 32]


def rows(*scores: float) -> torch.Tensor:
    """Ten equal rows of a box and scores, [1, 10, 4 + …]."""
    return torch.cat([BOX, torch.tensor(scores)]).repeat(1, 10, 1)


def test_reads_the_columns_of_newer_yolos() -> None:
    found = detections_of((rows(0.25, 0.5).transpose(1, 2), [torch.zeros(1, 3, 4, 4)]))
    assert found is not None
    assert found.boxes[0, 0].tolist() == CORNERS
    assert found.scores[0, 0].tolist() == [0.25, 0.5]


def test_reads_the_rows_of_older_yolos_with_their_objectness() -> None:
    found = detections_of(rows(0.5, 0.25, 0.5))
    assert found is not None
    assert found.boxes[0, 0].tolist() == CORNERS
    assert found.scores[0, 0].tolist() == [0.125, 0.25]


def test_reads_boxes_and_scores() -> None:
    found = detections_of([torch.tensor(CORNERS).repeat(2, 7, 1), torch.full((2, 7, 3), 0.5)])
    assert found is not None
    assert (found.boxes[0, 0].tolist(), found.scores.shape) == (CORNERS, (2, 7, 3))


@pytest.mark.parametrize(
    "output",
    [torch.zeros(2, 1000), rows(-0.1, 0.5), torch.randn(2, 197, 64), torch.zeros(1, 3, 8, 8), "text", None],
    ids=["classes", "no scores", "tokens", "a map", "no tensor", "nothing"],
)
def test_other_outputs_are_no_detections(output: object) -> None:
    assert detections_of(output) is None
