from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporters.attention_mask import LOWEST
from exporters.linears import array_of
from exporters.module_names import MODULE_KEY
from exporters.passes.fuse_attention import SAME, FuseAttention
from exporters.passes.lower_attention import LowerAttention
from exporters.passes.outcome import LeftAlone

Array = npt.NDArray[np.float32]
Run = Callable[..., Array]
SLOW = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
LOWEST_FLOAT = float(np.finfo(np.float32).min)


def plain(heads: int = 2, queries: int = 4, keys: int = 6) -> str:
    """An attention written out, v with heads of another size than q and k."""
    scores = f"float[N,{heads},{queries},{keys}]"
    return f"""
        <ir_version: 11, opset_import: ["": 23]>
        g (float[N,{heads},{queries},8] q, float[N,{heads},{keys},8] k, float[N,{heads},{keys},5] v)
        => (float[N,{heads},{queries},5] y)
        <float s = {{0.35}}, float[N,{heads},8,{keys}] kt, {scores} a, {scores} b, {scores} p>
        {{
            kt = Transpose<perm=[0,1,3,2]>(k)
            [scores] a = MatMul(q, kt)
            b = Mul(a, s)
            [mix] p = Softmax<axis=-1>(b)
            y = MatMul(p, v)
        }}
    """


PLAIN = plain()


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """`text` with each of the first replaced by the second; each is there."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def with_mask(how: str, *, constants: str = "", values: str = "", inputs: str = "", text: str = PLAIN) -> str:
    """PLAIN with `how` making c of its scores b ahead of the softmax."""
    scores = text[text.index("kt, ") + 4 :].split(" a,")[0]
    more = ", ".join(filter(None, [f"{scores} c", constants, values]))
    return replaced(
        text, ("<float s", f"<{more}, float s"), ("v)\n        =>", f"v{inputs})\n        =>"),
        ("[mix] p = Softmax<axis=-1>(b)", f"{how}\n[mix] p = Softmax<axis=-1>(c)"),
    )  # fmt: skip


def numbers(*shape: int, low: float | None = None, name: str = "m") -> str:
    """A constant of random numbers, a fifth of them `low`, but for the first key."""
    random = np.random.default_rng(1)
    drawn = random.standard_normal(shape)
    if low is not None:
        drawn = np.where((random.random(shape) < 0.2) & (np.arange(shape[-1]) > 0), low, drawn)
    return f"float[{','.join(map(str, shape))}] {name} = {{{', '.join(map(repr, drawn.ravel().tolist()))}}}"


def booleans(*shape: int) -> str:
    """A constant of which a third is false."""
    drawn = np.random.default_rng(1).random(shape) < 0.66
    return f"bool[{','.join(map(str, shape))}] m = {{{', '.join(str(int(value)) for value in drawn.ravel())}}}"


UNSCALED = ("Mul(a, s)", "Identity(a)")
SCALED_BEFORE = replaced(
    PLAIN, UNSCALED, ("MatMul(q, kt)", "MatMul(qs, kt)"), ("[scores]", "qs = Mul(q, s) [scores]"),
    ("<float s", "<float[N,2,4,8] qs, float s"),
)  # fmt: skip
BOTH_SCALED = replaced(
    SCALED_BEFORE, ("MatMul(qs, kt)", "MatMul(qs, ks)"), ("[scores]", "ks = Mul(kt, s) [scores]"),
    ("<float[", "<float[N,2,8,6] ks, float["),
)  # fmt: skip
STACKED = replaced(PLAIN, ("N,2,", "N,"), ("perm=[0,1,3,2]", "perm=[0,2,1]"))
GUARD = ("y = MatMul(p, v)", "n = IsNaN(p) r = Where(n, zero, p) y = MatMul(r, v)")
GUARDED = replaced(PLAIN, GUARD, ("<float s", "<float zero = {0}, bool[N,2,4,6] n, float[N,2,4,6] r, float s"))
PADDING = with_mask(
    "i = Sub(one, m) j = Mul(i, low) u = Unsqueeze(j, axes) c = Add(b, u)",
    constants="float one = {1}, float low = {-10000}, int64[2] axes = {1, 2}",
    values="float[N,1,1,6] u, float[N,6] i, float[N,6] j",
    inputs=", float[N,6] m",
)


def windows(heads: int = 2, count: int = 3, queries: int = 4, keys: int = 6) -> str:
    """Masks of the windows of an image as timm's Swin adds them."""
    tokens = f"{queries},{keys}"
    return with_mask(
        "d = Reshape(b, apart) e = Add(d, m) c = Reshape(e, together)",
        constants=f"""{numbers(1, count, 1, queries, keys, low=-100)},
            int64[5] apart = {{-1,{count},{heads},{tokens}}}, int64[4] together = {{-1,{heads},{tokens}}}""",
        values=f"float[B,{count},{heads},{tokens}] d, float[B,{count},{heads},{tokens}] e",
        text=plain(heads, queries, keys),
    )


