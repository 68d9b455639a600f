from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters import slices
from exporters.slices import cuts, flat_slices


@pytest.mark.parametrize("shape", [(), (0,), (3,), (3, 0), (1200, 1000)])
def test_flat_slices_are_all_values_in_their_order(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    parts = list(flat_slices(array))
    assert np.array_equal(np.concatenate([np.empty(0, int), *parts]), array.reshape(-1))
    assert all(np.shares_memory(part, array) for part in parts)
    assert all(0 < part.size <= slices.VALUES for part in parts)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=3), st.data())
def test_cuts_are_disjoint_and_whole_and_small(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    found = [cut[axis] for cut in cuts(tuple(shape), axis)]
    assert [index for cut in found for index in range(shape[axis])[cut]] == list(range(shape[axis]))
    line = np.prod(shape, dtype=np.int64) // max(1, shape[axis])
    assert all(len(range(shape[axis])[cut]) in (1, *range(slices.VALUES // max(1, int(line)) + 1)) for cut in found)
