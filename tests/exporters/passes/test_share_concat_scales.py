from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.plan import read_plan
from deploy.tensorrt_api import ShapeRange, build_engine
from exporters.linears import array_of, scale_of
from exporters.passes.share_concat_scales import ShareConcatScales
from exporters.passes.type_floats import TypeFloats

Run = Callable[..., npt.NDArray[np.float32]]
X = np.random.default_rng(0).standard_normal((2, 32, 6, 6)).astype(np.float32)


def graph(*scales: float, read: str = "wd = DequantizeLinear<axis=0>(w, ws, wz) y = Conv(c, wd)") -> ir.Model:
    """x and Relu(x), quantized with two scales, joined, joined with x again by the third scale, if any, and read."""
    more = "t = Concat<axis=1>(c0, cd)" if len(scales) > 2 else "t = Identity(c0)"
    channels = 32 * len(scales)
    model = ir.from_onnx_text(f"""
        <ir_version: 11, opset_import: ["": 21]>
        g (float[N,32,6,6] x) => (float[N,16,6,6] y)
        <int8 z = {{0}}, {", ".join(f"float s{at} = {{{scale!r}}}" for at, scale in enumerate(scales))},
         float[16] ws, int8[16] wz, int8[16,{channels},1,1] w>
        {{
            [a] aq = QuantizeLinear(x, s0, z) ad = DequantizeLinear(aq, s0, z) r = Relu(x)
            [b] bq = QuantizeLinear(r, s1, z) bd = DequantizeLinear(bq, s1, z)
            {"[c] cq = QuantizeLinear(x, s2, z) cd = DequantizeLinear(cq, s2, z)" if len(scales) > 2 else ""}
            [join] c0 = Concat<axis=1>(ad, bd) {more.replace("t =", "[all] c =", 1)} {read}
        }}
    """)
    rng = np.random.default_rng(1)
    drawn: dict[str | None, npt.NDArray[np.generic]] = {
        "ws": np.full(16, 0.01, np.float32),
        "wz": np.zeros(16, np.int8),
        "w": rng.integers(-100, 100, (16, channels, 1, 1)).astype(np.int8),
    }
    for value in {value for node in model.graph for value in node.inputs if value is not None and value.name in drawn}:
        value.const_value = ir.tensor(drawn[value.name], name=value.name)
        model.graph.register_initializer(value)
    for node in [node for node in model.graph if node.op_type == "Identity"]:
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]
        model.graph.remove(node, safe=True)
    return model


def scales(model: ir.Model) -> Iterator[float]:
    """Those of the activations, of Q and DQ alike."""
    for node in model.graph:
        if node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and "axis" not in node.attributes):
            scale = scale_of(node)
            assert scale is not None
            yield float(scale)


@pytest.mark.parametrize("given", [(0.02, 0.03), (0.02, 0.03, 0.01)], ids=["two inputs", "joined twice"])
def test_the_largest_scale_is_that_of_all_where_it_is_asked_for(given: tuple[float, ...]) -> None:
    model = graph(*given)
    outcome = ShareConcatScales(asked=True)(model)
    assert set(scales(model)) == {float(np.float32(0.03))}
    assert [change.where for change in outcome.changes] == ["a", "c"][: len(given) - 1]
    assert outcome.changes[0].what == "scale 0.02 raised to 0.03, that of what it is joined with"
    once = ir.to_proto(model)
    assert ShareConcatScales(asked=True)(model).changed == 0
    assert ir.to_proto(model) == once


def test_it_is_told_and_nothing_changed_where_it_is_not_asked_for() -> None:
    model = graph(0.02, 0.03)
    before = ir.to_proto(model)
    outcome = ShareConcatScales()(model)
    assert [(left.where, left.why.split(",")[0]) for left in outcome.left_alone] == [
        ("join", "its inputs have 2 scales")
    ]
    assert ir.to_proto(model) == before


@pytest.mark.parametrize(
    "model",
    [
        graph(0.02, 0.02),
        graph(0.02, 0.03, read="y = Relu(c)"),
        graph(0.02, 0.03, read="q = QuantizeLinear(c, s0, z) d = DequantizeLinear(q, s0, z) y = Conv(d, w)"),
        graph(0.02, 0.03, read="wd = DequantizeLinear<axis=0>(w, ws, wz) v = Reshape(aq, z) y = Conv(c, wd)"),
    ],
    ids=["equal scales", "no layer behind", "a quantizer behind", "integers that are moved"],
)
def test_others_stay_as_they_are(model: ir.Model) -> None:
    before = ir.to_proto(model)
    outcome = ShareConcatScales(asked=True)(model)
    assert (outcome.changed, outcome.left_alone) == (0, ())
    assert ir.to_proto(model) == before


@settings(deadline=None, max_examples=20)
@given(st.tuples(st.floats(0.01, 0.1), st.floats(0.01, 0.1)))
def test_each_value_moves_by_half_a_step_of_both_scales_at_most(given: tuple[float, float]) -> None:
    """And no more is cut off than by the scale that it had."""
    first, second = (np.float32(scale) for scale in given)
    for own in (first, second):
        largest = max(first, second)
        before, after = (np.clip(np.rint(X / s), -128, 127) * s for s in (own, largest))
        within = np.abs(X) <= 127 * own
        assert (np.abs(after - before)[within] <= (own + largest) / 2 * np.float32(1.001)).all()
        assert (np.abs(after - X) <= np.maximum(np.abs(before - X), largest / 2) * np.float32(1.001)).all()


def test_the_answers_stay_within_the_new_steps(run: Run) -> None:
    """Each input of x by half of both steps at most, times its weight; the other half of the inputs is as it was."""
    model = graph(0.02, 0.03)
    x = np.clip(X, -2.5, 2.5)  # what neither scale cuts off
    weight = np.abs(array_of(model.graph.initializers["w"]).astype(np.float32)[:, :32, 0, 0] * np.float32(0.01))
    before = run(model, x=x)
    ShareConcatScales(asked=True)(model)
    moved = np.abs(run(model, x=x) - before).max(axis=(0, 2, 3))
    assert (moved > 0).all()
    assert (moved <= weight.sum(axis=1) * np.float32(0.05 / 2)).all()


def test_the_layer_behind_becomes_int8(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling ahead of time needs tensorrt-rtx")
    assert convolutions(graph(0.02, 0.03), tmp_path) == {"Half": 1}
    assert convolutions(graph(0.03, 0.03), tmp_path) == {"Int8": 1}


def convolutions(model: ir.Model, folder: Path) -> dict[str, int]:
    TypeFloats("float16")(model)
    ir.save(model, folder / "model.onnx")
    built = build_engine(folder / "model.onnx", "tensorrt-rtx", compute_capability="SM80", batch=ShapeRange(1, 2, 4))
    plan = read_plan(built.log, model, source=built.runtime, target="SM80")
    return plan.convolutions_by_type or plan.gemms_by_type
