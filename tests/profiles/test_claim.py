from __future__ import annotations

from pathlib import Path

import pytest

from profiles.claim import FOLDER, read_claims
from profiles.errors import GpusqError

ONE = """
title = "one"
[[claim]]
id = "a"
what = "latency"
model = "m"
format = "fp32"
baseline = "none"
baseline_precision = "none"
value = 2.0
tolerance = 0.5
source = "a test"
"""


def test_a_tolerance_makes_a_limit_easier(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text(ONE)
    (latency,) = read_claims(str(tmp_path / "one.toml")).claims
    assert latency.limit == 3.0
    assert latency.model_copy(update={"what": "size ratio"}).limit == 1.0


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('model = "m"\n', "", "model"),
        ('model = "m"', 'model = "m"\ndevise = "cpu"', "devise"),
        ('"latency"', '"speed"', "what"),
        ("value = 2.0", 'value = "2"', "value"),
        ('title = "one"', "title =", "is not TOML"),
    ],
)
def test_names_the_file_and_the_key_that_is_wrong(tmp_path: Path, old: str, new: str, problem: str) -> None:
    (tmp_path / "one.toml").write_text(ONE.replace(old, new))
    with pytest.raises(GpusqError, match=rf"one\.toml.*{problem}"):
        read_claims(str(tmp_path / "one.toml"))


def test_refuses_two_claims_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(ONE + ONE[ONE.index("[[claim]]") :])
    with pytest.raises(GpusqError, match="two claims are called a"):
        read_claims(str(tmp_path / "two.toml"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_claim_names_its_source_and_its_baseline(path: Path) -> None:
    for claim in read_claims(path.stem).claims:
        assert "arXiv" in claim.source
        assert claim.baseline
        assert claim.baseline_precision
        assert (claim.scope is None) == (claim.what not in ("size ratio", "FLOPs ratio"))
