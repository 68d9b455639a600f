from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from calibration.output_loss import Tally, without_padding

LOGITS = np.array([[3, 1, 0], [0, 2, 1], [1, 0, 5], [4, 0, 1]], np.float32)
TURNED = np.array([[3, 1, 0], [0, 1, 2], [1, 0, 5], [4, 0, 1]], np.float32)  # the second has another class


def test_labels_decide_where_there_are_any() -> None:
    tally = Tally()
    tally.add(LOGITS, TURNED, np.array([0, 1, 2, 0]))
    assert tally.loss.drop == 25
    lucky = Tally()
    lucky.add(LOGITS, TURNED, np.array([0, 2, 2, 0]))
    assert lucky.loss.drop == -25


def test_without_labels_it_is_the_angle_between_the_outputs() -> None:
    tally = Tally()
    tally.add(np.array([[10, 0]], np.float32), np.array([[10, 9]], np.float32))
    assert tally.loss.drop == pytest.approx(100 * (1 - 10 / np.hypot(10, 9)))


def test_other_outputs_are_compared_by_their_cosine_without_padding() -> None:
    x = np.ones((2, 3, 4), np.float32)
    y = x.copy()
    y[:, 2] = -7
    feed = {"attention_mask": np.array([[1, 1, 0], [1, 1, 0]])}
    tally = Tally()
    tally.add(without_padding(x, feed), without_padding(y, feed))
    assert (tally.loss.drop, tally.loss.error) == (0, 0)
    tally.add(x, y)
    assert tally.loss.drop > 10


@given(st.integers(1, 7), arrays(np.float32, (8, 5), elements=st.floats(-10, 10, width=32)))
def test_batches_add_up(cut: int, x: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    y = x[::-1]
    whole, parts = Tally(), Tally()
    whole.add(x, y)
    parts.add(x[:cut], y[:cut])
    parts.add(x[cut:], y[cut:])
    assert (parts.loss.drop, parts.loss.error) == pytest.approx((whole.loss.drop, whole.loss.error), abs=1e-9)


def test_what_is_not_finite_loses_everything() -> None:
    tally = Tally()
    tally.add(LOGITS, np.full_like(LOGITS, np.nan))
    assert tally.loss.drop == np.inf
