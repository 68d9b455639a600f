from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.build_options import BuildOptions, InputRange, parse_shapes
from profiles.errors import GpusqError


def test_three_shapes_are_smallest_usual_and_largest() -> None:
    assert parse_shapes("x:1x3:8x3:32x3") == InputRange("x", (1, 3), (8, 3), (32, 3))


@pytest.mark.parametrize("name", ["x", "input:0", "model/x.1"])
def test_one_shape_is_all_three_and_a_name_may_hold_colons(name: str) -> None:
    found = parse_shapes(f"{name}:8x3")
    assert found == InputRange(name, (8, 3), (8, 3), (8, 3))
    assert found.fixed


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 5), st.integers(0, 5))
def test_what_grows_is_read_back(shape: list[int], more: int, most: int) -> None:
    shapes = [tuple(length + grown for length in shape) for grown in (0, more, more + most)]
    written = ":".join("x".join(map(str, each)) for each in shapes)
    assert parse_shapes(f"x:{written}") == InputRange("x", *shapes)


@pytest.mark.parametrize("text", ["x", "x:", "8x3", "x:8x3:1x3:32x3", "x:1x3:8:32x3", "x:0x3", "x:-1x3"])
def test_anything_else_is_one_error(text: str) -> None:
    with pytest.raises(GpusqError, match="--shapes") as caught:
        parse_shapes(text)
    assert "NAME:" in caught.value.hint


def test_canonical_json_is_the_same_for_the_same_options_and_names_every_field() -> None:
    one = BuildOptions(shapes=(parse_shapes("x:1x3"),), refit=True)
    assert one.canonical_json() == BuildOptions(refit=True, shapes=(parse_shapes("x:1x3"),)).canonical_json()
    assert json.loads(one.canonical_json()).keys() == BuildOptions.__dataclass_fields__.keys()
    assert one.canonical_json() != BuildOptions(refit=True).canonical_json()


def test_only_what_differs_from_the_defaults_is_asked() -> None:
    assert BuildOptions().asked() == {}
    assert BuildOptions(sparse=False, workspace_mib=64).asked() == {"sparse": False, "workspace_mib": 64}


def test_fallback_without_a_dla_is_refused() -> None:
    with pytest.raises(GpusqError, match="engines of the DLA"):
        BuildOptions(gpu_fallback=True)


def test_an_input_that_is_named_again_begins_the_next_profile() -> None:
    given = [parse_shapes(text) for text in ("ids:1x16", "mask:1x16", "mask:8x16", "ids:8x16")]
    options = BuildOptions(shapes=tuple(given))
    assert options.profiles == ((given[0], given[1]), (given[2], given[3]))
    assert options.flags() == [word for each in given for word in ("--shapes", str(each))]
    assert options.at_usual().shapes == (given[0], given[1])
    assert BuildOptions().profiles == ((),)


def test_profiles_with_different_inputs_are_refused() -> None:
    with pytest.raises(GpusqError, match="have not the same inputs: ids; ids, mask"):
        BuildOptions(shapes=tuple(parse_shapes(text) for text in ("ids:1x16", "ids:8x16", "mask:8x16")))