def expanded_windows(heads: int = 2, count: int = 3, queries: int = 4, keys: int = 6) -> str:
    """Masks of the windows of an image as Hugging Face's Swin adds them, beside a bias."""
    tokens = f"{queries},{keys}"
    return with_mask(
        """batch = Shape<start=0, end=1>(q) images = Div(batch, count) shape = Concat<axis=0>(images, lengths)
           repeated = Expand(m, shape) flat = Reshape(repeated, together) d = Add(flat, n) c = Add(b, d)""",
        constants=f"""{numbers(1, count, 1, queries, keys, low=-100)},
            {numbers(1, heads, queries, keys, name="n")}, int64[1] count = {{{count}}},
            int64[4] lengths = {{{count},1,{tokens}}}, int64[4] together = {{-1,1,{tokens}}}""",
        values=f"float[B,{count},1,{tokens}] repeated, float[N,1,{tokens}] flat, float[N,{heads},{tokens}] d",
        text=plain(heads, queries, keys),
    )


FORMS = {
    "scale after": PLAIN,
    "scale before": SCALED_BEFORE,
    "scale in front": replaced(PLAIN, ("Mul(a, s)", "Mul(s, a)")),
    "divided": replaced(PLAIN, ("Mul(a, s)", "Div(a, s)")),
    "both scaled": BOTH_SCALED,
    "one divided": replaced(BOTH_SCALED, ("Mul(kt, s)", "Div(kt, s)")),
    "no scale": replaced(PLAIN, UNSCALED),
    "scale of one axis": replaced(PLAIN, ("float s = {", "float[1] s = {")),
    "axis from the front": replaced(PLAIN, ("axis=-1", "axis=3")),
    "default axis": replaced(PLAIN, ("<axis=-1>", "")),
    "keys transposed once": replaced(PLAIN, ("float[N,2,6,8] k", "float[N,6,2,8] k"), ("[0,1,3,2]", "[0,2,3,1]")),
    "keys not transposed": replaced(
        PLAIN, ("float[N,2,6,8] k", "float[N,2,8,6] k"), ("Transpose<perm=[0,1,3,2]>", "Identity")
    ),
    "batch and heads in one": STACKED,
    "fixed batch": replaced(PLAIN, ("[N,", "[6,")),
    "dropout": replaced(PLAIN, ("y = MatMul(p", "d = Dropout(p) y = MatMul(d")),
    "casts": replaced(
        with_mask("c = Cast<to=1>(b)", values="float[N,2,4,6] d"), ("y = MatMul(p", "d = Cast<to=1>(p) y = MatMul(d")
    ),
    "guard": GUARDED,
    "bias": with_mask("c = Add(b, m)", constants=numbers(1, 2, 4, 6)),
    "bias in front": with_mask("c = Add(m, b)", constants=numbers(1, 2, 4, 6)),
    "bias of 3 axes": with_mask("c = Add(b, m)", constants=numbers(2, 4, 6)),
    "bias of 2 axes": with_mask("c = Add(b, m)", constants=numbers(4, 6)),
    "bias of keys": with_mask("c = Add(b, m)", constants=numbers(6)),
    "bias of heads and keys": with_mask("c = Add(b, m)", constants=numbers(2, 1, 6)),
    "-inf": with_mask("c = Add(b, m)", constants=numbers(4, 6, low=-np.inf)),
    "float32 min": with_mask("c = Add(b, m)", constants=numbers(2, 4, 6, low=LOWEST_FLOAT)),
    "boolean": with_mask("c = Where(m, b, low)", constants=f"{booleans(4, 6)}, float low = {{-1e9}}"),
    "boolean the other way": with_mask("c = Where(m, low, b)", constants=f"{booleans(4, 6)}, float low = {{-1e9}}"),
    "two masks": with_mask(
        "d = Add(b, m) c = Add(d, n)",
        constants=f"{numbers(4, 6)}, {numbers(2, 1, 1, name='n')}",
        values="float[N,2,4,6] d",
    ),
    "mask ahead of the scale": with_mask(
        "d = Add(b, m) c = Div(d, s)", constants=numbers(4, 6), values="float[N,2,4,6] d"
    ),
    "dynamic": with_mask("c = Add(b, m)", inputs=", float[N,2,4,6] m"),
    "dynamic for each key": with_mask("c = Add(b, m)", inputs=", float[N,1,1,6] m"),
    "dynamic for each key, 1-D": with_mask("c = Add(b, m)", inputs=", float[6] m"),
    "dynamic for each query": with_mask("c = Add(m, b)", inputs=", float[N,1,4,1] m"),
    "dynamic and constant": with_mask(
        "d = Add(b, m) c = Add(d, n)", constants=numbers(1, 2, 1, 6, name="n"), values="float[N,2,4,6] d",
        inputs=", float[N,1,1,6] m",
    ),
    "padding": PADDING,
    "padding of any length": replaced(PADDING, (",4,", ",T,"), (",6]", ",S]"), (",6,", ",S,")),
    "windows": windows(),
    "windows as Hugging Face writes them": expanded_windows(),
}  # fmt: skip


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def random_inputs(model: ir.Model) -> dict[str, npt.NDArray[np.generic]]:
    """Normal values for every input; 0 or 1 for a mask that is to be turned around; six entries, or as many tokens."""
    random = np.random.default_rng(0)
    inputs: dict[str, npt.NDArray[np.generic]] = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else 6 for dim in value.shape or ()]
        drawn = random.standard_normal(shape, np.float32)
        inputs[value.name or ""] = (drawn > -1).astype(np.float32) if len(shape) == 2 else drawn
    return inputs


