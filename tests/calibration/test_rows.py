from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from calibration.rows import Computed, all_of, batches, chosen, converted, stacked, zeros


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), data=st.data())
def test_stacked_rows_are_those_of_the_concatenation(lengths: list[int], data: st.DataObject) -> None:
    parts = [
        np.arange(10 * place, 10 * place + length, dtype=np.int64)[:, None] for place, length in enumerate(lengths)
    ]
    whole, found = np.concatenate(parts), stacked(parts)
    asked = np.array(data.draw(st.lists(st.integers(0, max(len(whole) - 1, 0)), max_size=6)), np.intp)
    asked = asked if len(whole) else asked[:0]
    assert found.shape == whole.shape
    assert np.array_equal(found[asked], whole[asked])


def test_chosen_rows_are_those_asked_for_in_their_order() -> None:
    rows = chosen(np.arange(10), np.array([7, 2, 5]))
    assert rows.shape == (3,)
    assert rows[np.array([2, 0])].tolist() == [5, 7]


def test_all_rows_are_the_array_itself() -> None:
    array = np.arange(4)
    assert chosen(array, np.arange(4)) is array


def test_converted_rows_have_the_type_that_was_asked_for() -> None:
    rows = converted(np.arange(4, dtype=np.uint8), "float16", lambda batch: batch * 0.5)
    assert rows.dtype == np.float16
    assert all_of(rows).dtype == np.float16
    assert all_of(rows).tolist() == [0, 0.5, 1, 1.5]


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    asked: list[int] = []

    def compute(rows: np.ndarray[tuple[int], np.dtype[np.intp]]) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        asked.extend(rows.tolist())
        return rows

    rows = converted(
        chosen(Computed((8,), np.dtype(np.intp), compute), np.array([6, 4])), "float32", lambda batch: batch
    )
    assert (rows.shape, len(rows), asked) == ((2,), 2, [])
    rows[np.array([1])]
    assert asked == [4]


def test_zeros_and_batches() -> None:
    assert all_of(zeros((2, 0, 3), "float32")).shape == (2, 0, 3)
    assert [batch.tolist() for batch in batches(5, 2)] == [[0, 1], [2, 3], [4]]
