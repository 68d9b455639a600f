from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from exporters.linears import find_linears
from exporters.passes.absorb_bias import AbsorbBias
from exporters.placement import KEPT_FLOAT

Array = npt.NDArray[np.generic]
Run = Callable[..., npt.NDArray[np.float32]]

# The end of a classifier: of 3 tokens the first is read, and 32 channels become 20 classes.
GEMM = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,3,32] x) => (float[N,20] y)
    <float[32] g, float[32] c, float[20,32] w, float[20] b, int64 row = {0}, float[N,3,32] n, float[N,32] t>
    {
        n = LayerNormalization<axis=-1>(x, g, c)
        t = Gather<axis=1>(n, row)
        [head] y = Gemm<transB=1>(t, w, b)
    }
"""
# As Swin ends: the mean of the tokens.
MEAN = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,3,32] x) => (float[N,20] y)
    <float[32] g, float[32,20] w, float[20] b, int64[1] axes = {1}, float[N,3,32] n, float[N,32] t, float[N,20] p>
    {
        n = LayerNormalization<axis=2>(x, g)
        t = ReduceMean<keepdims=0>(n, axes)
        [head] p = MatMul(t, w)
        y = Add(b, p)
    }
"""


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """`text` with each of the first replaced by the second; each is there."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def filled(text: str, seed: int = 0, arrays: Mapping[str, Array] | None = None) -> ir.Model:
    """The model with the constants that it declares, drawn; γ is around 1."""
    model, random = ir.from_onnx_text(text), np.random.default_rng(seed)
    for value in [value for node in model.graph for value in node.inputs if value is not None]:
        if value.producer() is not None or value.is_graph_input() or value.is_initializer():
            continue
        drawn = random.standard_normal([dim for dim in value.shape or () if isinstance(dim, int)], np.float32)
        array = (arrays or {}).get(value.name or "", 1 + drawn / 4 if value.name == "g" else drawn)
        value.const_value = ir.tensor(array, name=value.name)
        value.shape, value.dtype = ir.Shape(array.shape), value.const_value.dtype
        model.graph.register_initializer(value)
    return model


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def tokens(seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((4, 3, 32), np.float32)


@pytest.mark.parametrize("text", [GEMM, MEAN])
def test_the_answers_stay_without_a_bias(text: str, run: Run) -> None:
    model = filled(text)
    before = run(model, x=tokens())
    outcome = AbsorbBias()(model)
    assert [change.where for change in outcome.changes] == ["head"]
    (head,) = find_linears(model.graph)
    assert "Add" not in op_types(model)
    assert len(head.node.inputs) == 2
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_allclose(run(model, x=tokens()), before, rtol=0, atol=2e-5)  # of answers around 5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_answers_stay_whatever_the_constants_are(seed: int) -> None:
    """In float64, where a layer is W·(γ·x̂ + β) + b."""
    model = filled(GEMM, seed)
    before = constants(model)
    assume(AbsorbBias()(model).changed)  # one scale may not be enough
    after = constants(model)
    x = np.random.default_rng(seed).standard_normal((8, 32))
    x = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
    expected = (x * before["g"] + before["c"]) @ before["w"].T + before["b"]
    found = (x * after["g"] + after["norm"]) @ after["head"].T
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def constants(model: ir.Model) -> dict[str, npt.NDArray[np.float64]]:
    """Those of GEMM by name, and the bias of its normalization and the weight of its head by what reads them."""
    found = dict(model.graph.initializers)
    norm, _, head = model.graph
    assert norm.inputs[2] is not None
    assert head.inputs[1] is not None
    found |= {"norm": norm.inputs[2], "head": head.inputs[1]}
    arrays = {name: value.const_value.numpy() for name, value in found.items() if value.const_value is not None}
    return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


def test_a_second_run_changes_nothing() -> None:
    model = filled(GEMM)
    AbsorbBias()(model)
    written = op_types(model), list(model.graph.initializers)
    assert AbsorbBias()(model).changed == 0
    assert (op_types(model), list(model.graph.initializers)) == written


NO_NORM = replaced(GEMM, ("LayerNormalization<axis=-1>(x, g, c)", "Mul(x, g)"))
TWO_READERS = replaced(
    GEMM, ("=> (float[N,20] y)", "=> (float[N,20] y, float[N,3,32] z)"), ("t = Gather", "z = Relu(n)\n t = Gather")
)
DOUBLED = replaced(GEMM, ("<transB=1>", "<transB=1, beta=2.0>"))


@pytest.mark.parametrize(
    ("text", "arrays", "why"),
    [
        (NO_NORM, {}, "it reads no layer normalization"),
        (TWO_READERS, {}, "it reads no layer normalization"),
        (DOUBLED, {}, "multiplied by a number"),
        (GEMM, {"g": np.eye(1, 32, dtype=np.float32)[0]}, "one scale is not enough"),  # 1/γ
        (GEMM, {"w": np.tile(np.asarray([1, 0, 0, 2], np.float32), (20, 8))}, "its weight is sparse"),
    ],
)
def test_what_stays_is_told_with_the_reason(text: str, arrays: dict[str, Array], why: str, run: Run) -> None:
    model = filled(text, arrays=arrays)
    before = op_types(model)
    outcome = AbsorbBias()(model)
    assert [left.where for left in outcome.left_alone] == ["head"]
    assert why in outcome.left_alone[0].why
    assert outcome.changed == 0
    assert op_types(model) == before


@pytest.mark.parametrize(
    "text",
    [
        replaced(GEMM, (", b)", ")")),  # no bias
        replaced(GEMM, ("20", "12")),  # too small for INT8
        replaced(GEMM, ("[head] y = Gemm<transB=1>(t, w, b)", "p = Gemm<transB=1>(t, w, b) y = Relu(p)")),  # no answer
    ],
)
def test_has_nothing_to_do_where_no_int8_product_answers(text: str) -> None:
    outcome = AbsorbBias()(filled(text))
    assert (outcome.changed, outcome.left_alone) == (0, ())


def test_a_layer_that_stays_float_keeps_its_bias() -> None:
    model = filled(GEMM)
    (head,) = find_linears(model.graph)
    head.node.metadata_props[KEPT_FLOAT] = "it costs accuracy"
    assert AbsorbBias()(model).changed == 0
    assert len(head.node.inputs) == 3


def test_another_reader_of_the_constants_keeps_them(run: Run) -> None:
    text = replaced(
        GEMM,
        ("=> (float[N,20] y)", "=> (float[N,20] y, float[N,20] other)"),
        ("[head]", "other = Gemm<transB=1>(t2, w, b)\n[head]"),
        ("t = Gather", "m = LayerNormalization<axis=-1>(x, g, c)\n t2 = Gather<axis=1>(m, row)\n t = Gather"),
        ("float[N,32] t>", "float[N,32] t, float[N,3,32] m, float[N,32] t2>"),
    )  # fmt: skip
    model = filled(text)
    before = run(model, x=tokens())
    assert AbsorbBias()(model).changed == 2
    np.testing.assert_allclose(run(model, x=tokens()), before, rtol=0, atol=2e-5)