def fused(model: ir.Model) -> ir.Node:
    """The only Attention, there being no Softmax left."""
    assert "Softmax" not in op_types(model)
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    return node


def scale_of(node: ir.Node) -> float:
    return node.attributes["scale"].as_float()


def mask_of(node: ir.Node) -> Array:
    mask = node.inputs[3]
    assert mask is not None
    return np.asarray(array_of(mask), np.float32)


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_same_numbers_and_a_second_run_changes_nothing(text: str, run: Run) -> None:
    """Within 2e-6 of values around 1."""
    model = ir.from_onnx_text(text)
    inputs = random_inputs(model)
    before = run(model, **inputs)
    outcome = FuseAttention()(model)
    assert (outcome.name, outcome.changed, outcome.left_alone) == ("fuse attention", 1, ())
    fused(model)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert np.abs(run(model, **inputs) - before).max() <= 2e-6
    once = ir.to_proto(model)
    assert FuseAttention()(model).changed == 0
    assert ir.to_proto(model) == once


@pytest.mark.parametrize(
    ("form", "nodes"),
    [
        ("scale after", ["Attention"]),
        ("scale before", ["Attention"]),
        ("both scaled", ["Attention"]),
        ("keys transposed once", ["Transpose", "Attention"]),
        ("keys not transposed", ["Identity", "Transpose", "Attention"]),
        ("batch and heads in one", ["Unsqueeze", "Unsqueeze", "Unsqueeze", "Attention", "Squeeze"]),
        ("guard", ["Attention", "IsNaN", "Where"]),
        ("dropout", ["Attention"]),
        ("casts", ["Attention"]),
        ("bias", ["Attention"]),
        ("boolean", ["Attention"]),
        ("dynamic", ["Attention"]),
        ("dynamic for each key", ["Expand", "Attention"]),
        ("dynamic and constant", ["Add", "Attention"]),
        ("padding", ["Sub", "Mul", "Unsqueeze", "Expand", "Attention"]),
        ("padding of any length", ["Sub", "Mul", "Unsqueeze", "Shape", "Shape", "Concat", "Expand", "Attention"]),
        ("windows", ["Reshape", "Reshape", "Reshape", "Attention", "Reshape"]),
        ("windows as Hugging Face writes them", ["Reshape", "Reshape", "Reshape", "Attention", "Reshape"]),
    ],
)
def test_what_is_left(form: str, nodes: list[str]) -> None:
    model = ir.from_onnx_text(FORMS[form])
    FuseAttention()(model)
    assert op_types(model) == nodes


