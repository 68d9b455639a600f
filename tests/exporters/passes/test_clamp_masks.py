from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from deploy.tensorrt_api import ShapeRange, build_engine
from exporters.passes.clamp_masks import ClampMasks
from exporters.passes.fold_constants import FoldConstants
from exporters.passes.type_floats import TypeFloats

Run = Callable[..., npt.NDArray[np.float32]]

# As T5, Llama and others of transformers: a boolean mask chooses between 0 and the lowest float32.
CHOSEN = """
<ir_version: 10, opset_import: ["" : 23]>
chosen (float[2, 2, 4, 16] q, float[2, 2, 4, 16] k, float[2, 2, 4, 16] v, bool[2, 1, 1, 4] mask) =>
 (float[2, 2, 4, 16] y)
<float zero = {0}, float low = {LOW}, float[1, 2, 4, 4] bias = {BIAS}>
{
   masked = Where(mask, zero, low)
   added = Add(masked, bias)
   y = Attention(q, k, v, added)
}
""".replace("{BIAS}", "{" + ", ".join(str(i / 10) for i in range(32)) + "}")

# As BERT: what the mask leaves is multiplied by the lowest float32.
MULTIPLIED = """
<ir_version: 8, opset_import: ["" : 14]>
multiplied (float[2, 2, 4, 16] q, float[2, 2, 4, 16] k, float[2, 2, 4, 16] v, TYPE[2, 4] mask) =>
 (float[2, 2, 4, 16] y)
<float one = {1}, float low = {LOW}, int64[2] axes = {1, 2}>
{
   wide = Unsqueeze(mask, axes)
   kept = Cast<to = 1>(wide)
   masked = Sub(one, kept)
   added = Mul(masked, low)
   kt = Transpose<perm = [0, 1, 3, 2]>(k)
   products = MatMul(q, kt)
   scores = Add(products, added)
   weights = Softmax<axis = -1>(scores)
   y = MatMul(weights, v)
}
"""

LOWEST_FLOAT = "-3.4028234663852886e38"


def graph(text: str, low: str = LOWEST_FLOAT, dtype: str = "int64") -> ir.Model:
    model = ir.from_onnx_text(text.replace("LOW", low).replace("TYPE", dtype))
    FoldConstants()(model)  # infers types
    return model


def inputs(dtype: type[np.generic], *shape: int) -> dict[str, npt.NDArray[np.generic]]:
    mask = np.ones((2, 4), dtype)
    mask[0, 3] = mask[1, 1] = 0
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 2, 4, 16), np.float32)
    return {"q": q, "k": k, "v": v, "mask": mask.reshape(shape or mask.shape)}


@pytest.mark.parametrize(("text", "given"), [(CHOSEN, inputs(np.bool_, 2, 1, 1, 4)), (MULTIPLIED, inputs(np.int64))])
def test_a_mask_becomes_one_that_float16_holds_with_the_same_numbers(
    text: str, given: dict[str, npt.NDArray[np.generic]], run: Run
) -> None:
    model = graph(text)
    expected = run(model, **given)
    assert ClampMasks()(model).changed == 1
    assert np.array_equal(run(model, **given), expected)
    assert ClampMasks()(model).changed == 0
    outcome = TypeFloats("float16")(model)
    assert not any("beyond the range" in change.what for change in outcome.changes)
    assert np.abs(run(model, **given) - expected).max() <= 4e-3


def test_minus_infinity_becomes_finite(run: Run) -> None:
    model = graph(CHOSEN)
    model.graph.initializers["low"].const_value = ir.tensor(np.asarray(-np.inf, np.float32), name="low")
    given = inputs(np.bool_, 2, 1, 1, 4)
    expected = run(model, **given)
    assert ClampMasks()(model).changed == 1
    assert np.array_equal(run(model, **given), expected)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (graph(MULTIPLIED, dtype="float"), "it is multiplied by what may lie between 0 and 1"),
        (graph(MULTIPLIED.replace("Softmax<axis = -1>(scores)", "Sigmoid(scores)")), "a Sigmoid reads it"),
        (
            graph(CHOSEN.replace(" (float[2, 2, 4, 16] y)", " (float[2, 2, 4, 4] added, float[2, 2, 4, 16] y)")),
            "it reaches an output of the graph",
        ),
        (graph(CHOSEN.replace("Add(masked, bias)", "Div(bias, masked)")), "a Div reads it"),
    ],
)
def test_a_constant_that_does_more_is_left_alone_with_the_reason(model: ir.Model, why: str) -> None:
    outcome = ClampMasks()(model)
    assert outcome.changed == 0
    assert [left.why for left in outcome.left_alone] == [why]
    assert [left.where for left in outcome.left_alone] == ["low"]


def test_what_float16_holds_stays() -> None:
    model = graph(CHOSEN, low="-65504")
    outcome = ClampMasks()(model)
    assert (outcome.changed, outcome.left_alone) == (0, ())


def test_tensorrt_compiles_what_it_makes(tmp_path: Path) -> None:
    model = graph(CHOSEN)
    ClampMasks()(model)
    TypeFloats("float16")(model)
    ir.save(model, tmp_path / "model.onnx")
    build_engine(tmp_path / "model.onnx", "tensorrt-rtx", compute_capability="SM80", batch=ShapeRange(2, 2, 2))
