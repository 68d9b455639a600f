from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.linears import array_of, find_linears
from exporters.passes.outcome import LeftAlone
from exporters.passes.repair_sparsity import RepairSparsity
from exporters.sparsity import sparsity_of
from profiles.errors import GpusqError

Run = Callable[..., npt.NDArray[np.float32]]

# One of four groups of each weight holds three values: the last column of w, the second row of v.
NEAR = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,2] y)
    <float[4,4] w = {1, 0, 5, 0, 0, 2, 6, 3, 3, 0, 0, 1, 0, 4, 0, 9},
     int8[2,8] v = {1, 0, 0, 2, 9, 0, 0, 0, 0, 0, 0, 0, -128, 127, 0, 1}, float[2] s = {0.5, 0.25}, int8[2] z = {0, 0}>
    {
        [first] t = MatMul(x, w)
        c = Concat<axis=1>(t, t)
        [v_dq] d = DequantizeLinear<axis=0>(v, s, z)
        [second] y = Gemm<transB=1>(c, d)
    }
"""
EVERY = RepairSparsity(max_share=1)


def near(*swaps: tuple[str, str]) -> ir.Model:
    text = NEAR
    for old, new in swaps:
        assert old in text
        text = text.replace(old, new)
    return ir.from_onnx_text(text)


def weight_of(model: ir.Model, name: str) -> npt.NDArray[Any]:
    return array_of(model.graph.initializers[name])


def test_prunes_only_the_groups_that_break_the_pattern() -> None:
    model = near()
    before = weight_of(model, "w").copy()
    outcome = EVERY(model)
    assert (outcome.name, outcome.changed, outcome.left_alone) == ("repair sparsity", 2, ())
    after = weight_of(model, "w")
    assert np.argwhere(before != after).tolist() == [[2, 3]]
    assert weight_of(model, "v").tolist() == [[1, 0, 0, 2, 9, 0, 0, 0], [0, 0, 0, 0, -128, 127, 0, 0]]
    assert [sparsity_of(linear, None).pattern for linear in find_linears(model.graph)] == ["2:4", "2:4"]


def test_tells_of_each_layer_what_it_cost() -> None:
    first, second = EVERY(near()).repairs
    assert (first.where, first.groups, first.share, first.weights) == ("first", 1, 0.25, 1)
    assert (second.where, second.groups, second.share, second.weights) == ("second", 1, 0.25, 1)
    assert first.relative_error == pytest.approx(np.sqrt(1 / 182), rel=1e-6)
    assert str(first) == "groups pruned: 1 (25 %), weights set to zero: 1, relative error: 0.074"


def test_the_error_is_that_of_the_dequantized_weight() -> None:
    _, second = EVERY(near()).repairs
    real = np.array([[1, 2, 9], [128, 127, 1]]) * np.array([[0.5], [0.25]])
    assert second.relative_error == pytest.approx(real[1, 2] / np.linalg.norm(real), rel=1e-6)


def test_leaves_layers_alone_that_break_too_much() -> None:
    model = near()
    before = ir.to_proto(model)
    outcome = RepairSparsity(max_share=0.24)(model)
    assert (outcome.changed, outcome.repairs) == (0, ())
    assert outcome.left_alone[0] == LeftAlone(
        "first", "1 of 4 groups of four (25.0 %) hold more than two values: more than 24 %"
    )
    assert len(outcome.left_alone) == 2
    assert ir.to_proto(model) == before
    assert RepairSparsity(max_share=0.25)(model).changed == 2


@pytest.mark.parametrize(
    ("swaps", "where", "reason"),
    [
        ([("c = Concat<axis=1>(t, t)", "e = Add(t, w) c = Concat<axis=1>(t, e)")], "first", "Add reads its weight"),
        ([("c = Concat<axis=1>(t, t)", "r = Transpose(w) c = Concat<axis=1>(t, r)")], "first", "Concat reads its"),
        ([("=> (float[N,2] y)", "=> (float[N,2] y, float[2,8] d)")], "second", "an output of the graph reads its"),
        ([("int8[2] z = {0, 0}", "int8[2] z = {0, 3}")], "second", "its zero-point is not 0"),
    ],
)
def test_leaves_a_weight_alone_that_is_more_than_a_weight(
    swaps: list[tuple[str, str]], where: str, reason: str
) -> None:
    model = near(*swaps)
    before = {name: array_of(value).copy() for name, value in model.graph.initializers.items()}
    (left,) = EVERY(model).left_alone
    assert left.where == where
    assert reason in left.why
    held = "w" if where == "first" else "v"
    assert np.array_equal(weight_of(model, held), before[held])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_leaves_a_weight_alone_that_is_not_finite(value: float) -> None:
    model = near()
    held = model.graph.initializers["w"]
    weight = array_of(held).copy()
    weight[0, 2] = value
    held.const_value = ir.tensor(weight, name="w")
    assert [left.why for left in EVERY(model).left_alone] == ["its weight holds NaN or infinity"]


def test_leaves_k_alone_that_has_no_groups() -> None:
    text = NEAR.replace("float[4,4] w", "float[3,4] w").replace("float[N,4] x", "float[N,3] x").replace(", 9},", "},")
    model = ir.from_onnx_text(text.replace("3, 3, 0, 0, 1, 0, 4, 0}", "3, 3, 0, 0, 1}"))
    assert [left.why for left in EVERY(model).left_alone] == ["K is 3, no multiple of 4"]


def test_a_weight_of_two_layers_is_pruned_once() -> None:
    model = near(("[first] t = MatMul(x, w)", "[zeroth] u = MatMul(x, w) [first] t = MatMul(u, w)"))
    outcome = EVERY(model)
    assert [repair.where for repair in outcome.repairs] == ["zeroth", "second"]


def test_four_bits_are_pruned_by_pairs() -> None:
    model = near()
    held = model.graph.initializers["v"]
    values = np.array([[1, 1, 2, 2, 3, 0, 0, 0], [0, 0, 7, 0, 0, -8, 0, 0]], np.float32).astype(ml_dtypes.int4)
    held.const_value, held.dtype = ir.tensor(values, name="v"), ir.DataType.INT4
    model.graph.initializers["z"].const_value = ir.tensor(np.zeros(2, ml_dtypes.int4), name="z")
    RepairSparsity(max_share=0.5)(model)
    assert held.const_value is not None
    assert held.const_value.dtype == ir.DataType.INT4
    assert weight_of(model, "v").astype(int).tolist() == [[0, 0, 2, 2, 3, 0, 0, 0], [0, 0, 7, 0, 0, -8, 0, 0]]


def test_a_convolution_is_pruned_along_its_input_channels(run: Run) -> None:
    model = ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["": 23]>
        g (float[1,4,1,2] x) => (float[1,1,1,1] y)
        <float[1,4,1,2] w = {3, 1, 2, 0, 1, 5, 0, 0}>
        { [conv] y = Conv(x, w) }
    """)
    (repair,) = EVERY(model).repairs
    assert (repair.where, repair.weights) == ("conv", 1)
    assert weight_of(model, "w").ravel().tolist() == [3, 1, 2, 0, 0, 5, 0, 0]
    assert run(model, x=np.ones((1, 4, 1, 2), np.float32)).item() == 11