@pytest.mark.parametrize(
    ("form", "scale"),
    [("scale after", 0.35), ("divided", 1 / 0.35), ("both scaled", 0.35**2), ("one divided", 1.0), ("no scale", 1.0)],
)
def test_scale(form: str, scale: float) -> None:
    model = ir.from_onnx_text(FORMS[form])
    FuseAttention()(model)
    assert scale_of(fused(model)) == pytest.approx(scale, rel=1e-6)


@SLOW
@given(
    heads=st.integers(1, 3),
    count=st.integers(1, 5),
    queries=st.integers(1, 4),
    keys=st.integers(1, 4),
    images=st.integers(1, 3),
    write=st.sampled_from([windows, expanded_windows]),
)
def test_any_number_of_windows(
    run: Run, heads: int, count: int, queries: int, keys: int, images: int, write: Callable[..., str]
) -> None:
    """Windows become heads: within 2e-6."""
    model = ir.from_onnx_text(write(heads, count, queries, keys))
    random = np.random.default_rng(2)
    lengths = {"q": (queries, 8), "k": (keys, 8), "v": (keys, 5)}
    inputs = {x: random.standard_normal((images * count, heads, *last), np.float32) for x, last in lengths.items()}
    before = run(model, **inputs)
    assert FuseAttention()(model).changed == 1
    attention = fused(model)
    if count > 1 and keys > 1:
        assert mask_of(attention).shape == (1, count * heads, queries, keys)
    assert np.abs(run(model, **inputs) - before).max() <= 2e-6


