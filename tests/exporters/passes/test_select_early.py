from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from exporters.module_names import MODULE_KEY
from exporters.passes.select_early import SelectEarly

Array = npt.NDArray[np.generic]
Run = Callable[..., npt.NDArray[np.float32]]

# A block's MLP beside its residual stream, and the norm and head of a classifier that reads token 0.
CLASSIFIER = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,5,4] x) => (float[N,3] y)
    <float[4] g, float[4] c, float[4,8] w1, float[8] b1, float[8,4] w2, float[4] b2, float[4,3] head, int64 row = {0},
     float[N,5,4] r, float[N,5,4] n, float[N,5,8] h, float[N,5,8] h1, float[N,5,8] a, float[N,5,4] o, float[N,5,4] o1,
     float[N,5,4] s, float[N,5,4] z, float[N,4] t>
    {
        [attention] r = Transpose<perm=[0,1,2]>(x)
        [norm] n = LayerNormalization<axis=-1>(r, g, c)
        [fc1] h = MatMul(n, w1)
        [bias1] h1 = Add(h, b1)
        [act] a = Gelu(h1)
        [fc2] o = MatMul(a, w2)
        [bias2] o1 = Add(b2, o)
        [residual] s = Add(r, o1)
        [last] z = LayerNormalization<axis=2>(s, g, c)
        [token] t = Gather<axis=1>(z, row)
        [classify] y = MatMul(t, head)
    }
"""
MLP = ["MatMul", "Add", "Gelu", "MatMul", "Add"]
MOVED = ["Transpose", "Gather", "LayerNormalization", *MLP, "Add", "LayerNormalization", "MatMul"]


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """`text` with each of the first replaced by the second; each is there."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def filled(text: str, **arrays: Array) -> ir.Model:
    """The model with the constants that it declares, drawn."""
    model = ir.from_onnx_text(text)
    random = np.random.default_rng(0)
    for value in [value for node in model.graph for value in node.inputs if value is not None]:
        if value.producer() is not None or value.is_graph_input() or value.is_initializer():
            continue
        array = arrays.get(
            value.name or "",
            random.standard_normal([dim for dim in value.shape or () if isinstance(dim, int)], np.float32),
        )
        value.const_value = ir.tensor(array, name=value.name)
        value.shape, value.dtype = ir.Shape(array.shape), value.const_value.dtype
        model.graph.register_initializer(value)
    return model


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def random_inputs(model: ir.Model) -> dict[str, Array]:
    random = np.random.default_rng(1)
    return {
        value.name or "": random.standard_normal(
            [d if isinstance(d, int) else 6 for d in value.shape or ()], np.float32
        )
        for value in model.graph.inputs
    }


def check(model: ir.Model, run: Run, moved: int) -> None:
    """Within 2e-6 the same numbers, of the same shape; a valid graph; nothing for a second run."""
    inputs = random_inputs(model)
    before = run(model, **inputs)
    outcome = SelectEarly()(model)
    assert (outcome.name, outcome.changed) == ("select early", moved)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    after = run(model, **inputs)
    assert after.shape == before.shape
    assert np.abs(after - before).max() <= 2e-6 * max(1, np.abs(before).max())
    once = ir.to_proto(model)
    assert SelectEarly()(model).changed == 0
    assert ir.to_proto(model) == once
    assert all(value.uses() or value.is_graph_output() for node in model.graph for value in node.outputs)


@pytest.mark.parametrize(
    "text",
    [
        CLASSIFIER,
        replaced(CLASSIFIER, ("Gather<axis=1>", "Gather<axis=-2>")),
        replaced(CLASSIFIER, ("int64 row = {0}", "int64 row = {-1}")),
        replaced(CLASSIFIER, ("int64 row = {0}", "int32 row = {3}")),
        replaced(CLASSIFIER, ("N,5,", "N,T,")),
        replaced(CLASSIFIER, ("LayerNormalization<axis=-1>(r, g, c)", "RMSNormalization<axis=-1>(r, g)")),
        replaced(
            CLASSIFIER, ("Gelu(h1)", "Clip(h1, low, high)"),
            ("<float[4] g", "<float low = {0}, float high = {6}, float[4] g"),
        ),
    ],
    ids=["token 0", "negative axis", "last token", "of int32", "any number of tokens", "RMSNorm", "Clip"],
)  # fmt: skip
def test_selects_ahead_of_the_whole_mlp(text: str, run: Run) -> None:
    model = filled(text)
    check(model, run, moved=8)
    kinds = [{"RMSNormalization": "LayerNormalization", "Clip": "Gelu"}.get(kind, kind) for kind in op_types(model)]
    assert kinds == MOVED


