from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from exporters.passes.outcome import Change
from exporters.passes.type_floats import TypeFloats
from profiles.errors import GpusqError

Run = Callable[..., npt.NDArray[np.float32]]
FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16

ROTARY = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[1,2,N,8] q, int64[1,N] positions) => (float[1,2,N,8] y)
    <float[4] frequencies = {1, 0.1, 0.01, 0.001}, int64[1] last = {-1}, int64[1,N,1] column, float[1,N,1] whole>
    {
        [column] column = Unsqueeze(positions, last)
        [cast] whole = Cast<to=1>(column)
        [angle] angle = Mul(whole, frequencies)
        [cos] cos = Cos(angle)
        [sin] sin = Sin(angle)
        [rotary] y = RotaryEmbedding(q, cos, sin)
    }
"""
MASKED = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] scores, int64[N,4] mask) => (float[N,4] y)
    <float one = {1}, float low = {-1000000000}, float[4] b = {1, 2, 3, 4}, float[N,4] kept>
    {
        [cast] kept = Cast<to=1>(mask)
        [not] masked = Sub(one, kept)
        [low] bias = Mul(masked, low)
        [add] sum = Add(scores, bias)
        [softmax] p = Softmax<axis=-1>(sum)
        [out] y = Mul(p, b)
    }
"""


def typed(text: str) -> ir.Model:
    model = ir.from_onnx_text(text)
    TypeFloats("float16")(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {node.name or "": node.outputs[0].dtype for node in model.graph}


def single(body: str, constants: str, opset: int = 23) -> str:
    return f"""
        <ir_version: 11, opset_import: ["": {opset}]>
        g (float[N,4] x) => (float[N,4] y) <{constants}> {{ {body} }}
    """


def test_angles_of_positions_stay_float32_up_to_their_sine_and_cosine() -> None:
    model = ir.from_onnx_text(ROTARY)
    outcome = TypeFloats("float16")(model)
    assert outcome.changes == (Change("cast", "computed from integers: 4 nodes stay float32"),)
    found = types(model)
    assert [found[name] for name in ("cast", "angle", "cos", "sin")] == [FLOAT] * 4
    assert found["rotary"] == FLOAT16
    assert model.graph.initializers["frequencies"].dtype == FLOAT


def test_rotates_as_float32_does_far_behind_the_whole_numbers_of_float16(run: Run) -> None:
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        "q": rng.standard_normal((1, 2, 64, 8), np.float32),
        "positions": np.arange(4001, 4065, dtype=np.int64)[None],  # float16 rounds the odd ones of these
    }
    expected = run(ir.from_onnx_text(ROTARY), **feeds)
    assert np.abs(run(typed(ROTARY), **feeds) - expected).max() <= 4e-3 * np.abs(expected).max()


def test_a_pixel_in_eight_bits_is_no_reason_for_float32() -> None:
    model = typed("""
        <ir_version: 11, opset_import: ["": 23]>
        g (uint8[N,2] i) => (float[N,2] y) <float half = {0.5}, float[N,2] f> { f = Cast<to=1>(i)  y = Mul(f, half) }
    """)
    assert [node.outputs[0].dtype for node in model.graph] == [FLOAT16, FLOAT16, FLOAT]


def test_a_layer_ends_what_is_computed_from_integers() -> None:
    model = typed("""
        <ir_version: 11, opset_import: ["": 23]>
        g (int64[N,2] i) => (float[N,2] y)
        <float tenth = {0.1}, float[2,2] w = {1, 2, 3, 4}, float[N,2] f>
        { [cast] f = Cast<to=1>(i) [scale] s = Mul(f, tenth) [fc] y = MatMul(s, w) }
    """)
    found = types(model)
    assert (found["scale"], found["fc"], model.graph.initializers["w"].dtype) == (FLOAT, FLOAT16, FLOAT16)


def test_a_constant_beyond_float16_stays_where_a_softmax_bounds_what_is_made_with_it(run: Run) -> None:
    model = typed(MASKED)
    found = types(model)
    assert [found[name] for name in ("low", "add", "softmax")] == [FLOAT] * 3
    assert found["out"] == FLOAT16
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (8, 4))
    mask[:, 0] = 1
    feeds: dict[str, Any] = {"scores": rng.standard_normal((8, 4), np.float32), "mask": mask}
    expected = run(ir.from_onnx_text(MASKED), **feeds)
    assert np.abs(run(model, **feeds) - expected).max() <= 4e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("[op] c = Clip(x, low, high) [out] y = Mul(c, two)", "float low = {-3e38}, float high = {3e38}"),
        ("[op] c = Div(x, million) [out] y = Mul(c, two)", "float million = {1000000}"),
        ("[less] l = Less(x, million) [op] c = Where(l, x, two) [out] y = Mul(c, two)", "float million = {1000000}"),
    ],
)
def test_what_a_limit_or_a_divisor_bounds_is_typed_again_behind_it(body: str, constants: str, run: Run) -> None:
    text = single(body, f"{constants}, float two = {{2}}")
    model = typed(text)
    assert types(model)["out"] == FLOAT16
    x = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    expected = run(ir.from_onnx_text(text), x=x)
    assert np.abs(run(model, x=x) - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    "body",
    [
        "[op] b = Mul(x, million) [fc] m = MatMul(b, w) [out] y = Relu(m)",
        "[op] b = Mul(w, million) [fc] m = MatMul(x, b) [out] y = Relu(m)",
    ],
)
def test_a_constant_whose_effect_nothing_bounds_is_an_error(body: str) -> None:
    constants = f"float million = {{1000000}}, float[4,4] w = {{{', '.join(['1'] * 16)}}}"
    with pytest.raises(GpusqError, match=r"^constant 'million' holds 1e\+06, beyond the range of float16$"):
        typed(single(body, constants))


@pytest.mark.parametrize("text", [ROTARY, MASKED])
def test_a_second_run_changes_nothing(text: str) -> None:
    model = typed(text)
    before = ir.to_proto(model)
    second = TypeFloats("float16")(model)
    assert (second.changed, second.changes) == (0, ())
    assert ir.to_proto(model) == before


def test_a_node_with_graphs_inside_reads_and_gives_float32(run: Run) -> None:
    text = """
        <ir_version: 11, opset_import: ["": 23]>
        g (float[4] x, bool b) => (float[4] y) <float two = {2}, float[4] i>
        {
            [before] h = Mul(x, two)
            [if] i = If<
                then_branch = t () => (float[4] a) { a = Neg(h) },
                else_branch = e () => (float[4] c) { c = Mul(h, two) }
            >(b)
            [out] y = Mul(i, two)
        }
    """
    model = typed(text)
    found = types(model)
    assert (found["before"], found["if"], found["out"]) == (FLOAT16, FLOAT, FLOAT16)
    for branch in (True, False):
        feeds: dict[str, Any] = {"x": np.array([1, 2, 3, 4], np.float32), "b": np.array(branch)}
        assert run(model, **feeds).tolist() == run(ir.from_onnx_text(text), **feeds).tolist()