ONE_KEY_LESS = "0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0,  LOW, LOW, LOW, LOW, LOW, LOW"
NO_KEY = f"float[4,6] m = {{{ONE_KEY_LESS}}}"
TWO_Q = (("float[N,2,4,8] q", "float[N,2,4,8] q, float[N,2,4,6] x"),)
ALONE = {
    "softmax along the queries": (replaced(PLAIN, ("axis=-1", "axis=2")), "its softmax is not along the keys"),
    "scores read elsewhere": (
        replaced(PLAIN, ("(float[N,2,4,5] y)", "(float[N,2,4,5] y, float[N,2,4,6] r)"), ("[mix]", "r = Relu(b) [mix]")),
        "its scores are read elsewhere",
    ),
    "scores as an output": (
        replaced(PLAIN, ("5] y)", "5] y, float[N,2,4,6] b)"), (" float[N,2,4,6] b,", "")),
        "its scores are read elsewhere",
    ),
    "probabilities as an output": (
        replaced(PLAIN, ("5] y)", "5] y, float[N,2,4,6] p)"), (", float[N,2,4,6] p>", ">")),
        "its probabilities are read elsewhere",
    ),
    "probabilities read elsewhere": (
        replaced(PLAIN, ("5] y)", "5] y, float[N,2,4,6] r)"), ("y = MatMul", "r = Relu(p) y = MatMul")),
        "its probabilities are read elsewhere",
    ),
    "an operator between": (with_mask("c = Tanh(b)"), "a Tanh stands between its scores and the softmax"),
    "scores that are no product": (
        replaced(PLAIN, ("a = MatMul(q, kt)", "a = Identity(x)"), *TWO_Q),
        "its scores are no product of q and k",
    ),
    "scaled by more than a constant": (
        with_mask("c = Mul(b, m)", inputs=", float[N,2,4,6] m"),
        "its scores are multiplied by more than a constant",
    ),
    "a factor for each head": (
        with_mask("c = Mul(b, m)", constants=numbers(2, 1, 1)),
        "its scores are multiplied by more than a constant",
    ),
    "divided by its scores": (replaced(PLAIN, ("Mul(a, s)", "Div(s, a)")), "its scores are multiplied by more"),
    "multiplied by 0": (replaced(PLAIN, ("0.35", "0")), "its scores are multiplied by more than a constant"),
    "multiplied by a negative number": (replaced(PLAIN, ("0.35", "-0.35")), "by a negative number"),
    "a dynamic mask that is scaled": (
        with_mask("d = Add(b, m) c = Mul(d, s)", inputs=", float[N,2,4,6] m", values="float[N,2,4,6] d"),
        "a mask that depends on the input is scaled",
    ),
    "a dynamic condition": (
        with_mask("c = Where(m, b, low)", constants="float low = {-1e9}", inputs=", bool[4,6] m"),
        "its scores are chosen by a condition that depends on the input",
    ),
    "a fill that is not low": (
        with_mask("c = Where(m, b, low)", constants=f"{booleans(4, 6)}, float low = {{-50}}"),
        "what is chosen instead of its scores is not below -10000",
    ),
    "a fill that is scaled up to be not low": (
        with_mask(
            "d = Where(m, b, low) c = Mul(d, t)",
            constants=f"{booleans(4, 6)}, float low = {{-30000}}, float t = {{0.001}}",
            values="float[N,2,4,6] d",
        ),
        "what is chosen instead of its scores is not below -10000",
    ),
    "no key for a query, -inf": (
        with_mask("c = Add(b, m)", constants=NO_KEY.replace("LOW", "-inf")),
        "its mask leaves some query no key",
    ),
    "no key for a query, float32 min": (
        with_mask("c = Add(b, m)", constants=NO_KEY.replace("LOW", str(LOWEST_FLOAT))),
        "its mask leaves some query no key",
    ),
    "no key for a query by two masks": (
        with_mask(
            "d = Add(b, m) c = Add(d, n)",
            constants="float[6] m = {0,0,0,-1e9,-1e9,-1e9}, float[6] n = {-1e9,-1e9,-1e9,0,0,0}",
            values="float[N,2,4,6] d",
        ),
        "its mask leaves some query no key",
    ),
    "no key for any query": (
        with_mask("c = Where(m, b, low)", constants="bool[1,6] m = {0,0,0,0,0,0}, float low = {-1e9}"),
        "its mask leaves some query no key",
    ),
    "shared key heads": (
        replaced(PLAIN, ("N,2,6,8", "N,1,6,8"), ("N,2,8,6", "N,1,8,6")),
        "its query heads share key heads",
    ),
    "one k for all": (
        replaced(PLAIN, ("N,2,6,8", "1,2,6,8"), ("N,2,8,6", "1,2,8,6")),
        "its q, k and v have different batches",
    ),
    "keys of two axes": (
        replaced(PLAIN, ("float[N,2,6,8] k", "float[8,6] k"), ("float[N,2,8,6] kt", "float[8,6] kt"))
        .replace("Transpose<perm=[0,1,3,2]>", "Identity"),
        "its q, k and v are neither 3-D nor 4-D",
    ),
    "scores of one more axis": (
        replaced(PLAIN, ("N,2,", "N,3,2,"), ("perm=[0,1,3,2]", "perm=[0,1,2,4,3]")),
        "its q, k and v are neither 3-D nor 4-D",
    ),
    "scores broadcast by their mask": (
        replaced(
            with_mask("c = Add(b, m)", constants=numbers(2, 4, 6)),
            ("float[N,2,4,8] q", "float[N,2,1,8] q"), ("float[N,2,4,6] a", "float[N,2,1,6] a"),
            ("float[N,2,4,6] b", "float[N,2,1,6] b"),
        ),
        "its scores are broadcast",
    ),
    "windows beside a dynamic mask": (
        replaced(windows(), ("5] v)", "5] v, float[N,1,1,6] n)"), ("[mix]", "f = Add(c, n) [mix]"), ("(c)\n", "(f)\n"))
        .replace("<float[N,2,4,6] c", "<float[N,2,4,6] c, float[N,2,4,6] f"),
        "it has a mask of windows and one that depends on the input",
    ),
    "windows of unknown size": (
        replaced(windows(), ("float[N,2,4,8] q", "float[N,2,Q,8] q")),
        "its windows have an unknown number of heads or tokens",
    ),
    "a dynamic mask of each window": (
        replaced(windows(), (numbers(1, 3, 1, 4, 6, low=-100) + ",", ""), ("5] v)", "5] v, float[1,3,1,4,6] m)")),
        "a mask that depends on the input is scaled, or differs between windows",
    ),
    "scores reshaped otherwise": (
        replaced(windows(), ("{-1,3,2,4,6}", "{-1,3,4,2,6}"), ("float[B,3,2,4,6]", "float[B,3,4,2,6]"))
        .replace(numbers(1, 3, 1, 4, 6, low=-100), numbers(1, 3, 1, 2, 6, low=-100)),
        "its scores are reshaped",
    ),
    "a random dropout": (
        replaced(
            PLAIN, ("y = MatMul(p", "d = Dropout(p, half, yes) y = MatMul(d"),
            ("<float s", "<float half = {0.5}, bool yes = {1}, float s"),
        ),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "why"), ALONE.values(), ids=ALONE)