def test_a_residual_is_selected_once_for_both_its_readers(run: Run) -> None:
    """The stream is read by the norm and by the sum: one Gather, right behind what makes it."""
    model = filled(CLASSIFIER)
    check(model, run, moved=8)
    (gather,) = (node for node in model.graph if node.op_type == "Gather")
    assert {user.name for user, _ in gather.outputs[0].uses()} == {"norm", "residual"}
    assert gather.inputs[0] is model.graph[0].outputs[0]


def test_a_stream_that_is_an_input_of_the_graph(run: Run) -> None:
    """Two blocks on an input: the second's selection of x is there first, and comes to stand ahead of the first."""
    text = replaced(CLASSIFIER, ("[attention] r = Transpose<perm=[0,1,2]>(x)", ""), ("(r, ", "(x, "))
    model = filled(text)
    check(model, run, moved=8)
    assert op_types(model) == MOVED[1:]


def test_selection_that_is_there_is_used_again_wherever_it_stands(run: Run) -> None:
    text = replaced(
        CLASSIFIER, ("[classify]", "[again] u = Gather<axis=-2>(x, other) [sum] v = Add(t, u) [classify]"),
        ("MatMul(t, head)", "MatMul(v, head)"), ("[attention] r = Transpose<perm=[0,1,2]>(x)", ""), ("(r, ", "(x, "),
        ("<float[4] g", "<int64 other = {0}, float[N,4] u, float[N,4] v, float[4] g"),
    )  # fmt: skip
    model = filled(text)
    check(model, run, moved=8)
    assert op_types(model).count("Gather") == 1
    assert op_types(model)[0] == "Gather"


def test_keeps_names_and_modules(run: Run) -> None:
    text = replaced(CLASSIFIER, ("(float[N,3] y)", "(float[N,4] t)"), ("[classify] y = MatMul(t, head)", "")).replace(
        ", float[N,4] t>", ">"
    )
    model = filled(text)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = node.name or ""
    check(model, run, moved=8)
    assert [value.name for value in model.graph.outputs] == ["t"]
    assert next(node for node in model.graph if node.op_type == "MatMul").metadata_props[MODULE_KEY] == "fc1"
    shapes = {node.name: list(node.outputs[0].shape or ()) for node in model.graph if node.name}
    assert shapes["fc1"] == ["N", 8]
    assert shapes["last"] == ["N", 4]


