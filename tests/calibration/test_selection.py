from __future__ import annotations

import hashlib
from pathlib import Path
from shutil import which
from subprocess import run

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.selection import Choice, Member, digest_of, listing, members_of
from profiles.errors import GpusqError

NAMES = [f"image{number}.png" for number in range(20)]


def test_the_choice_is_the_same_everywhere() -> None:
    """Pinned: it must not change with the machine, the version of Python or of numpy."""
    assert Choice(4).of(NAMES).tolist() == [6, 9, 12, 18]


@given(count=st.integers(1, 30), seed=st.integers(0, 5))
def test_a_choice_is_rising_and_without_repetition(count: int, seed: int) -> None:
    found = Choice(count, seed).of(NAMES)
    assert len(found) == min(count, 20)
    assert np.all(np.diff(found) > 0)


def test_another_seed_chooses_others() -> None:
    assert Choice(8, 0).of(NAMES).tolist() != Choice(8, 1).of(NAMES).tolist()


def test_all_are_used_unless_asked_otherwise() -> None:
    assert Choice().of(NAMES).tolist() == list(range(20))


@given(st.integers(0, 20), st.integers(1, 19))
def test_a_sample_more_displaces_at_most_one(place: int, count: int) -> None:
    before = {NAMES[row] for row in Choice(count).of(NAMES)}
    more = [*NAMES[:place], "new.png", *NAMES[place:]]
    assert len(before - {more[row] for row in Choice(count).of(more)}) <= 1


def test_the_hash_of_a_row_is_that_of_its_values() -> None:
    rows = np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]], np.float32)
    first, second, third = members_of(["a", "b", "c"], {"x": rows}, "source")
    assert first.sha256 == third.sha256 != second.sha256
    assert members_of(["a"], {"x": rows[:1].astype(np.float64)}, "source")[0].sha256 != first.sha256


def test_nan_is_an_error() -> None:
    with pytest.raises(GpusqError, match="source: 'x' holds NaN or infinity"):
        members_of(["a"], {"x": np.full((1, 2), np.nan)}, "source")


def test_the_digest_is_of_the_hashes_alone() -> None:
    assert digest_of([Member("a", "1"), Member("b", "2")]) == digest_of([Member("c", "1"), Member("d", "2")])
    assert digest_of([Member("a", "1")]) == hashlib.sha256(b"1\n").hexdigest()


@pytest.mark.skipif(which("sha256sum") is None, reason="sha256sum is not there")
def test_sha256sum_checks_the_list(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"content")
    member = Member("a b.png", hashlib.sha256(b"content").hexdigest())
    (tmp_path / "list").write_text(listing([member]))
    assert (
        run(["sha256sum", "--check", "--strict", "list"], cwd=tmp_path, check=False, capture_output=True).returncode
        == 0
    )