def test_stays_as_it_is_and_says_why(text: str, why: str) -> None:
    model = ir.from_onnx_text(text)
    before = ir.to_proto(model)
    outcome = FuseAttention()(model)
    assert outcome.changed == 0
    assert ir.to_proto(model) == before
    if why:
        (left,) = outcome.left_alone
        assert left.where == "mix"
        assert why in left.why
    else:
        assert outcome.left_alone == ()


CLASSIFIER = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,2,4,8] x) => (float[N,2,4,8] y) { [classify] y = Softmax<axis=-1>(x) }
"""


@pytest.mark.parametrize(
    "text",
    [
        CLASSIFIER,
        CLASSIFIER.replace("y = Softmax<axis=-1>(x) }", "p = Softmax<axis=-1>(x) y = Relu(p) }"),
        CLASSIFIER.replace("y = Softmax<axis=-1>(x) }", "p = Softmax<axis=-1>(x) t = Transpose(p) y = MatMul(x, t) }"),
    ],
    ids=["of the graph", "of a node", "the right factor of a product"],
)
def test_a_softmax_that_multiplies_no_v_is_no_attention(text: str) -> None:
    model = ir.from_onnx_text(text)
    before = ir.to_proto(model)
    assert FuseAttention()(model).left_alone == ()
    assert ir.to_proto(model) == before


def test_below_opset_23_there_is_no_such_operator() -> None:
    model = ir.from_onnx_text(PLAIN.replace('"": 23', '"": 22'))
    outcome = FuseAttention()(model)
    assert outcome.changed == 0
    assert outcome.left_alone == (LeftAlone("Attention", "the operator exists from opset 23 on"),)
    assert "Softmax" in op_types(model)


def test_keeps_the_module_and_says_what_it_did() -> None:
    model = ir.from_onnx_text(FORMS["padding"])
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "blocks.0.attn"
    (change,) = FuseAttention()(model).changes
    assert change.where == "blocks.0.attn"
    assert "a query that it leaves no key gets 0" in change.what
    assert {node.metadata_props[MODULE_KEY] for node in model.graph} == {"blocks.0.attn"}
    assert "blocks.0.attn/Attention" in [node.name for node in model.graph]


def test_a_query_that_a_dynamic_mask_leaves_no_key_gets_zero(run: Run) -> None:
    """As the outcome says: NaN from -inf, and the mean of v from float32's lowest, are 0 from the operator."""
    model = ir.from_onnx_text(FORMS["dynamic"])
    inputs = random_inputs(model)
    for low, expected in ((-np.inf, np.nan), (LOWEST_FLOAT, None)):
        inputs["m"] = np.zeros((6, 2, 4, 6), np.float32)
        inputs["m"][:, :, 1] = low
        before = run(model, **inputs)
        clone = model.clone()
        FuseAttention()(clone)
        after = run(clone, **inputs)
        assert np.abs(np.delete(after - before, 1, axis=2)).max() <= 2e-6
        assert not after[:, :, 1].any()
        mean = np.asarray(inputs["v"]).mean(axis=2)
        assert np.isnan(before[:, :, 1]).all() if expected is not None else np.allclose(before[:, :, 1], mean)


def test_a_guard_answers_zero_before_and_after(run: Run) -> None:
    model = ir.from_onnx_text(
        replaced(
            with_mask("c = Add(b, m)", inputs=", float[N,2,4,6] m", constants="float zero = {0}"),
            GUARD, ("<float[N,2,4,6] c", "<bool[N,2,4,6] n, float[N,2,4,6] r, float[N,2,4,6] c"),
        )
    )  # fmt: skip
    inputs = random_inputs(model)
    inputs["m"][:, :, 2] = -np.inf
    before = run(model, **inputs)
    (change,) = FuseAttention()(model).changes
    assert "leaves no key" not in change.what
    assert not before[:, :, 2].any()
    assert np.abs(run(model, **inputs) - before).max() <= 2e-6


