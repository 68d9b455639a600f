from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporters.attention_mask import (
    LOWEST,
    MASKED,
    add_masks,
    excluded,
    is_neutral,
    known_mask,
    masks_a_query,
    scaled,
    storable,
)

Array = npt.NDArray[np.float32]
Run = Callable[..., npt.NDArray[np.float32]]
LOWEST_FLOAT = float(np.finfo(np.float32).min)
SLOW = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])

# What Hugging Face's Swin adds to its scores: a bias and, for each window of an image, a mask.
WINDOWS = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[B,1] x) => (float[BW,H,N,N] y)
    <float[1,H,N,N] bias, float[1,W,1,N,N] windows, int64[1] zero = {0}, int64[4] lengths = {W, 1, N, N},
     int64[4] merged = {-1, 1, N, N}, float[B,W,1,N,N] repeated, float[BW,1,N,N] flat>
    {
        batch = Shape<start=0, end=1>(x)
        shape = Concat<axis=0>(batch, lengths)
        repeated = Expand(windows, shape)
        flat = Reshape(repeated, merged)
        y = Add(bias, flat)
    }
"""


def windows_model(heads: int, windows: int, tokens: int) -> ir.Model:
    """WINDOWS with random constants."""
    text = WINDOWS.replace("BW", "?").replace("W", str(windows)).replace("H", str(heads)).replace("N", str(tokens))
    random = np.random.default_rng(0)
    bias = random.standard_normal((1, heads, tokens, tokens), np.float32)
    mask = np.where(random.random((1, windows, 1, tokens, tokens)) < 0.3, np.float32(-100), np.float32(0))
    return with_constants(ir.from_onnx_text(text.replace("?", "BW")), bias=bias, windows=mask)


def with_constants(model: ir.Model, **arrays: npt.NDArray[np.generic]) -> ir.Model:
    for name, array in arrays.items():
        value = next(value for node in model.graph for value in node.inputs if value is not None and value.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
        model.graph.register_initializer(value)
    return model


def output(model: ir.Model) -> ir.Value:
    return model.graph.outputs[0]


def mask_of(body: str, *, constants: str, result: str = "float[B,2,3,4]", opset: int = 23) -> Array | None:
    """The mask that `body` makes of `constants`, beside an input x [B, 2, 3, 4]."""
    text = f"""
        <ir_version: 11, opset_import: ["": {opset}]>
        g (float[B,2,3,4] x) => ({result} y) <{constants}> {{ {body} }}
    """
    return known_mask(output(ir.from_onnx_text(text)))


@SLOW
@given(heads=st.integers(1, 3), windows=st.integers(1, 5), tokens=st.integers(1, 4), batch=st.integers(1, 3))
def test_windows_repeat_along_the_batch_as_onnxruntime_repeats_them(
    run: Run, heads: int, windows: int, tokens: int, batch: int
) -> None:
    model = windows_model(heads, windows, tokens)
    found = known_mask(output(model))
    assert found is not None
    assert found.shape == (windows, heads, tokens, tokens)
    computed = run(model, x=np.zeros((batch, 1), np.float32))
    assert np.array_equal(np.tile(found, (batch, 1, 1, 1)), computed)  # sums of two numbers: exact


@pytest.mark.parametrize(
    ("body", "constants", "shape"),
    [
        ("y = Identity(m)", "float[3,4] m = {0,1,2,3,4,5,6,7,8,9,10,11}", (1, 1, 3, 4)),
        ("y = Identity(m)", "float[2,1,4] m = {0,1,2,3,4,5,6,7}", (1, 2, 1, 4)),
        ("y = Identity(m)", "float m = {1.5}", (1, 1, 1, 1)),
        ("y = Cast<to=1>(m)", "int64[1,1,1,4] m = {0, -10000, 0, 0}", (1, 1, 1, 4)),
        ("h = Cast<to=10>(m) y = Cast<to=1>(h)", "float[4] m = {0, 1, 2, 3}, float16[4] h", (1, 1, 1, 4)),
        ("y = Expand(m, s)", "float[1,1,1,4] m = {0,1,2,3}, int64[4] s = {1,2,3,4}", (1, 1, 1, 4)),
        ("y = Add(m, n)", "float[3,1] m = {0,1,2}, float[2,1,4] n = {0,1,2,3,4,5,6,7}", (1, 2, 3, 4)),
    ],
    ids=["2-D", "3-D", "scalar", "of integers", "through float16", "repeated", "sum of two ranks"],
)
def test_is_what_onnxruntime_computes(run: Run, body: str, constants: str, shape: tuple[int, ...]) -> None:
    """Exact: the values are small integers."""
    text = f"""
        <ir_version: 11, opset_import: ["": 23]>
        g (float[B,2,3,4] x) => (float[B,2,3,4] z)
        <{constants}, float[1,2,3,4] y>
        {{ {body} z = Add(x, y) }}
    """
    model = ir.from_onnx_text(text)
    found = known_mask(next(value for node in model.graph for value in node.outputs if value.name == "y"))
    assert found is not None
    assert found.shape == shape
    zeros = np.zeros((2, 2, 3, 4), np.float32)
    assert np.array_equal(run(model, x=zeros), zeros + found)


@pytest.mark.parametrize(
    ("body", "constants", "result"),
    [
        ("y = Identity(x)", "float m = {0}", "float[B,2,3,4]"),
        ("y = Add(x, m)", "float m = {0}", "float[B,2,3,4]"),
        ("y = Relu(m)", "float[3,4] m = {0,0,0,0,0,0,0,0,0,0,0,0}", "float[3,4]"),
        ("y = Cast<to=1>(m)", "bool[4] m = {1, 0, 1, 1}", "float[4]"),
        ("y = Cast<to=9>(m)", "float[4] m = {1, 0, 1, 1}", "bool[4]"),
        ("y = Cast<to=6>(m)", "float[4] m = {1.5, 0, 1, 1}", "int32[4]"),
        ("y = Reshape(m, s)", "float[1,2,1,1,4] m = {0,1,2,3,4,5,6,7}, int64[4] s = {1,2,1,4}", "float[1,2,1,4]"),
        ("y = Identity(m)", "float[1,1,2,1,4] m = {0,1,2,3,4,5,6,7}", "float[1,1,2,1,4]"),
        ("y = Identity(m)", "float[1,0] m = {}", "float[1,0]"),
    ],
    ids=[
        "an input", "a sum with one", "an operator that is not followed", "true is 1 when it is added",
        "not 0 is true", "rounded", "windows that a reshape moves into another axis", "5-D", "empty",
    ],
)  # fmt: skip
def test_is_unknown(body: str, constants: str, result: str) -> None:
    assert mask_of(body, constants=constants, result=result) is None


def test_a_reshape_that_moves_windows_among_queries_is_not_followed() -> None:
    """[B, 4, 1, 1, 6] as [2·B, 1, 2, 6]: the last axis alone fits, and each query has another window."""
    body = "e = Expand(m, s) y = Reshape(e, r)"
    constants = """float[1,4,1,1,2] m = {0,1,2,3,4,5,6,7}, int64[5] s = {3,4,1,1,2}, int64[4] r = {6,1,2,2},
                   float[3,4,1,1,2] e"""
    assert mask_of(body, constants=constants, result="float[6,1,2,2]") is None


def test_an_input_with_a_default_is_no_constant() -> None:
    text = """
        <ir_version: 11, opset_import: ["": 23]>
        g (float[1,4] m = {0,1,2,3}) => (float[1,4] y) { y = Identity(m) }
    """
    assert known_mask(output(ir.from_onnx_text(text))) is None


def test_an_operator_of_another_domain_is_unknown() -> None:
    text = """
        <ir_version: 11, opset_import: ["": 23, "other": 1]>
        g (float[1] x) => (float[1,4] y) <float[1,4] m = {0,1,2,3}> { y = other.Identity(m) }
    """
    assert known_mask(output(ir.from_onnx_text(text))) is None


def test_three_axes_are_batch_and_heads_in_one() -> None:
    text = """
        <ir_version: 11, opset_import: ["": 23]>
        g (float[1] x) => (float[2,1,4] y) <float[2,1,4] m = {0,1,2,3,4,5,6,7}> { y = Identity(m) }
    """
    value = output(ir.from_onnx_text(text))
    three, four = known_mask(value, 3), known_mask(value)
    assert three is not None
    assert four is not None
    assert (three.shape, four.shape) == ((2, 1, 1, 4), (1, 2, 1, 4))
    assert np.array_equal(three.ravel(), four.ravel())


def test_five_axes_are_images_and_their_windows() -> None:
    text = """
        <ir_version: 11, opset_import: ["": 23]>
        g (float[1] x) => (float[SHAPE] y) <float[SHAPE] m = {0,1,2,3,4,5,6,7}> { y = Identity(m) }
    """
    windows = known_mask(output(ir.from_onnx_text(text.replace("SHAPE", "1,2,1,1,4"))), 5)
    assert windows is not None
    assert windows.shape == (2, 1, 1, 4)
    assert known_mask(output(ir.from_onnx_text(text.replace("SHAPE", "2,1,1,1,4"))), 5) is None


def test_a_boolean_takes_part_or_is_excluded() -> None:
    text = """
        <ir_version: 11, opset_import: ["": 23]>
        g (float[1] x) => (bool[4] y) <bool[4] m = {1, 0, 1, 1}> { y = Identity(m) }
    """
    found = known_mask(output(ir.from_onnx_text(text)))
    assert found is not None
    assert found.ravel().tolist() == [0, -np.inf, 0, 0]
    assert excluded(found).ravel().tolist() == [-np.inf, 0, -np.inf, -np.inf]
    assert np.array_equal(excluded(excluded(found)), found)


def test_a_double_beyond_float32_is_infinite_without_a_warning() -> None:
    text = """
        <ir_version: 11, opset_import: ["": 23]>
        g (float[1] x) => (double[2] y) <double[2] m = {0, -1e300}> { y = Identity(m) }
    """
    found = known_mask(output(ir.from_onnx_text(text)))
    assert found is not None
    assert found.ravel().tolist() == [0, -np.inf]


masks = st.tuples(*[st.integers(1, 4)] * 4).flatmap(
    lambda shape: st.lists(
        st.sampled_from([0.0, 1.0, -2.5, -100.0, -10000.0, LOWEST_FLOAT, -np.inf]),
        min_size=int(np.prod(shape)),
        max_size=int(np.prod(shape)),
    ).map(lambda values: np.array(values, np.float32).reshape(shape))
)


@given(first=masks, second=masks)
def test_a_sum_of_masks_is_that_of_each_entry_of_a_batch(first: Array, second: Array) -> None:
    """Exact: each entry is one float32 sum."""
    total = add_masks(first, second)
    fit = all(1 in (a, b) or a == b for a, b in zip(first.shape[1:], second.shape[1:], strict=True))
    assert (total is not None) == fit
    if total is None:
        return
    for entry in range(len(total) + 2):
        with np.errstate(over="ignore"):
            expected = first[entry % len(first)] + second[entry % len(second)]
        assert np.array_equal(total[entry % len(total)], expected)


@given(mask=masks, scores=st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=4))
def test_what_is_stored_gives_the_same_probabilities(mask: Array, scores: list[float]) -> None:
    """Within 1e-3: a score on top of a bias of -10000 is rounded to 2^-10."""
    if masks_a_query(mask):
        return
    exact = np.array(scores[: mask.shape[-1]], np.float32) + mask
    stored = np.array(scores[: mask.shape[-1]], np.float32) + storable(mask)
    assert np.abs(softmax(exact) - softmax(stored)).max() <= 1e-3
    assert float(np.float16(storable(mask).min())) == storable(mask).min() or storable(mask).min() > LOWEST


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)


@pytest.mark.parametrize(
    ("mask", "neutral"),
    [
        ([[0, 0], [0, 0]], True),
        ([[3, 3], [-5, -5]], True),
        ([[0, 1], [0, 0]], False),
        ([[0], [1]], True),
        ([[0, np.nan]], False),
        ([[np.nan, np.nan]], False),
    ],
    ids=["zeros", "another number for each query", "one that differs", "a number for each query", "NaN", "all NaN"],
)
def test_what_softmax_does_not_see_is_neutral(mask: list[list[float]], neutral: bool) -> None:
    assert is_neutral(np.array([[mask]], np.float32)) == neutral


@pytest.mark.parametrize(
    ("row", "masked"),
    [
        ([0, -np.inf], False),
        ([-np.inf, -np.inf], True),
        ([LOWEST_FLOAT, LOWEST_FLOAT], True),
        ([-10000, LOWEST_FLOAT], True),
        ([-100, -100], False),
        ([-9999, LOWEST_FLOAT], False),
        ([0, np.nan], True),
        ([0, np.inf], True),
    ],
)
def test_tells_a_query_without_keys(row: list[float], masked: bool) -> None:
    assert masks_a_query(np.array([[[[0, 0], row]]], np.float32)) == masked


def test_scaling_overflows_to_minus_infinity_without_a_warning() -> None:
    assert scaled(np.full((1, 1, 1, 1), LOWEST_FLOAT, np.float32), 2).item() == -np.inf


def test_a_sum_that_would_take_too_much_memory_is_none() -> None:
    first, second = np.zeros((8191, 1, 1, 128), np.float32), np.zeros((127, 1, 128, 1), np.float32)
    assert add_masks(first, second) is None


def test_lowest_is_a_float16_number_far_below_masked() -> None:
    assert np.float16(LOWEST) == LOWEST
    assert np.exp(LOWEST - MASKED) == 0
