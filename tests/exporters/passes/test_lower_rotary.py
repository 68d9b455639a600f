from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from exporters.passes.lower_rotary import LowerRotary
from exporters.passes.outcome import LeftAlone
from exporters.passes.set_opset import SetOpset

Run = Callable[..., npt.NDArray[Any]]
HALVES = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[2,3,N,8] x, float[2,N,4] cos, float[2,N,4] sin) => (float[2,3,N,8] y)
    { [rotary] y = RotaryEmbedding(x, cos, sin) }
"""
PAIRS = HALVES.replace("RotaryEmbedding(", "RotaryEmbedding<interleaved = 1>(")
POSITIONS = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[2,3,N,8] x, float[16,4] cos, float[16,4] sin, int64[2,N] positions) => (float[2,3,N,8] y)
    { [rotary] y = RotaryEmbedding(x, cos, sin, positions) }
"""


def feeds(text: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shape = (16, 4) if text == POSITIONS else (2, 5, 4)
    angles = rng.standard_normal(shape, np.float32)
    found = {"x": rng.standard_normal((2, 3, 5, 8), np.float32), "cos": np.cos(angles), "sin": np.sin(angles)}
    return found | ({"positions": rng.integers(0, 16, (2, 5))} if text == POSITIONS else {})


@pytest.mark.parametrize("text", [HALVES, PAIRS, POSITIONS])
def test_gives_the_same_numbers_at_an_opset_without_the_operator(text: str, run: Run) -> None:
    model = ir.from_onnx_text(text)
    assert LowerRotary()(model).changed == 1
    assert "RotaryEmbedding" not in {node.op_type for node in model.graph}
    SetOpset(20)(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    expected = run(ir.from_onnx_text(text), **feeds(text))
    assert np.abs(run(model, **feeds(text)) - expected).max() <= 1e-6


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("Embedding(", "Embedding<rotary_embedding_dim = 4>(", "it turns a part of each head only"),
        ("float[2,3,N,8] x", "float[2,N,24] x", "its input is not 4-D with a known head size"),
    ],
)
def test_others_are_left_alone(old: str, new: str, why: str) -> None:
    model = ir.from_onnx_text(HALVES.replace(old, new))
    outcome = LowerRotary()(model)
    assert (outcome.changed, outcome.left_alone) == (0, (LeftAlone("rotary", why),))


@pytest.mark.parametrize("text", [HALVES, PAIRS, POSITIONS])
def test_a_second_run_changes_nothing(text: str) -> None:
    model = ir.from_onnx_text(text)
    LowerRotary()(model)
    before = ir.to_proto(model)
    assert LowerRotary()(model).changed == 0
    assert ir.to_proto(model) == before