def test_nan_in_the_scores_is_nan_in_the_output_unless_it_is_guarded(run: Run) -> None:
    for form in ("scale after", "guard"):
        model = ir.from_onnx_text(FORMS[form])
        inputs = random_inputs(model)
        inputs["q"][0, 0, 0, 0] = np.nan
        before = run(model, **inputs)
        FuseAttention()(model)
        assert np.array_equal(np.isnan(run(model, **inputs)), np.isnan(before))
        assert np.isnan(before).any() == (form == "scale after")


@pytest.mark.parametrize("low", [-np.inf, LOWEST_FLOAT])
def test_a_mask_is_stored_with_numbers_that_float16_holds(low: float) -> None:
    model = ir.from_onnx_text(with_mask("c = Add(b, m)", constants=numbers(4, 6, low=low)))
    FuseAttention()(model)
    assert mask_of(fused(model)).min() == LOWEST


@pytest.mark.parametrize(
    "mask", ["bool[4,6] m = {" + ", ".join("1" * 24) + "}", "float[6] m = {0,0,0,0,0,0}", "float[4,1] m = {0, 1, 2, 3}"]
)
def test_a_mask_that_masks_nothing_is_dropped(mask: str, run: Run) -> None:
    """Within 2e-6."""
    boolean = mask.startswith("bool")
    how = "c = Where(m, b, low)" if boolean else "c = Add(b, m)"
    model = ir.from_onnx_text(with_mask(how, constants=f"{mask}, float low = {{-1e9}}"))
    inputs = random_inputs(model)
    before = run(model, **inputs)
    FuseAttention()(model)
    assert len(fused(model).inputs) == 3
    assert list(model.graph.initializers) == []
    assert np.abs(run(model, **inputs) - before).max() <= 2e-6


OPERATOR = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,2,4,8] q, float[N,2,6,8] k, float[N,2,6,5] v) => (float[N,2,4,5] y)
    <MASK>
    { HOW [mix] y = Attention<scale=0.3>(q, k, v, m) }
