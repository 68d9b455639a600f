from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.compiled_kernels import read_kernels
from deploy.tensorrt_api import ShapeRange, build_engine
from exporters.passes.fix_shapes import FixShapes
from exporters.passes.fold_constants import FoldConstants
from exporters.passes.share_key_heads import ShareKeyHeads
from exporters.passes.type_floats import TypeFloats

Run = Callable[..., npt.NDArray[np.float32]]

# repeat_kv of transformers, as torch's exporter writes it; `total` is the length of the cache after the step.
REPEATED = """
<ir_version: 10, opset_import: ["" : 23]>
grouped (float[batch, HEADS, new, 16] q, float[batch, SHARED, total, 16] k, float[batch, SHARED, total, 16] v) =>
 (float[batch, HEADS, new, 16] y)
<int64[1] axis = {2}, int64[1] shared = {SHARED}, int64[1] groups = {GROUPS}, int64[1] heads = {HEADS},
 int64[1] size = {16}>
{
   batch = Shape<start = 0, end = 1>(k)
   total = Shape<start = 2, end = 3>(k)
   wide = Concat<axis = 0>(batch, shared, groups, total, size)
   merged = Concat<axis = 0>(batch, heads, total, size)
   k5 = Unsqueeze(k, axis)
   ke = Expand(k5, wide)
   kr = Reshape(ke, merged)
   v5 = Unsqueeze(v, axis)
   ve = Expand(v5, wide)
   vr = Reshape(ve, merged)
   y = Attention(q, kr, vr)
}
"""


def graph(heads: int = 6, shared: int = 2, text: str = REPEATED) -> ir.Model:
    sizes = {"HEADS": heads, "SHARED": shared, "GROUPS": heads // shared}
    for name, size in sizes.items():
        text = text.replace(name, str(size))
    model = ir.from_onnx_text(text)
    FixShapes()(model)
    FoldConstants()(model)
    return model


def inputs(heads: int = 6, shared: int = 2, new: int = 1, total: int = 5) -> dict[str, npt.NDArray[np.float32]]:
    random = np.random.default_rng(0)
    shapes = {"q": (2, heads, new, 16), "k": (2, shared, total, 16), "v": (2, shared, total, 16)}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
@given(groups=st.integers(1, 4), shared=st.integers(1, 3), new=st.integers(1, 3), total=st.integers(1, 5))
def test_query_heads_share_key_heads_with_the_same_numbers(
    groups: int, shared: int, new: int, total: int, run: Run
) -> None:
    model = graph(groups * shared, shared)
    given = inputs(groups * shared, shared, new, total)
    expected = run(model, **given)
    assert ShareKeyHeads()(model).changed == 1
    assert operators(model) == ["Attention"]
    assert np.abs(run(model, **given) - expected).max() <= 1e-6
    assert ShareKeyHeads()(model).changed == 0


@pytest.mark.parametrize(
    "text",
    [
        REPEATED.replace("axis = {2}", "axis = {1}").replace("batch, shared, groups, ", "batch, groups, shared, "),
        REPEATED.replace("(batch, heads, total, size)", "(total, heads, batch, size)"),
    ],
    ids=["heads tiled, not repeated", "batch and length exchanged"],
)  # fmt: skip
def test_heads_in_another_order_are_not_shared(text: str) -> None:
    model = graph(text=text)
    assert ShareKeyHeads()(model).changed == 0
    assert operators(model).count("Expand") == 2


def test_keys_without_their_values_are_left_alone_with_the_reason() -> None:
    text = REPEATED.replace("Attention(q, kr, vr)", "Attention(q, kr, v)")
    outcome = ShareKeyHeads()(graph(text=text))
    assert outcome.changed == 0
    assert [left.why for left in outcome.left_alone] == ["its keys and values are repeated in different ways"]


@pytest.mark.parametrize("new", [1, 64])
def test_tensorrt_fuses_shared_heads(new: int, tmp_path: Path) -> None:
    model = graph()
    ShareKeyHeads()(model)
    TypeFloats("float16")(model)
    ir.save(model, tmp_path / "model.onnx")
    usual = {name: array.shape for name, array in inputs(new=new, total=64).items()}
    built = build_engine(
        tmp_path / "model.onnx", "tensorrt-rtx", compute_capability="SM80", batch=ShapeRange(2, 2, 2), usual=usual
    )
    assert [kernel.kind for kernel in read_kernels(built.log)].count("attention") == 1