QUANTIZED = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,5,4] x) => (float[N,4] y)
    <float s = {0.02}, int8 z = {0}, float[4] sw = {0.1, 0.2, 0.3, 0.4}, int8[4] zw = {0, 0, 0, 0}, int64 row = {1},
     int8[4,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float[N,5,4] m, int8[N,5,4] q,
     float[N,5,4] d, float[N,5,4] o>
    {
        m = Softmax<axis=1>(x)
        q = QuantizeLinear(m, s, z)
        d = DequantizeLinear(q, s, z)
        v = DequantizeLinear<axis=1>(w, sw, zw)
        o = MatMul(d, v)
        y = Gather<axis=1>(o, row)
    }
"""


def test_selects_ahead_of_quantized_layers(run: Run) -> None:
    model = filled(QUANTIZED)
    check(model, run, moved=3)
    assert op_types(model)[:2] == ["Softmax", "Gather"]


# One operator between what mixes tokens and the selection.
ONE = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,5,4] x, float[N,1,4] u, float[4,4] f, float[5,4] p) => (float[N,4] y)
    <float[5,4] five, float[1,5,4] position, float[1,1,4] all, float[4] each, float[4,4] w, int64 row = {0},
     float[N,5,4] m, float[N,5,4] o, float s = {0.02}, int8 z = {0}, float[5] s5 = {0.1, 0.2, 0.3, 0.4, 0.5},
     int8[5] z5 = {0, 0, 0, 0, 0}, float[4] s4 = {0.1, 0.2, 0.3, 0.4}, int8[4] z4 = {0, 0, 0, 0}, float[1,4,4] w3>
    {
        m = Softmax<axis=1>(x)
        o = OPERATOR
        y = Gather<axis=1>(o, row)
    }
"""


@pytest.mark.parametrize(
    "operator", ["Mul(m, each)", "Div(each, m)", "Sub(m, m)", "Sigmoid(m)", "MatMul(m, w)", "Cast<to=1>(m)"]
)
def test_moves_up_through(operator: str, run: Run) -> None:
    model = filled(ONE.replace("OPERATOR", operator))
    check(model, run, moved=1)
    assert op_types(model)[1] == "Gather"


STAYS = {
    "a product with what is computed": "MatMul(m, f)",
    "a product with a stack of matrices": "MatMul(m, w3)",
    "a constant with tokens": "Add(m, five)",
    "a position embedding": "Add(m, position)",
    "a constant of another rank": "Add(m, all)",
    "tokens that are broadcast": "Mul(m, u)",
    "an operand of another rank": "Mul(m, p)",
    "what mixes tokens": "CumSum(m, row)",
    "a softmax over tokens": "Softmax<axis=1>(m)",
    "a norm over tokens": "LayerNormalization<axis=1>(m, five)",
    "a norm with a scale for each token": "LayerNormalization<axis=-1>(m, five)",
}


@pytest.mark.parametrize("operator", STAYS.values(), ids=STAYS)
def test_stops_at(operator: str, run: Run) -> None:
    model = filled(ONE.replace("OPERATOR", operator))
    before = ir.to_proto(model)
    check(model, run, moved=0)
    assert ir.to_proto(model) == before


@pytest.mark.parametrize("axis", [1, 2, -1], ids=["the tokens", "the last axis", "counted from the end"])
def test_stops_at_scales_of_channels(axis: int, run: Run) -> None:
    """A scale for each entry of an axis would have to follow it."""
    n = 5 if axis == 1 else 4
    text = replaced(
        ONE,
        (
            "o = OPERATOR",
            f"q = QuantizeLinear<axis={axis}>(m, s{n}, z{n}) o = DequantizeLinear<axis={axis}>(q, s{n}, z{n})",
        ),
    )
    check(filled(replaced(text, ("float[N,5,4] o", "int8[N,5,4] q, float[N,5,4] o"))), run, moved=0)


@pytest.mark.parametrize(
    "text",
    [
        replaced(ONE, ("[N,4] y)", "[N,4] y, float[N,5,4] o)"), (" float[N,5,4] o,", ""), ("OPERATOR", "Relu(m)")),
        replaced(ONE, ("float[N,4] y)", "float[N,4] y, float[N,5,4] r)"), ("OPERATOR", "Relu(m) r = Relu(o)")),
        replaced(ONE, ("int64 row = {0}", "int64[1] row = {0}"), ("[N,4] y", "[N,1,4] y"), ("OPERATOR", "Relu(m)")),
        replaced(ONE, ("Gather<axis=1>", "Gather<axis=0>"), ("[N,4] y", "[5,4] y"), ("OPERATOR", "Relu(m)")),
        replaced(ONE, ("Gather<axis=1>", "Gather<axis=2>"), ("[N,4] y", "[N,5] y"), ("OPERATOR", "Relu(m)")),
        replaced(ONE, ("OPERATOR", "Relu(m)"), (" int64 row = {0},", ""), ("p) =>", "p, int64 row = {0}) =>")),
        replaced(ONE, ("o = OPERATOR", "o, a = LayerNormalization(m, each)"), ("[N,4] y)", "[N,4] y, float[N,5,1] a)")),
    ],
    ids=[
        "an output", "read by others", "an index with an axis", "the batch", "the last axis",
        "an index that is an input", "its mean is an output",
    ],
)  # fmt: skip
def test_stays_where_it_is(text: str) -> None:
    model = filled(text)
    before = ir.to_proto(model)
    assert SelectEarly()(model).changed == 0
    assert ir.to_proto(model) == before


def test_an_operator_of_another_domain_is_not_ours() -> None:
    text = replaced(ONE, ("OPERATOR", "other.Relu(m)"), ('"": 23', '"": 23, "other": 1'))
    assert SelectEarly()(filled(text)).changed == 0


def test_a_shape_that_is_not_known_stops_it() -> None:
    text = replaced(ONE, ("OPERATOR", "Relu(m)"), (" float[N,5,4] m,", ""))
    assert SelectEarly()(filled(text)).changed == 0
