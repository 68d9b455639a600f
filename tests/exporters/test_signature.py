from __future__ import annotations

import pytest

from exporters.signature import Input, parse_input, with_dynamic
from profiles.errors import GpusqError

IMAGE, MASK = Input("image", (1, 3, 224, 224)), Input("mask", (1, 16), "int64")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("image=1x3x224x224", IMAGE), ("mask=1x16:int64", MASK), ("a.b=8", Input("a.b", (8,)))],
)
def test_reads_a_shape_and_a_type(text: str, expected: Input) -> None:
    assert parse_input(text) == expected


@pytest.mark.parametrize("text", ["image", "image=", "image=1x-3", "image=axb", "image=1x3:complex", "=1x3", "x=1x0"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(GpusqError) as caught:
        parse_input(text)
    assert text in caught.value.message
    assert caught.value.hint


def test_an_axis_varies_where_it_is_asked_for_and_nowhere_else() -> None:
    image, mask = with_dynamic([IMAGE, MASK], ["mask:1"])
    assert (image.dynamic, mask.dynamic) == ({}, {1: "mask_axis1"})


def test_a_star_is_every_input_that_has_the_axis() -> None:
    image, mask = with_dynamic([IMAGE, MASK], ["*:0", "*:3"])
    assert image.dynamic == {0: "batch", 3: "image_axis3"}
    assert mask.dynamic == {0: "batch"}


@pytest.mark.parametrize(
    ("asked", "expected"), [("mask", "names no axis"), ("other:0", "no input 'other'"), ("mask:2", "no axis 2")]
)
def test_an_axis_that_is_not_there_is_named(asked: str, expected: str) -> None:
    with pytest.raises(GpusqError, match=expected):
        with_dynamic([IMAGE, MASK], [asked])
