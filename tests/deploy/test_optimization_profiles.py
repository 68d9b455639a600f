from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deploy.build_options import InputRange
from deploy.optimization_profiles import choose

ONE = (InputRange("x", (1, 3), (1, 3), (1, 3)),)
MANY = (InputRange("x", (1, 3), (8, 3), (32, 3)),)
HUGE = (InputRange("x", (16, 3), (64, 3), (64, 3)),)

lengths = st.tuples(st.integers(1, 40), st.integers(1, 4))


@st.composite
def profiles(draw: st.DrawFn) -> list[tuple[InputRange, ...]]:
    def profile() -> tuple[InputRange, ...]:
        three = zip(
            *(sorted(draw(st.lists(st.integers(1, 40), min_size=3, max_size=3))) for _ in range(2)), strict=True
        )
        return (InputRange("x", *three),)

    return [profile() for _ in range(draw(st.integers(1, 4)))]


def test_the_profile_whose_usual_shape_is_nearest_is_chosen() -> None:
    found = [choose([ONE, MANY, HUGE], {"x": (batch, 3)}) for batch in (1, 2, 20, 30, 64)]
    assert found == [0, 1, 1, 2, 2]


def test_a_request_that_none_takes_has_no_profile() -> None:
    for shape in ((65, 3), (1, 4), (1,), (1, 3, 1)):
        assert choose([ONE, MANY, HUGE], {"x": shape}) is None


def test_every_input_must_fit() -> None:
    pair = [(InputRange("a", (1,), (1,), (1,)), InputRange("b", (1,), (4,), (8,))),
            (InputRange("a", (1,), (4,), (8,)), InputRange("b", (1,), (1,), (1,)))]  # fmt: skip
    assert choose(pair, {"a": (2,), "b": (1,)}) == 1
    assert choose(pair, {"a": (2,), "b": (2,)}) is None


@given(profiles(), lengths)
def test_what_is_chosen_takes_the_shape_and_nothing_fits_where_nothing_is(
    profiles: list[tuple[InputRange, ...]], shape: tuple[int, int]
) -> None:
    index = choose(profiles, {"x": shape})
    taking = [number for number, (each,) in enumerate(profiles) if each.takes(shape)]
    assert (index in taking) if taking else index is None


@given(profiles())
def test_a_usual_shape_is_left_to_a_profile_that_is_made_for_it(profiles: list[tuple[InputRange, ...]]) -> None:
    for (each,) in profiles:
        index = choose(profiles, {"x": each.usual})
        assert index is not None
        assert profiles[index][0].usual == each.usual