def test_external_data_is_read_and_not_written(tmp_path: Path) -> None:
    ir.save(near(), tmp_path / "net.onnx", external_data="net.data")
    data = (tmp_path / "net.data").read_bytes()
    model = ir.load(tmp_path / "net.onnx")
    assert EVERY(model).changed == 2
    assert (tmp_path / "net.data").read_bytes() == data
    assert [sparsity_of(linear, None).pattern for linear in find_linears(model.graph)] == ["2:4", "2:4"]


def test_onnxruntime_sees_the_error_that_is_reported(run: Run) -> None:
    """The identity as the input makes the weight the output. Float32: to 1e-6."""
    model = ir.from_onnx_text(
        NEAR.replace("c = Concat", "[out] y = Identity(t) c = Concat").replace("y = Gemm", "u = Gemm")
    )
    before = run(model, x=np.eye(4, dtype=np.float32))
    first, _ = EVERY(model).repairs
    after = run(model, x=np.eye(4, dtype=np.float32))
    assert first.relative_error == pytest.approx(
        float(np.linalg.norm(before - after) / np.linalg.norm(before)), rel=1e-6
    )


def test_keeps_names_metadata_and_types() -> None:
    model = near()
    model.graph[0].metadata_props["gpusq.module"] = "blocks.0.fc"
    names = [node.name for node in model.graph], list(model.graph.initializers)
    types = [value.dtype for value in model.graph.initializers.values()]
    assert EVERY(model).repairs[0].where == "blocks.0.fc"
    assert ([node.name for node in model.graph], list(model.graph.initializers)) == names
    assert [value.dtype for value in model.graph.initializers.values()] == types
    assert model.graph[0].metadata_props["gpusq.module"] == "blocks.0.fc"


def test_a_second_run_changes_nothing() -> None:
    model = near()
    EVERY(model)
    before = ir.to_proto(model)
    second = EVERY(model)
    assert (second.changed, second.left_alone, second.repairs) == (0, (), ())
    assert ir.to_proto(model) == before


@given(st.lists(st.integers(-128, 127), min_size=16, max_size=16), st.floats(0, 1))
def test_repairs_iff_the_share_allows_it(values: list[int], max_share: float) -> None:
    model = near()
    model.graph.initializers["v"].const_value = ir.tensor(np.array(values, np.int8).reshape(2, 8), name="v")
    _, linear = find_linears(model.graph)
    before = sparsity_of(linear, None)
    outcome = RepairSparsity(max_share)(model)
    repaired = "second" in [repair.where for repair in outcome.repairs]
    assert repaired == (0 < before.broken_share <= max_share)
    assert (sparsity_of(linear, None).pattern == "2:4") == (repaired or before.pattern == "2:4")


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_refuses_what_is_no_share(share: float) -> None:
    with pytest.raises(GpusqError, match="between 0 and 1"):
        RepairSparsity(share)
