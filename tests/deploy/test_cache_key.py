from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deploy.cache_key import Key, code_digest, differences, nearest

VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
INNER = st.lists(VALUES, max_size=3) | st.dictionaries(st.text(max_size=3), VALUES, max_size=3)
PARTS = st.dictionaries(st.text(max_size=5), VALUES | INNER)


@given(PARTS)
def test_the_digest_does_not_depend_on_the_order_of_the_parts(parts: dict[str, Any]) -> None:
    assert Key("build", parts).digest == Key("build", dict(reversed(list(parts.items())))).digest


@given(PARTS, PARTS)
def test_keys_have_one_digest_exactly_where_their_json_is_the_same(
    one: Mapping[str, Any], two: Mapping[str, Any]
) -> None:
    same = Key("build", one).canonical == Key("build", two).canonical
    assert (Key("build", one).digest == Key("build", two).digest) == same
    assert not differences(one, one)


def test_the_stage_counts() -> None:
    assert Key("build", {}).digest != Key("verify", {}).digest


def test_a_number_is_not_its_text() -> None:
    assert Key("build", {"bits": 8}).digest != Key("build", {"bits": "8"}).digest
    assert differences({"bits": 8}, {"bits": "8"}) == {"bits": ("8", '"8"')}


def test_names_the_innermost_parts_that_differ() -> None:
    before = {"device": {"sm": "8.0", "name": "a"}, "improve": ["x"], "model": "m"}
    now = {"device": {"sm": "8.7", "name": "a"}, "improve": [], "model": "m"}
    assert differences(before, now) == {
        "device.sm": ('"8.0"', '"8.7"'),
        "improve": ("none", "[]"),
        "improve.0": ('"x"', "none"),
    }


def test_the_nearest_differs_in_the_fewest_parts() -> None:
    key = Key("build", {"a": 1, "b": 2, "model": "f" * 64})
    assert nearest(key, []) == "no build is in the cache"
    told = nearest(key, [{"a": 0, "b": 0, "model": "f" * 64}, {"a": 1, "b": 2, "model": "0" * 64}])
    assert told == "the nearest entry differs in model: 000000000000… → ffffffffffff…"


def test_many_differences_are_counted() -> None:
    told = nearest(Key("build", dict.fromkeys("abcdef", 1)), [dict.fromkeys("abcdef", 0)])
    assert told.endswith("d: 0 → 1 and 2 more")


def test_the_digest_of_the_code_is_one() -> None:
    assert code_digest() == code_digest()
    assert len(code_digest()) == 64
