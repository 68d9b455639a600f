from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from exporters.passes.remove_no_ops import RemoveNoOps

Run = Callable[..., npt.NDArray[np.float32]]

TEXT = """
    <ir_version: 8, opset_import: ["": {opset}]>
    g (float[N,2,6] x) => (float[{out}] y)
    <int64[6] no_pads = {{0, 0, 0, 0, 0, 0}}, int64[6] pads = {{0, 0, 0, 0, 0, 1}}, int64[1] zero = {{0}},
     int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] six = {{6}}, int64[1] end = {{9223372036854775807}},
     int64[2] zeros2 = {{0, 0}}, int64[2] axes2 = {{1, 2}}, int64[2] twosix = {{2, 6}}, int64[3] grow = {{3, 2, 6}},
     int64[3] copy = {{0, 0, 0}}, int64[3] same = {{0, 2, 6}}, int64[3] heads = {{0, 6, 2}},
     int64[3] last = {{0, 0, 2}}, int64[3] fill = {{0, 0, -1}}, int64[3] tail = {{-1, 2, 6}},
     int64[3] middle = {{0, -1, 1}}, int64[4] split = {{0, 2, 3, 2}},
     float half = {{0.5}}, bool no = {{0}}, bool yes = {{1}}>
    {{
        a = Relu(x)
        {nodes}
    }}
"""
NO_OPS = {
    "identity": "b = Identity(a) y = Neg(b)",
    "dropout": "b = Dropout(a) y = Neg(b)",
    "dropout told not to train": "b = Dropout(a, half, no) y = Neg(b)",
    "pad of zeros": "b = Pad(a, no_pads) y = Neg(b)",
    "cast to the same type": "b = Cast<to=1>(a) y = Neg(b)",
    "concat of one": "b = Concat<axis=0>(a) y = Neg(b)",
    "transpose to the same order": "b = Transpose<perm=[0,1,2]>(a) y = Neg(b)",
    "there and back": "t = Transpose<perm=[2,0,1]>(a) b = Transpose<perm=[1,2,0]>(t) y = Neg(b)",
    "expand to the same": "b = Expand(a, twosix) y = Neg(b)",
    "reshape to copies": "b = Reshape(a, copy) y = Neg(b)",
    "reshape to the same sizes": "b = Reshape(a, same) y = Neg(b)",
    "whole slice": "b = Slice(a, zero, end, two) y = Neg(b)",
    "whole slice of two axes": "b = Slice(a, zeros2, twosix, axes2) y = Neg(b)",
    "whole slice of an unknown size": "b = Slice(a, zero, end, zero, one) y = Neg(b)",
    "exact cast and back": "t = Cast<to=11>(a) b = Cast<to=1>(t) y = Neg(b)",
    "flatten and back": "t = Flatten(a) b = Reshape(t, split) r = Reshape(b, same) y = Neg(r)",
    "an output": "b = Neg(a) y = Identity(b)",
}
OTHERS = {
    "dropout in training": "y = Dropout(a, half, yes)",
    "pad": "y = Pad(a, pads)",
    "cast": "t = Cast<to=10>(a) y = Cast<to=1>(t)",
    "transpose": "y = Transpose<perm=[0,2,1]>(a)",
    "expand of an unknown size": "y = Expand(a, grow)",
    "reshape": "y = Reshape(a, heads)",
    "part of a slice": "y = Slice(a, zero, one, two)",
    "slice from one": "y = Slice(a, one, end, two)",
    "slice with steps": "y = Slice(a, zero, end, two, two)",
    "slice of an unknown size": "y = Slice(a, zero, six, zero)",
    "between input and output": "y = Identity(x)",
    "a constant as output": "y = Identity(half)",
}


def graph(nodes: str, *, opset: int = 17) -> ir.Model:
    out = "" if nodes == OTHERS["a constant as output"] else "A,B,C"
    model = ir.from_onnx_text(TEXT.format(nodes=nodes, out=out, opset=opset).replace("float[] y", "float y"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True))


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


X = np.random.default_rng(0).standard_normal((3, 2, 6), np.float32)


@pytest.mark.parametrize("nodes", NO_OPS.values(), ids=NO_OPS.keys())
def test_what_changes_nothing_is_removed(nodes: str, run: Run) -> None:
    model = graph(nodes)
    before = run(model, x=X)
    assert RemoveNoOps()(model).changed > 0
    assert op_types(model) == ["Relu", "Neg"]
    assert model.graph.outputs[0].name == "y"
    assert np.array_equal(run(model, x=X), before)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("nodes", OTHERS.values(), ids=OTHERS.keys())
