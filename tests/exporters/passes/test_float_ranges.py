"""FP32 islands that samples ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from calibration.ranges import measure_amax
from exporters.passes.float_islands import KEPT_KEY
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.passes.type_floats import TypeFloats

Array = npt.NDArray[np.float32]
Run = Callable[..., Array]
FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
ROWS = ", ".join("0.5" if row == column else "0" for row in range(16) for column in range(16))
RESIDUAL = f"""
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,16] x) => (float[N,16] y)
    <float[16,16] w = {{{ROWS}}}, float large = {{60000}}, float[16] gain = {{{", ".join(["1"] * 16)}}}>
    {{
        [fc1] a = MatMul(x, w)
        [up] b = Mul(a, large)
        [add] c = Add(b, x)
        [norm] n = LayerNormalization<axis=-1>(c, gain)
        [fc2] y = MatMul(n, w)
    }}
"""


def samples() -> Array:
    return np.random.default_rng(0).standard_normal((64, 16), np.float32)


def measured(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
    return measure_amax(model, names, {"x": samples()}, 64, check_finite=False)


def typed(text: str) -> tuple[ir.Model, Outcome]:
    model = ir.from_onnx_text(text)
    outcome = TypeFloats("float16", measured)(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model, outcome


def test_what_makes_and_reads_a_tensor_beyond_float16_stays_float32_and_is_told_with_its_amax() -> None:
    model, outcome = typed(RESIDUAL)
    amax = {name: float(np.abs(found).max()) for name, found in (("b", samples() * 30000), ("c", samples() * 30001))}
    told = {change.where: change.what for change in outcome.changes}
    assert told.keys() == amax.keys()
    assert all(f"reaches {amax[name]:g} on the samples" in told[name] for name in amax)
    found = {node.name: node.outputs[0].dtype for node in model.graph}
    assert [found[name] for name in ("fc1", "up", "add", "norm", "fc2")] == [FLOAT16, FLOAT, FLOAT, FLOAT, FLOAT16]


def test_answers_as_float32_where_float16_overflows(run: Run) -> None:
    x = samples()
    expected = run(ir.from_onnx_text(RESIDUAL), x=x)
    model, _ = typed(RESIDUAL)
    assert np.abs(run(model, x=x) - expected).max() <= 4e-3 * np.abs(expected).max()


def test_what_stays_within_half_the_range_of_float16_is_typed() -> None:
    largest = float(np.abs(samples()).max())
    for factor, wide in ((32000 / largest, []), (33000 / largest, ["b"])):
        text = RESIDUAL.replace("60000", str(2 * factor)).replace("Add(b, x)", "Neg(x)")
        _, outcome = typed(text)
        assert [change.where for change in outcome.changes] == wide


def test_a_constant_beyond_float16_is_no_error_where_samples_show_what_comes_of_it(run: Run) -> None:
    text = RESIDUAL.replace("60000", "70000")
    model, outcome = typed(text)
    assert Change("large", "beyond the range at 70000: what reads it stays float32") in outcome.changes
    expected = run(ir.from_onnx_text(text), x=samples())
    assert np.abs(run(model, x=samples()) - expected).max() <= 4e-3 * np.abs(expected).max()


def test_infinity_is_no_range() -> None:
    text = RESIDUAL.replace("Add(b, x)", "Log(zero)").replace("float large", "float[1] zero = {0}, float large")
    text = text.replace("LayerNormalization<axis=-1>(c, gain)", "Add(c, x)")
    _, outcome = typed(text)
    why = "its values are not all finite on the samples: it is typed all the same"
    assert {LeftAlone("c", why), LeftAlone("n", why)} <= set(outcome.left_alone)


@pytest.mark.parametrize("measure", [measured, None])
def test_a_second_run_changes_nothing_with_samples_or_without(measure: object) -> None:
    model, _ = typed(RESIDUAL)
    assert {node.name for node in model.graph if KEPT_KEY in node.metadata_props} == {"up", "add", "norm"}
    before = ir.to_proto(model)
    second = TypeFloats("float16", measured if measure else None)(model)
    assert (second.changed, second.changes) == (0, ())
    assert ir.to_proto(model) == before


def test_the_compiler_takes_the_island(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling ahead of time needs tensorrt-rtx")
    from deploy.ahead_of_time import compile_ahead
    from profiles.device import load_device

    ahead = load_device("a100").ahead_of_time
    assert ahead is not None
    kernels = {}
    for name, measure in (("short", None), ("island", measured)):
        model = ir.from_onnx_text(RESIDUAL)
        TypeFloats("float16", measure)(model)
        ir.save(model, tmp_path / f"{name}.onnx")
        plan = compile_ahead(tmp_path / f"{name}.onnx", ahead, graph=model).plan
        kernels[name] = len(plan.kernels)
        assert plan.gemms_by_type == {"Half": 2}
    assert kernels["island"] <= kernels["short"] + 1
