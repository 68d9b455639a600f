from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from exporters.passes.fix_shapes import FixShapes

Run = Callable[..., npt.NDArray[np.float32]]

# How tracing exporters split heads, flatten patches and repeat a class token.
TEXT = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[{batch},{tokens},8] x) => (float[A,B,C,D] y)
    <int64 zero = {{0}}, int64 one = {{1}}, int64[1] axis = {{0}}, int64[1] two = {{2}}, int64[1] minus = {{-1}},
     int64[1] four = {{4}}, int64[3] others = {{-1, 1, 8}}, float[1,1,8] token = {{1, 2, 3, 4, 5, 6, 7, 8}}>
    {{
        h = Relu(x)
        s = Shape(h)
        b0 = Gather(s, zero)
        b = Unsqueeze(b0, axis)
        t0 = Gather(s, one)
        t = Unsqueeze(t0, axis)
        {nodes}
    }}
"""
HEADS = "sizes = Concat<axis=0>(b, t, two, minus) y = Reshape(h, sizes)"
FLAT = "f = Slice(s, axis, two) sizes = Concat<axis=0>(f, minus, two) y = Reshape(h, sizes)"
TOKEN = """
    n = Concat<axis=0>(b, minus, minus) o = Shape(n) ones = ConstantOfShape<value = int64[1] {{1}}>(o)
    m = Mul(ones, minus) e = Equal(n, m) sizes = Where(e, ones, n) k = Expand(token, sizes)
    c = Concat<axis=1>(k, h) q = Shape(c) v0 = Gather(q, one) v = Unsqueeze(v0, axis)
    heads = Concat<axis=0>(b, v, two, four) y = Reshape(c, heads)
"""


def graph(nodes: str, *, batch: str = "batch", tokens: str = "6") -> ir.Model:
    return ir.from_onnx_text(TEXT.format(nodes=nodes, batch=batch, tokens=tokens).replace("{{1}}", "{1}"))


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def sizes_of(model: ir.Model) -> list[int]:
    reshape = next(node for node in model.graph if node.op_type == "Reshape")
    assert reshape.inputs[1] is not None
    assert reshape.inputs[1].const_value is not None
    sizes: list[int] = reshape.inputs[1].const_value.numpy().tolist()
    return sizes


@pytest.mark.parametrize(
    ("nodes", "tokens", "sizes"),
    [
        (HEADS, "6", [-1, 6, 2, 4]),
        (HEADS, "tokens", [0, 0, 2, 4]),
        (FLAT, "6", [-1, 6, 4, 2]),
        (FLAT, "tokens", [0, 0, 4, 2]),
    ],
)
def test_a_computed_shape_becomes_a_constant(nodes: str, tokens: str, sizes: list[int], run: Run) -> None:
    model = graph(nodes, tokens=tokens)
    x = np.random.default_rng(0).standard_normal((3, 6, 8), np.float32)
    expected = run(model, x=x)
    assert FixShapes()(model).changed > 0
    assert op_types(model) == ["Relu", "Reshape"]
    assert sizes_of(model) == sizes
    assert np.array_equal(run(model, x=x), expected)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_repeated_token_keeps_what_its_batch_needs_and_nothing_else(run: Run) -> None:
    model = graph(TOKEN)
    x = np.random.default_rng(0).standard_normal((3, 6, 8), np.float32)
    expected = run(model, x=x)
    FixShapes()(model)
    assert not {"Equal", "ConstantOfShape", "Mul"} & set(op_types(model))
    assert sizes_of(model) == [-1, 7, 2, 4]
    assert np.array_equal(run(model, x=x), expected)
    (expand,) = [node for node in model.graph if node.op_type == "Expand"]
    assert expand.outputs[0].shape is not None
    assert list(expand.outputs[0].shape)[1:] == [1, 8]


def test_a_fixed_batch_leaves_nothing_to_compute(run: Run) -> None:
    model = graph(HEADS, batch="3")
    x = np.ones((3, 6, 8), np.float32)
    expected = run(model, x=x)
    FixShapes()(model)
    assert sizes_of(model) == [3, 6, 2, -1]
    assert np.array_equal(run(model, x=x), expected)


@pytest.mark.parametrize(
    "nodes",
    [
        "tb = Mul(b, t) sizes = Concat<axis=0>(tb, minus, two, four) y = Reshape(h, sizes)",
        "sizes = Concat<axis=0>(t, b, two, four) y = Reshape(h, sizes)",
    ],
    ids=["a product of two", "two that are no copies"],
)
def test_two_open_sizes_stay_computed(nodes: str, run: Run) -> None:
    model = graph(nodes, tokens="tokens")
    x = np.random.default_rng(0).standard_normal((3, 6, 8), np.float32)
    expected = run(model, x=x)
    FixShapes()(model)
    reshape = next(node for node in model.graph if node.op_type == "Reshape")
    assert reshape.inputs[1] is not None
    assert reshape.inputs[1].producer() is not None
    assert np.array_equal(run(model, x=x), expected)


def test_an_output_that_is_a_size_stays() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[2,3] x) => (int64[2] y) { y = Shape(x) }
    """)
    assert FixShapes()(model).changed == 0
    assert op_types(model) == ["Shape"]


