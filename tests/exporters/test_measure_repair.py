"""The repair of Q/DQ, on a student of each kind of trained scales and on the output of other tools.

What a step is, and what is compared with what, stands in `measure_repair.py`, which prints the table of full models
and of a student of every source. Students of one network with quantizers in the same places repair and compile alike,
and each library has its loader's tests; so a transformer, a CNN and the project's own student stand here.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporters.graph_student import read_graph
from exporters.save_onnx import save_onnx
from tests.exporters import qdq_students
from tests.exporters.measure_repair import (
    Differences,
    Repaired,
    answer,
    differences,
    kernels,
    quantizers,
    repaired,
    scales_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

COUNT = 64
SAME = 1.001  # a step, and the rounding of float32 beside it
# The noise of quantizers that stay, on so many outputs, is not exactly the same when that of others is gone.
NO_WORSE = 1.05
# The kernels before and after, sm80 in FP16; None: the compiler refuses the graph as it came.
COMPILED = {"ModelOpt": (26, 25), "torch.ao FX": (9, 9), "gpusq": (27, 27)}
BY_TOOLS: dict[tuple[str, str], tuple[int | None, int]] = {
    ("DeiT-S", "onnxruntime"): (27, 25),
    ("Swin-T", "onnxruntime"): (None, 48),
    ("MobileNetV2", "onnxruntime"): (35, 35),
    ("DeiT-S", "ModelOpt"): (26, 25),
    ("Swin-T", "ModelOpt"): (71, 50),
    ("MobileNetV2", "ModelOpt"): (35, 35),
}
compiles = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="compiling ahead of time needs tensorrt-rtx"
)


@cache
def student(source: str) -> ir.Model:
    return qdq_students.TRAINED[source]()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], ir.Model]:
    """The small models by the tools that are there."""
    found, folder = {}, tmp_path_factory.mktemp("tools")
    tools = [tool for tool in qdq_students.TOOLS if tool == "onnxruntime" or os.environ.get(qdq_students.MODELOPT)]
    for name in dict.fromkeys(name for name, _ in BY_TOOLS):
        save_onnx(qdq_students.small_graph(name), source := folder / f"{name}.onnx")
        for tool in tools:
            qdq_students.TOOLS[tool](source, target := Path(folder / f"{name}.{tool}.onnx"))
            found[name, tool] = read_graph(target).export().model
    return found


def assert_repaired(model: ir.Model, count: int) -> tuple[Repaired, Differences]:
    """Assert that no trained scale is lost or changed, and that the outputs are the same within one step."""
    found = repaired(model)
    before, after = scales_of(found.before), scales_of(found.after)
    assert after.channels == before.channels
    assert after.activations.keys() <= before.activations.keys()
    assert after.shared <= before.shared
    assert quantizers(found.after) <= quantizers(found.before)
    told = differences(found, qdq_students.samples_of(model, count))
    assert told.cut <= SAME
    assert told.floats <= 0.01
    assert told.noise_after <= NO_WORSE * told.noise_before
    if not found.removed:
        assert told.before <= SAME
    return found, told


@pytest.mark.parametrize("source", COMPILED)
def test_a_trained_student_keeps_its_scales_and_answers_within_a_step(source: str) -> None:
    found, told = assert_repaired(student(source), COUNT)
    assert len(scales_of(found.before).channels) > 0
    assert told.noise_before > 0  # its quantizers take part in what is compared
    lost = quantizers(found.before) - quantizers(found.after)
    assert len(found.changes) >= len(lost)  # each is told


@compiles
@pytest.mark.parametrize("source", COMPILED)
def test_a_trained_student_compiles_to_no_more_kernels_than_were_reached(source: str) -> None:
    before, after = COMPILED[source]
    assert kernels(student(source), repair=False) == before
    repaired_count = kernels(student(source), repair=True)
    assert repaired_count is not None
    assert repaired_count <= after


def test_what_another_tool_quantized_keeps_its_scales_and_answers_within_a_step(
    quantized: dict[tuple[str, str], ir.Model],
) -> None:
    for (name, tool), model in quantized.items():
        found, _ = assert_repaired(model, 8)
        assert bool(found.removed) == ((name, tool) != ("MobileNetV2", "ModelOpt"))


@compiles
def test_what_another_tool_quantized_compiles_to_no_more_kernels_than_were_reached(
    quantized: dict[tuple[str, str], ir.Model],
) -> None:
    for key, model in quantized.items():
        before, after = kernels(model, repair=False), kernels(model, repair=True)
        print(key, before, after)
        assert before == BY_TOOLS[key][0]
        assert after is not None
        assert after <= BY_TOOLS[key][1]


def test_an_identity_between_float16_operators_changes_no_answer() -> None:
    """onnxruntime alone would round once more there."""
    text = """
        <ir_version: 10, opset_import: ["": 21]>
        g (float16[64,64] x) => (float16[64,64] y) <float16[64,64] p, float16[64,64] q>
        { p = MatMul(x, x) q = Identity(p) y = Add(q, x) }
    """
    feeds = {"x": np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)}
    found, without = (answer(ir.from_onnx_text(each), feeds) for each in (text, text.replace("Add(q", "Add(p")))
    assert np.array_equal(found, without)
    assert found.dtype == np.float32
