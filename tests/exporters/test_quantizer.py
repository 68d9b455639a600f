from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exporters.quantizer import Place, Quantizer, check_quantizer, revived, symmetric, symmetric_weight
from profiles.errors import GpusqError

HERE = Place("blocks.0.fc", "weight")
TENSOR = np.array(0.05, np.float32)


def zero(*points: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.array(points, np.int32).reshape(() if len(points) == 1 else -1)


@given(hnp.arrays(np.float32, (3, 8), elements=st.floats(-9, 9, width=32)), st.sampled_from([None, 0, 1, -1]))
def test_integers_and_back_differ_by_half_a_step_at_most(
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], axis: int | None
) -> None:
    scale = np.full(() if axis is None else values.shape[axis], 0.1, np.float32)
    quantizer = Quantizer(scale, axis=axis)
    step = float(scale.max())
    inside = np.abs(values) <= 127 * step
    back = quantizer.real(quantizer.integers(values))
    assert np.all(np.abs(back - values)[inside] <= step * 0.5001)
    assert np.array_equal(quantizer.integers(back), quantizer.integers(values))


def test_blocks_have_a_scale_each() -> None:
    quantizer = Quantizer(np.array([[1, 10]], np.float32), axis=1, block=2, low=-8, high=7)
    assert quantizer.integers(np.array([[1, 2, 30, -40]], np.float32)).tolist() == [[1, 2, 3, -4]]


@pytest.mark.parametrize(
    ("scale", "axis", "block"),
    [
        ((), None, None),
        ((1500,), 0, None),
        ((1024,), 1, None),
        ((1024,), -1, None),
        ((12, 1024), 0, 128),
        ((1500, 16), 1, 64),
        ((1500, 16), -1, 64),
    ],
)
def test_stores_part_by_part_what_it_makes_of_the_whole(
    scale: tuple[int, ...], axis: int | None, block: int | None
) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1500, 1024), np.float32)
    points = rng.integers(-3, 4, scale, np.int32) if scale else zero(2)
    quantizer = Quantizer(rng.uniform(0.01, 0.1, scale).astype(np.float32), axis, block, zero_point=points)
    stored = quantizer.stored(values, np.int8)
    assert stored.dtype == np.int8
    assert stored.flags.c_contiguous
    assert np.array_equal(stored, quantizer.integers(values))


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 3, 4)])
def test_stores_tensors_of_any_shape(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    assert np.array_equal(Quantizer(TENSOR).stored(values, np.int8), Quantizer(TENSOR).integers(values))


@pytest.mark.parametrize(("low", "high", "bits"), [(-128, 127, 8), (-127, 127, 8), (0, 255, 8), (-8, 7, 4), (-1, 1, 2)])
def test_bits(low: int, high: int, bits: int) -> None:
    assert Quantizer(TENSOR, low=low, high=high).bits == bits


@pytest.mark.parametrize(
    ("low", "high", "point", "shifted"),
    [(0, 255, 128, (-128, 127)), (0, 15, 8, (-8, 7)), (-128, 127, 0, (-128, 127)), (0, 127, 0, (0, 127))],
)
@given(x=hnp.arrays(np.float32, 20, elements=st.floats(-20, 20, width=32)))
def test_a_shift_of_integers_and_zero_point_is_the_same_function(
    low: int,
    high: int,
    point: int,
    shifted: tuple[int, int],
    x: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> None:
    before = Quantizer(TENSOR, low=low, high=high, zero_point=zero(point))
    after = symmetric(before, HERE)
    assert (after.low, after.high, int(after.zero_point)) == (*shifted, 0)
    assert np.array_equal(after.real(after.integers(x)), before.real(before.integers(x)))


@pytest.mark.parametrize(("low", "high", "point"), [(0, 255, 0), (0, 255, 127), (-128, 127, 3)])
def test_an_activation_that_does_not_fit_int8_is_refused_by_name(low: int, high: int, point: int) -> None:
    with pytest.raises(GpusqError, match=r"'blocks\.0\.fc\.weight' is quantized asymmetrically") as caught:
        symmetric(Quantizer(TENSOR, low=low, high=high, zero_point=zero(point)), HERE)
    assert "symmetric" in caught.value.hint


def test_a_weight_is_judged_by_the_integers_that_occur() -> None:
    integers = np.array([[3, 130], [0, 9]])
    quantizer = Quantizer(np.ones(2, np.float32), axis=0, low=0, high=255, zero_point=zero(10, 4))
    folded, stored = symmetric_weight(quantizer, integers, HERE)
    assert stored.tolist() == [[-7, 120], [-4, 5]]
    assert np.array_equal(folded.real(stored), quantizer.real(integers))
    with pytest.raises(GpusqError, match="-10 to 246"):
        symmetric_weight(quantizer, np.array([[0, 255], [0, 250]]), HERE)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_none_is_named_with_its_channel(value: float) -> None:
    with pytest.raises(GpusqError, match=r"scale of 'blocks\.0\.fc\.weight' is .* in channel 1"):
        check_quantizer(Quantizer(np.array([1, value], np.float32), axis=0), HERE)


@pytest.mark.parametrize(
    ("quantizer", "expected"),
    [
        (Quantizer(np.ones(3, np.float32), axis=0), r"is \[3\], expected \[2\]"),
        (Quantizer(np.ones(3, np.float32)), r"is \[3\], expected \[\]"),
        (Quantizer(np.ones((2, 3), np.float32), axis=1, block=4), r"is \[2, 3\], expected \[2, 2\]"),
        (Quantizer(np.ones(2, np.float32), axis=2), "axis 2, the tensor 2 axes"),
    ],
)
def test_a_scale_of_the_wrong_shape_is_named(quantizer: Quantizer, expected: str) -> None:
    with pytest.raises(GpusqError, match=expected):
        check_quantizer(quantizer, HERE, (2, 8))


def test_a_dead_channel_gets_a_positive_scale() -> None:
    assert revived(np.array([0, 0.5], np.float32)).tolist() == [1, 0.5]


def test_the_hint_for_unsigned_integers_says_what_would_be_exact() -> None:
    place, scale = Place("act", "output"), np.ones((), np.float32)
    with pytest.raises(GpusqError, match=r"'act\.output' .* integers 0 to 255") as caught:
        symmetric(Quantizer(scale, low=0, high=255), place)
    assert "7 bits" in caught.value.hint
    assert symmetric(Quantizer(scale, low=0, high=127), place).high == 127
