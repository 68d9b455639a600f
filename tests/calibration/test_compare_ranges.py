from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.compare_ranges import compare_ranges

RANGES = st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-3, 1e3), min_size=1)


def test_ratios_are_tensor_by_tensor() -> None:
    found = compare_ranges({"x": 1.0, "y": 8.0, "z": 3.0}, {"z": 3.0, "y": 4.0, "x": 4.0})
    assert found.ratios == {"x": 0.25, "y": 2.0, "z": 1.0}
    assert found.median_ratio == 1.0
    assert found.median_factor == pytest.approx(2.0)


def test_only_what_both_have_and_is_not_zero_is_compared() -> None:
    assert compare_ranges({"x": 1.0, "y": 0.0, "z": 1.0}, {"x": 2.0, "y": 1.0, "z": 0.0, "w": 1.0}).ratios == {"x": 0.5}
    empty = compare_ranges({}, {"x": 1.0})
    assert (empty.median_ratio, empty.median_factor) == (1.0, 1.0)


@given(RANGES, RANGES)
def test_the_factor_is_the_same_from_both_sides(one: dict[str, float], other: dict[str, float]) -> None:
    there, back = compare_ranges(one, other), compare_ranges(other, one)
    assert there.median_factor == pytest.approx(back.median_factor)
    assert there.median_factor >= 1


def test_is_told_in_words_with_the_tensors_that_differ_most_and_in_json() -> None:
    found = compare_ranges({f"t{i}": 1.0 + i for i in range(8)}, {f"t{i}": 1.0 for i in range(8)}, to="photos.npz")
    head, *rows = found.to_text().splitlines()
    assert head.startswith("ranges of synthetic samples are 4.50 × those of photos.npz (median of 8 tensors")
    assert [row.split()[-1] for row in rows] == ["t7", "t6", "t5", "t4", "t3"]
    assert json.loads(json.dumps(found.to_json()))["ratios"]["t7"] == 8.0
