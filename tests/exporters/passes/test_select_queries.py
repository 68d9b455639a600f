from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from exporters.passes.fold_constants import FoldConstants
from exporters.passes.outcome import LeftAlone
from exporters.passes.select_early import SelectEarly
from exporters.passes.select_queries import SelectQueries

Run = Callable[..., npt.NDArray[np.float32]]

# The last block of a classifier, whose selection of a token is as far up as it goes: behind the attention.
BLOCK = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,5,8] x, float[N,2,5,4] q, float[N,2,5,4] k, float[N,2,5,4] v) => (float[N,8] y)
    <int64[3] flat = {0, 5, 8}, int64 row = {0}>
    {
        [attention] a = Attention(q, k, v) [heads] t = Transpose<perm=[0,2,1,3]>(a) [merge] r = Reshape(t, flat)
        [token] c = Gather<axis=1>(r, row) [proj] p = MatMul(c, wp) [bias] pb = Add(p, bp)
        [stream] s = Gather<axis=1>(x, row) [sum] h = Add(s, pb) [norm] n = LayerNormalization<axis=-1>(h, g, b)
        [fc1] f = MatMul(n, w1) [act] e = Gelu(f) [fc2] o = MatMul(e, w2) [end] y = Add(h, o)
    }
"""
SHAPES = {"wp": (8, 8), "bp": (8,), "g": (8,), "b": (8,), "w1": (8, 16), "w2": (16, 8)}
MASKED = ("Attention(q, k, v)", "Attention(q, k, v, mask)")


def model_of(*changes: tuple[str, str], text: str = BLOCK) -> ir.Model:
    """The graph with its constants drawn and its shapes known."""
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    model = ir.from_onnx_text(text)
    random = np.random.default_rng(0)
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            name = "" if value is None else value.name or ""
            if name in SHAPES:
                if name not in model.graph.initializers:
                    array = random.standard_normal(SHAPES[name], np.float32)
                    held = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
                    held.type = ir.TensorType(ir.DataType.FLOAT)
                    model.graph.register_initializer(held)
                node.replace_input_with(index, model.graph.initializers[name])
    FoldConstants()(model)  # infers shapes
    return model


def samples(model: ir.Model) -> dict[str, npt.NDArray[np.float32]]:
    random = np.random.default_rng(1)
    return {
        value.name or "": random.standard_normal(
            [d if isinstance(d, int) else 3 for d in value.shape or ()], np.float32
        )
        for value in model.graph.inputs
    }


def node_named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("row", ["0", "2", "4", "-1"])
def test_attends_with_the_rows_that_are_read_and_gives_the_same_numbers(queries: int, row: str, run: Run) -> None:
    """Within 1e-5 of the largest; a second run, of the selection too, changes nothing."""
    model = model_of(("int64 row = {0}", f"int64 row = {{{row}}}"))
    before = run(model, **samples(model))
    outcome = SelectQueries(queries)(model)
    assert [change.what for change in outcome.changes] == [f"{queries} of 5 queries"]
    assert node_named(model, "attention").outputs[0].shape == ir.Shape([ir.SymbolicDim("N"), 2, queries, 4])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert np.abs(run(model, **samples(model)) - before).max() <= 1e-5 * np.abs(before).max()
    once = ir.to_proto(model)
    assert SelectEarly()(model).changed == SelectQueries(queries)(model).changed == 0
    assert ir.to_proto(model) == once


def test_a_neighbour_goes_with_the_row_up_to_the_activation_function() -> None:
    model = model_of()
    SelectQueries(2)(model)
    kinds = [node.op_type for node in model.graph]
    assert kinds == [
        *("Slice", "Attention", "Transpose", "Reshape", "MatMul", "Add", "Slice", "Add", "LayerNormalization"),
        *("MatMul", "Gelu", "Gather", "MatMul", "Gather", "Add"),
    ]
    assert node_named(model, "fc2").inputs[0].producer().op_type == "Gather"  # type: ignore[union-attr]


def test_one_query_needs_no_other_change() -> None:
    model = model_of()
    SelectQueries()(model)
    assert [node.op_type for node in model.graph].count("Gather") == 2
    rows = node_named(model, "token").inputs[0]
    assert rows is not None
    assert rows.shape == ir.Shape([ir.SymbolicDim("N"), 1, 8])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ([("Attention(q", "Attention<is_causal=1>(q")], "it is causal"),
        ([MASKED, ("v) =>", "v, float[1,1,5,5] mask) =>")], "its mask tells queries apart"),
        ([("a = Att", "a, past, present, qk = Att"), ("(float[N,8] y)", "(float[N,8] y, float[N,2,5,5] qk)")],
         "its second output is read"),
    ],
    ids=["causal", "mask", "second output"],
)  # fmt: skip
def test_what_tells_queries_apart_is_left_alone_with_the_reason(changes: list[tuple[str, str]], why: str) -> None:
    model = model_of(*changes)
    before = ir.to_proto(model)
    assert SelectQueries()(model).left_alone == (LeftAlone("attention", why),)
    assert ir.to_proto(model) == before


def test_a_mask_of_keys_alone_stays(run: Run) -> None:
    """onnxruntime takes no mask that broadcasts over several queries: the float graph gets it repeated."""
    whole = model_of(MASKED, ("v) =>", "v, float[N,1,5,5] mask) =>"))
    model = model_of(MASKED, ("v) =>", "v, float[N,1,1,5] mask) =>"))
    inputs = samples(model)
    before = run(whole, **{**inputs, "mask": np.repeat(inputs["mask"], 5, axis=2)})
    assert SelectQueries()(model).changed == 1
    assert np.abs(run(model, **inputs) - before).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize(
    "change",
    [
        ("c = Gather<axis=1>(r, row)", "c = ReduceMean<keepdims=0>(r, one)"),
        ("(float[N,8] y)", "(float[N,8] y, float[N,5,8] r)"),
    ],
    ids=["all rows are read", "the graph answers them"],
)  # fmt: skip
def test_attention_of_which_more_is_read_stays(change: tuple[str, str]) -> None:
    model = model_of(change, ("int64 row = {0}", "int64 row = {0}, int64[1] one = {1}"))
    assert SelectQueries()(model).changed == 0


def test_two_queries_stay_where_no_activation_function_follows() -> None:
    model = model_of(
        ("e = Gelu(f)", "e = LayerNormalization<axis=-1>(f, w1a, w1b)"),
        ("x, float", "x, float[16] w1a, float[16] w1b, float"),
    )
    outcome = SelectQueries(2)(model)
    assert (outcome.changed, len(outcome.left_alone)) == (0, 1)
    assert SelectQueries()(model).changed == 1