"""


def operator(mask: str, how: str = "") -> str:
    return OPERATOR.replace("MASK", mask).replace("HOW", how)


WINDOW_OPERATOR = operator(
    f"""{numbers(1, 3, 1, 4, 6, low=-100, name="w")}, int64[1] count = {{3}}, int64[4] lengths = {{3,1,4,6}},
        int64[4] together = {{-1,1,4,6}}, float[B,3,1,4,6] e, float[N,1,4,6] m""",
    """n = Shape<start=0, end=1>(q) images = Div(n, count) shape = Concat<axis=0>(images, lengths)
       e = Expand(w, shape) m = Reshape(e, together)""",
)


@pytest.mark.parametrize(
    ("text", "inputs", "shape"),
    [
        (operator("bool[4,6] m = {" + ", ".join("1" * 24) + "}"), 3, None),
        (operator("float[1,1,4,6] m = {" + ", ".join("0" * 24) + "}"), 3, None),
        (operator(numbers(4, 6, low=LOWEST_FLOAT)), 4, (1, 1, 4, 6)),
        (operator(numbers(4, 6, low=-np.inf)), 4, (1, 1, 4, 6)),
        (
            WINDOW_OPERATOR,
            4,
            (1, 6, 4, 6),
        ),
        (
            operator(
                f"{numbers(1, 1, 1, 6, name='w')}, int64[3] lengths = {{1,4,6}}, float[N,1,4,6] m",
                "n = Shape<start=0, end=1>(q) shape = Concat<axis=0>(n, lengths) m = Expand(w, shape)",
            ),
            4,
            (1, 1, 4, 6),
        ),
    ],
    ids=["all true", "all zero", "float32 min", "-inf", "windows", "the same for all queries"],
)
def test_gives_an_operator_the_smallest_mask(text: str, inputs: int, shape: tuple[int, ...] | None, run: Run) -> None:
    """Within 2e-6."""
    model = ir.from_onnx_text(text)
    values = random_inputs(model)
    before = run(model, **values)
    outcome = FuseAttention()(model)
    assert (outcome.changed, outcome.left_alone) == (1, ())
    node = fused(model)
    assert len(node.inputs) == inputs
    if shape is not None:
        assert mask_of(node).shape == shape
        assert mask_of(node).min() >= LOWEST
    assert scale_of(node) == pytest.approx(0.3)
    assert np.abs(run(model, **values) - before).max() <= 2e-6
    once = ir.to_proto(model)
    assert FuseAttention()(model).changed == 0
    assert ir.to_proto(model) == once


@pytest.mark.parametrize(
    "text",
    [
        operator(numbers(4, 6)),
        operator(numbers(2, 4, 6, low=-100)),
        operator(booleans(4, 6)),
        operator("float[N,2,4,6] m", "m = Relu(x)").replace("v)", "v, float[N,2,4,6] x)", 1),
        operator("double[4,6] m = {" + ", ".join("0" * 24) + "}"),
        operator("int64[4,6] m = {" + ", ".join("0" * 24) + "}"),
        operator("float[4,6] m = {" + ", ".join("0" * 24) + "}").replace("scale=0.3", "is_causal=1"),
        operator("float[4,6] m = {" + ", ".join("0" * 24) + "}").replace("N,2,4,8", "N,4,16").replace("N,2,6", "N,6"),
        operator("").replace(", m)", ")").replace("<>", ""),
    ],
    ids=["float", "3-D", "boolean", "dynamic", "another type", "integers", "causal", "3-D inputs", "none"],
)
def test_keeps_the_mask_of_an_operator(text: str) -> None:
    model = ir.from_onnx_text(text)
    before = ir.to_proto(model)
    outcome = FuseAttention()(model)
    assert (outcome.changed, outcome.left_alone) == (0, ())
    assert ir.to_proto(model) == before


def test_windows_of_an_operator_whose_query_heads_share_key_heads_stay() -> None:
    text = WINDOW_OPERATOR
    model = ir.from_onnx_text(text.replace("N,2,6", "N,1,6"))
    assert FuseAttention()(model).left_alone == (LeftAlone("mix", "its query heads share key heads"),)


def test_an_operator_whose_mask_leaves_a_query_no_key_stays() -> None:
    model = ir.from_onnx_text(operator(NO_KEY.replace("LOW", "-inf")))
    outcome = FuseAttention()(model)
    assert outcome.left_alone == (LeftAlone("mix", "its mask leaves some query no key"),)


def test_fuses_below_opset_23_what_is_lowered_again_and_not_what_was(run: Run) -> None:
    """Within 2e-6."""
    model = ir.from_onnx_text(FORMS["windows"].replace('"": 23', '"": 21'))
    inputs = random_inputs(model)
    before = run(model, **inputs)
    assert FuseAttention(lowered=True)(model).changed == 1
    LowerAttention()(model)
    assert np.abs(run(model, **inputs) - before).max() <= 2e-6
    lowered = ir.to_proto(model)
    assert FuseAttention(lowered=True)(model).changed == 0
    assert ir.to_proto(model) == lowered


ONE_VALUE = replaced(
    plain(keys=4), ("float[N,2,4,8] q, float[N,2,4,8] k", "float[N,2,4,8] q"), ("Transpose<perm=[0,1,3,2]>(k)",
    "Transpose<perm=[0,1,3,2]>(q)"),
)  # fmt: skip


def test_leaves_an_attention_whose_query_and_key_are_one_value() -> None:
    model = ir.from_onnx_text(ONE_VALUE)
    before = [node.op_type for node in model.graph]
    for _ in range(2):
        outcome = FuseAttention()(model)
        assert (outcome.changed, outcome.left_alone) == (0, (LeftAlone("mix", SAME),))
        assert [node.op_type for node in model.graph] == before


def test_fuses_one_value_where_it_is_written_out_again(run: Run) -> None:
    model = ir.from_onnx_text(ONE_VALUE)
    inputs = {value.name or "": np.random.default_rng(0).standard_normal((3, 2, 4, size), np.float32)
              for value, size in zip(model.graph.inputs, (8, 5), strict=True)}  # fmt: skip
    expected = run(model, **inputs)
    assert FuseAttention(lowered=True)(model).changed == 1
    LowerAttention()(model)
    np.testing.assert_allclose(run(model, **inputs), expected, rtol=1e-5, atol=1e-6)