def test_what_changes_something_stays(nodes: str) -> None:
    model = graph(nodes)
    before = ir.to_proto(model).graph.node
    assert RemoveNoOps()(model).changed == 0
    assert ir.to_proto(model).graph.node == before


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("t = Transpose<perm=[2,0,1]>(a) y = Transpose<perm=[0,2,1]>(t)", ["Relu", "Transpose"]),
        ("t = Reshape(a, heads) y = Reshape(t, last)", ["Relu", "Reshape"]),
        ("t = Unsqueeze(a, two) y = Reshape(t, heads)", ["Relu", "Reshape"]),
        ("h = Cast<to=10>(a) f = Cast<to=11>(h) y = Cast<to=1>(f)", ["Relu", "Cast", "Cast"]),
    ],
    ids=["transposes", "reshapes", "unsqueeze", "casts"],
)
def test_chains_become_the_last_one(nodes: str, left: list[str], run: Run) -> None:
    model = graph(nodes)
    before = run(model, x=X)
    assert RemoveNoOps()(model).changed == 1
    assert op_types(model) == left
    assert np.array_equal(run(model, x=X), before)


def test_what_others_read_too_stays_for_them(run: Run) -> None:
    model = graph(
        "t = Transpose<perm=[2,0,1]>(a) b = Transpose<perm=[1,2,0]>(t) c = Transpose<perm=[1,2,0]>(t) y = Add(b, c)"
    )
    before = run(model, x=X)
    RemoveNoOps()(model)
    assert op_types(model) == ["Relu", "Add"]
    assert np.array_equal(run(model, x=X), before)


def test_a_subgraph_reads_on_what_it_read(run: Run) -> None:
    model = graph("""
        b = Identity(a)
        y = If (no) <
            then_branch = t () => (float[A,B,C] p) { p = Identity(b) },
            else_branch = e () => (float[A,B,C] q) { q = Neg(b) }
        >
    """)
    before = run(model, x=X)
    RemoveNoOps()(model)
    assert op_types(model) == ["Relu", "If"]
    assert [node.op_type for node in model.graph.all_nodes()] == ["Relu", "If", "Identity", "Neg"]
    assert np.array_equal(run(model, x=X), before)


@pytest.mark.parametrize("nodes", [*NO_OPS.values(), *OTHERS.values()], ids=[*NO_OPS, *OTHERS])
def test_a_second_run_changes_nothing(nodes: str) -> None:
    model = graph(nodes)
    RemoveNoOps()(model)
    before = ir.to_proto(model)
    assert RemoveNoOps()(model).changed == 0
    assert ir.to_proto(model) == before


PERMS = st.permutations(range(3)).map(lambda perm: f"Transpose<perm={perm}>({{}})")
CASTS = st.sampled_from([1, 10, 11, 16, 6, 7, 3]).map(lambda dtype: f"Cast<to={dtype}>({{}})")
SIZES = st.sampled_from(["copy", "fill", "tail", "middle"]).map(lambda sizes: f"Reshape({{}}, {sizes})")


@settings(deadline=None)
@given(st.lists(PERMS | CASTS | SIZES | st.just("Identity({})"), min_size=1, max_size=6))
def test_random_chains_keep_their_numbers(chain: list[str]) -> None:
    values = ["a", *(f"v{index}" for index in range(len(chain)))]
    lines = [f"{new} = {step.format(old)}" for step, old, new in zip(chain, values, values[1:], strict=False)]
    model = graph(" ".join([*lines, f"y = Cast<to=1>({values[-1]})"]))
    expected = outputs(model)
    RemoveNoOps()(model)
    assert np.array_equal(outputs(model), expected)
    before = ir.to_proto(model)
    assert RemoveNoOps()(model).changed == 0
    assert ir.to_proto(model) == before


def test_copies_of_two_unknown_sizes_stay() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N,M,6] x) => (float[N,M,2,3] y) <int64[3] flip = {0, 3, -1}, int64[4] split = {0, 0, 2, -1}>
        { t = Reshape(x, flip) y = Reshape(t, split) }
    """)
    assert RemoveNoOps()(model).changed == 0


def outputs(model: ir.Model) -> npt.NDArray[np.float32]:
    found = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": X})
    return np.asarray(found[0])  # type: ignore[index]