@pytest.mark.parametrize("nodes", [HEADS, FLAT, TOKEN], ids=["heads", "flat", "token"])
@pytest.mark.parametrize("tokens", ["6", "tokens"])
def test_a_second_run_changes_nothing(nodes: str, tokens: str) -> None:
    model = graph(nodes, tokens=tokens)
    FixShapes()(model)
    before = ir.to_proto(model)
    assert FixShapes()(model).changed == 0
    assert ir.to_proto(model) == before


# The keys of a cache, repeated for the heads that share them; torch writes `allowzero` and the sum in either order.
REPEATED = """
    <ir_version: 10, opset_import: ["": 23]>
    g (float[batch,2,past,4] c, float[batch,2,new,4] x) => (float[A,B,C,D] y)
    <int64[1] zero = {{0}}, int64[1] axis = {{2}}, int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] four = {{4}},
     int64[1] {more}>
    {{
        k = Concat<axis=2>(c, x)
        b = Shape<start=0, end=1>(c)
        p = Shape<start=2, end=3>(c)
        n = Shape<start=2, end=3>(x)
        total = Add({first}, {second})
        u = Unsqueeze(k, axis)
        wide = Concat<axis=0>(b, two, three, total, four)
        e = Expand(u, wide)
        joined = Concat<axis=0>(b, {heads}, total, four)
        y = Reshape<allowzero=1>(e, joined)
    }}
"""


def repeated(*, swapped: bool = False, heads: int = 6) -> ir.Model:
    first, second = ("n", "p") if swapped else ("p", "n")
    text = REPEATED.format(first=first, second=second, heads="heads", more=f"heads = {{{heads}}}")
    model = ir.from_onnx_text(text)
    k = next(node for node in model.graph if node.op_type == "Concat").outputs[0]
    k.type, k.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", 2, "past + new", 4])
    return model


@pytest.mark.parametrize("swapped", [False, True])
def test_a_sum_of_sizes_is_the_size_that_a_shape_names(swapped: bool, run: Run) -> None:
    model = repeated(swapped=swapped)
    random = np.random.default_rng(0)
    inputs = {"c": random.standard_normal((3, 2, 5, 4), np.float32), "x": np.ones((3, 2, 1, 4), np.float32)}
    expected = run(model, **inputs)
    FixShapes()(model)
    assert op_types(model) == ["Concat", "Unsqueeze", "Expand", "Reshape"]
    expand, reshape = list(model.graph)[2:]
    assert [node.inputs[1].const_value.numpy().tolist() for node in (expand, reshape)] == [  # type: ignore[union-attr]
        [1, 1, 3, 1, 1],
        [0, 6, -1, 4],
    ]
    assert reshape.attributes.get_int("allowzero", 0) == 0
    assert np.array_equal(run(model, **inputs), expected)


def test_a_zero_that_means_zero_stays_computed() -> None:
    model = repeated(heads=0)
    FixShapes()(model)
    (reshape,) = [node for node in model.graph if node.op_type == "Reshape"]
    assert reshape.attributes.get_int("allowzero", 0) == 1
    assert reshape.inputs[1] is not None
    assert reshape.inputs[1].producer() is not None
