from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibration.synthetic.boxes import Target, box_loss, detected, overlap, sample_targets
from calibration.synthetic.detections import Detections

TARGET = Target(torch.tensor([10.0, 10, 30, 30]), 1)
coordinate = st.integers(0, 50)


def answer(boxes: list[list[float]], scores: list[list[float]]) -> Detections:
    return Detections(torch.tensor([boxes]), torch.tensor([scores]))


@given(st.tuples(coordinate, coordinate, coordinate, coordinate))
def test_overlap_agrees_with_counted_pixels(sides: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = min(sides[::2]), min(sides[1::2]), max(sides[::2]) + 1, max(sides[1::2]) + 1
    grids = torch.zeros(2, 60, 60, dtype=torch.bool)
    grids[0, top:bottom, left:right] = True
    grids[1, 10:30, 10:30] = True
    iou, generalized = overlap(torch.tensor([[left, top, right, bottom]]).float(), TARGET.box)
    assert float(iou) == pytest.approx(float((grids[0] & grids[1]).sum() / (grids[0] | grids[1]).sum()), abs=1e-5)
    assert float(generalized) <= float(iou) + 1e-6


def test_farther_boxes_have_a_lower_giou() -> None:
    boxes = torch.tensor([[40.0, 10, 50, 20], [60, 10, 70, 20], [90, 10, 100, 20]])
    first, second, third = overlap(boxes, TARGET.box)[1].tolist()
    assert 0 > first > second > third > -1


def test_the_loss_falls_as_the_detector_sees_what_was_asked() -> None:
    near, far = [10.0, 10, 30, 30], [60.0, 60, 80, 80]
    scores = [[[0.01, value]] * 10 + [[0.01, 0.01]] * 5 for value in (0.1, 0.9)]
    unseen, seen = (float(box_loss(answer([near] * 10 + [far] * 5, one), [TARGET])) for one in scores)
    elsewhere = float(box_loss(answer([far] * 15, scores[1]), [TARGET]))
    assert seen < unseen
    assert seen < elsewhere


@pytest.mark.parametrize(
    ("box", "scores", "found"),
    [
        ([10.0, 10, 30, 30], [0.0, 0.9], True),
        ([10.0, 10, 30, 30], [0.9, 0.4], False),
        ([25.0, 10, 45, 30], [0.0, 0.9], False),
    ],
    ids=["seen", "another class", "elsewhere"],
)
def test_an_object_is_detected_in_its_place_and_as_its_class(
    box: list[float], scores: list[float], found: bool
) -> None:
    assert detected(answer([box, [0.0, 0, 5, 5]], [scores, [0.9, 0.9]]), [TARGET]).tolist() == [found]


def test_objects_lie_inside_and_repeat_with_their_seed() -> None:
    made, again = (sample_targets(50, 3, (1, 40, 80), torch.Generator().manual_seed(0)) for _ in range(2))
    boxes = torch.stack([target.box for target in made])
    assert bool((boxes >= 0).all())
    assert bool((boxes <= torch.tensor([80, 40, 80, 40])).all())
    assert bool((boxes[:, 2:] > boxes[:, :2]).all())
    assert {target.label for target in made} == {0, 1, 2}
    assert torch.equal(boxes, torch.stack([target.box for target in again]))
