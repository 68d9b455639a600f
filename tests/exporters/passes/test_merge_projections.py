from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from exporters.linears import array_of, find_linears
from exporters.module_names import MODULE_KEY
from exporters.passes.merge_projections import MergeProjections
from exporters.passes.outcome import LeftAlone
from exporters.save_onnx import save_onnx

Array = npt.NDArray[np.generic]
Run = Callable[..., npt.NDArray[np.float32]]

# Tokens [N,3,8] to two heads of 4 each.
SEPARATE = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,3,8] x) => (float[N,2,3,4] y)
    <int64[4] shape = {0, -1, 2, 4}, float[8,8] w_q, float[8,8] w_k, float[8,8] w_v, float[8] b_q, float[8] b_k,
     float[8] b_v, float[N,3,2,4] q2, float[N,3,2,4] k2, float[N,3,2,4] v2, float[N,2,3,4] q, float[N,2,3,4] k,
     float[N,2,3,4] v, float[N,3,8] q0, float[N,3,8] k0, float[N,3,8] v0>
    {
        [q_product] q0 = MatMul(x, w_q)
        [q_bias] q1 = Add(q0, b_q)
        [q_reshape] q2 = Reshape(q1, shape)
        [q_transpose] q = Transpose<perm=[0,2,1,3]>(q2)
        [k_product] k0 = MatMul(x, w_k)
        [k_bias] k1 = Add(b_k, k0)
        [k_reshape] k2 = Reshape(k1, shape)
        [k_transpose] k = Transpose<perm=[0,2,1,3]>(k2)
        [v_product] v0 = MatMul(x, w_v)
        [v_bias] v1 = Add(v0, b_v)
        [v_reshape] v2 = Reshape(v1, shape)
        [v_transpose] v = Transpose<perm=[0,2,1,3]>(v2)
        [mix] y = Attention(q, k, v)
    }
"""
PARTS = ["Slice", "Squeeze"]
MERGED = ["MatMul", "Add", "Reshape", "Transpose", *PARTS * 3, "Attention"]


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """`text` with each of the first replaced by the second; each is there."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


NO_BIAS = replaced(SEPARATE, ("Add(q0, b_q)", "Identity(q0)"), ("Add(b_k, k0)", "Identity(k0)")).replace(
    "Add(v0, b_v)", "Identity(v0)"
)


def without_bias(text: str, *names: str) -> str:
    for name in names:
        text = replaced(text, (f"Reshape({name}1", f"Reshape({name}0"), (f"[{name}_bias] ", f"[{name}_bias] # "))
    return "\n".join(line for line in text.splitlines() if "# " not in line)


CROSS = replaced(
    SEPARATE, ("float[N,3,8] x)", "float[N,3,8] x, float[N,5,8] e)"), ("MatMul(x, w_k)", "MatMul(e, w_k)"),
    ("MatMul(x, w_v)", "MatMul(e, w_v)"), ("float[N,3,2,4] k2", "float[N,5,2,4] k2"),
    ("float[N,3,2,4] v2", "float[N,5,2,4] v2"), ("float[N,2,3,4] k,", "float[N,2,5,4] k,"),
    ("float[N,2,3,4] v,", "float[N,2,5,4] v,"),
    ("float[N,3,8] k0, float[N,3,8] v0", "float[N,5,8] k0, float[N,5,8] v0"),
)  # fmt: skip
DYNAMIC = replaced(SEPARATE, (",3,", ",T,"))


def filled(text: str, **arrays: Array) -> ir.Model:
    """The model with the weights and biases that it declares, drawn, and `arrays`; nodes in modules of their names."""
    model = ir.from_onnx_text(text)
    random = np.random.default_rng(0)
    for node in model.graph:
        name = (node.name or "").split("_")[0]
        node.metadata_props[MODULE_KEY] = f"layers.0.{name}_proj" if name in "qkv" else "layers.0"
        for value in node.inputs:
            if value is None or value.producer() is not None or value.is_graph_input() or value.is_initializer():
                continue
            shape = [dim for dim in value.shape or () if isinstance(dim, int)]
            array = arrays.get(value.name or "", random.standard_normal(shape, np.float32))
            value.const_value = ir.tensor(array, name=value.name)
            value.shape, value.dtype = ir.Shape(array.shape), value.const_value.dtype
            model.graph.register_initializer(value)
    return model


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def random_inputs(model: ir.Model) -> dict[str, Array]:
    """Normal values with a batch, or as many tokens, of 5."""
    random = np.random.default_rng(1)
    return {
        value.name or "": random.standard_normal(
            [d if isinstance(d, int) else 5 for d in value.shape or ()], np.float32
        )
        for value in model.graph.inputs
    }


def check(model: ir.Model, run: Run, nodes: list[str]) -> None:
    """Merging leaves `nodes`, a valid graph, the numbers within 1e-6 of the largest, and nothing for a second run."""
    inputs = random_inputs(model)
    before = run(model, **inputs)
    outcome = MergeProjections()(model)
    assert (outcome.name, outcome.changed, outcome.left_alone) == ("merge projections", 1, ())
    assert op_types(model) == nodes
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert np.abs(run(model, **inputs) - before).max() <= 1e-6 * np.abs(before).max()
    once = ir.to_proto(model)
    assert MergeProjections()(model).changed == 0
    assert ir.to_proto(model) == once


KV_OF_ITS_OWN = replaced(
    SEPARATE, ("float[N,3,8] x)", "float[N,3,8] x, float[N,3,8] e)"), ("MatMul(x, w_q)", "MatMul(e, w_q)")
)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        (SEPARATE, MERGED),
        (without_bias(SEPARATE, "k"), MERGED),
        (without_bias(SEPARATE, "q", "k", "v"), [node for node in MERGED if node != "Add"]),
        (replaced(SEPARATE, ("float[8] b_q", "float[1] b_q")), MERGED),
        (replaced(SEPARATE, ("N,3", "5,3"), ("[N,2", "[5,2")), MERGED),
        (DYNAMIC, MERGED),
        (replaced(DYNAMIC, ("{0, -1, 2, 4}", "{1, -1, 2, 4}"), ("[N,", "[1,")), MERGED),
        (replaced(SEPARATE, ("[mix] y = Attention(q, k, v)", "[mix] y = Attention(v, k, q)")), MERGED),
        (
            replaced(SEPARATE, ("N,2,3,4] y)", "N,2,3,4] y, float[N,3,8] r)"), ("[mix]", "[other] r = Relu(x) [mix]")),
            [*MERGED[:-1], "Relu", "Attention"],
        ),
        (CROSS, ["MatMul", "Add", "Reshape", "Transpose", *MERGED[:4], *PARTS * 2, "Attention"]),
        (KV_OF_ITS_OWN, ["MatMul", "Add", "Reshape", "Transpose", *MERGED[:4], *PARTS * 2, "Attention"]),
    ],
    ids=[
        "biases", "none for k", "no biases", "one number as bias", "fixed batch", "dynamic tokens",
        "dynamic tokens by their name", "another order", "read by others too", "cross-attention",
        "two inputs",
    ],
)  # fmt: skip
def test_merges_what_reads_one_tensor(text: str, nodes: list[str], run: Run) -> None:
    check(filled(text), run, nodes)


def test_merges_behind_windows_that_became_heads(run: Run) -> None:
    folded = replaced(
        SEPARATE, ("[mix] y = Attention(q, k, v)", "qf = Reshape(q, f) kf = Reshape(k, f) vf = Reshape(v, f)\n"
        "[mix] yf = Attention(qf, kf, vf) y = Reshape(yf, g)"),
        ("<int64[4] shape", "<int64[4] f = {-1, 10, 3, 4}, int64[4] g = {-1, 2, 3, 4}, int64[4] shape"),
    )  # fmt: skip
    check(filled(folded), run, [*MERGED[:-1], "Reshape", "Reshape", "Reshape", "Attention", "Reshape"])


def test_keeps_the_modules() -> None:
    model = filled(SEPARATE)
    MergeProjections()(model)
    modules = {node.op_type: node.metadata_props[MODULE_KEY] for node in model.graph}
    assert modules["MatMul"] == modules["Add"] == "layers.0.q_proj+k_proj+v_proj"
    assert modules["Attention"] == "layers.0"
    (linear,) = find_linears(model.graph)
    assert (linear.module, linear.k, linear.n) == ("layers.0.q_proj+k_proj+v_proj", 8, 24)
    assert set(model.graph.initializers) >= {
        "layers.0.q_proj+k_proj+v_proj.weight", "layers.0.q_proj+k_proj+v_proj.bias",
    }  # fmt: skip
    assert "w_q" not in model.graph.initializers


def test_names_nothing_where_no_module_is_known(run: Run) -> None:
    model = filled(SEPARATE)
    for node in model.graph:
        del node.metadata_props[MODULE_KEY]
    check(model, run, MERGED)
    assert all(node.metadata_props.get(MODULE_KEY) is None for node in model.graph)


def test_reads_no_weight_until_it_is_saved(tmp_path: Path) -> None:
    model = filled(SEPARATE)
    held = {name: array_of(model.graph.initializers[name]) for name in ("w_q", "w_k", "w_v")}
    reading: list[str] = []

    def unread(name: str) -> ir.TensorProtocol:
        reading.append(name)
        return ir.tensor(held[name], name=name)

    for name in held:
        shape = ir.Shape([8, 8])
        reader = functools.partial(unread, name)
        model.graph.initializers[name].const_value = ir.LazyTensor(reader, ir.DataType.FLOAT, shape, name=name)
    assert MergeProjections()(model).changed == 1
    list(find_linears(model.graph))
    assert reading == []
    save_onnx(model, tmp_path / "model.onnx")
    assert sorted(set(reading)) == ["w_k", "w_q", "w_v"]
    saved = ir.load(tmp_path / "model.onnx").graph.initializers["layers.0.q_proj+k_proj+v_proj.weight"]
    assert np.array_equal(array_of(saved), np.concatenate(list(held.values()), axis=1))


def test_weights_of_a_file_beside_it(tmp_path: Path, run: Run) -> None:
    ir.save(filled(SEPARATE), tmp_path / "model.onnx", external_data="weights.bin", size_threshold_bytes=100)
    model = ir.load(tmp_path / "model.onnx")
    assert isinstance(model.graph.initializers["w_q"].const_value, ir.ExternalTensor)
    check(model, run, MERGED)


QUANTIZED = replaced(
    SEPARATE,
    ("MatMul(x, w_q)", "MatMul(x_q, d_q)"), ("MatMul(x, w_k)", "MatMul(x_k, d_k)"),
    ("MatMul(x, w_v)", "MatMul(x_v, d_v)"),
    ("[q_product]", """[in] i = QuantizeLinear(x, s, z) [in_q] x_q = DequantizeLinear(i, s, z)
        [q_dq] d_q = DequantizeLinear<axis=1>(w_q, s_q, z_q)
        [q_product]"""),
    ("[k_product]", """[in_k] x_k = DequantizeLinear(i, s, z)
        [k_dq] d_k = DequantizeLinear<axis=1>(w_k, s_k, z_k)
        [k_product]"""),
    ("[v_product]", """[in_v] x_v = DequantizeLinear(i, s, z)
        [v_dq] d_v = DequantizeLinear<axis=1>(w_v, s_v, z_v)
        [v_product]"""),
    ("float[8,8] w_q, float[8,8] w_k, float[8,8] w_v", """int8[8,8] w_q, int8[8,8] w_k, int8[8,8] w_v, float s = {0.02},
     int8 z = {0}, float[8] s_q, float[8] s_k, float[8] s_v, int8[8] z_q, float[8] t, int8[8] z_k, int8[8] z_v,
     float[N,3,8] x_q"""),
)  # fmt: skip
QUANTIZED_MERGED = ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", *MERGED]


def quantized(scales: dict[str, Array], dtype: npt.DTypeLike = np.int8) -> dict[str, Array]:
    """Integers, the scales and zero-points of 0 for the three weights."""
    random = np.random.default_rng(3)
    low, high = (-8, 8) if dtype == ml_dtypes.int4 else (-128, 128)
    arrays: dict[str, Array] = {}
    for name, scale in scales.items():
        arrays[f"w_{name}"] = random.integers(low, high, (8, 8)).astype(dtype)
        arrays[f"s_{name}"] = scale
        arrays[f"z_{name}"] = np.zeros(scale.shape, dtype)
    return arrays


def drawn(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(4).uniform(0.001, 0.01, shape).astype(np.float32)


def merged_scale(model: ir.Model) -> Array:
    (linear,) = find_linears(model.graph)
    scale = linear.weight_scale
    assert scale is not None
    return scale


@pytest.mark.parametrize("per_tensor", ["", "q", "kv", "qkv"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_of_channels_and_whole_weights_stay_bit_for_bit(
    per_tensor: str, shape: tuple[int, ...], run: Run
) -> None:
    scales: dict[str, Array] = {name: drawn(8) * (index + 1) for index, name in enumerate("qkv")}
    scales |= {name: scales[name][:1].reshape(shape) for name in per_tensor}
    model = filled(QUANTIZED, **quantized(scales))
    check(model, run, QUANTIZED_MERGED)
    scale = merged_scale(model)
    expected = np.concatenate([np.broadcast_to(scales[name], 8) for name in "qkv"])
    assert scale.dtype == np.float32
    assert scale.tobytes() == expected.tobytes()


def test_blocks_of_four_bits_stay_bit_for_bit(run: Run) -> None:
    text = replaced(
        QUANTIZED, ("<axis=1>", "<axis=0, block_size=4>"), ("int8[8,8]", "int4[8,8]"), ("int8[8] z", "int4[2,8] z"),
        ("float[8] s", "float[2,8] s"), ("MatMul(x_q, ", "MatMul(x, "), ("MatMul(x_k, ", "MatMul(x, "),
        ("MatMul(x_v, ", "MatMul(x, "), ("[in] i = QuantizeLinear(x, s, z) [in_q] x_q = DequantizeLinear(i, s, z)", ""),
        ("[in_k] x_k = DequantizeLinear(i, s, z)", ""), ("[in_v] x_v = DequantizeLinear(i, s, z)", ""),
    )  # fmt: skip
    scales: dict[str, Array] = {name: drawn(2, 8) * (index + 1) for index, name in enumerate("qkv")}
    model = filled(text, **quantized(scales, ml_dtypes.int4))
    check(model, run, ["DequantizeLinear", *MERGED])
    assert merged_scale(model).tobytes() == np.concatenate(list(scales.values()), axis=1).tobytes()
    (linear,) = find_linears(model.graph)
    assert linear.weight_type == "int4"


def test_one_q_keeps_one_dq_for_the_merged_product(run: Run) -> None:
    model = filled(QUANTIZED, **quantized({name: drawn(8) for name in "qkv"}))
    check(model, run, QUANTIZED_MERGED)
    (linear,) = find_linears(model.graph)
    assert linear.activation_type == "int8"
    assert linear.input_scale == np.float32(0.02)


def test_reads_the_dq_of_the_first_product_whichever_is_first(run: Run) -> None:
    """The graph computes v, then q and k: what v reads is there ahead of all three."""
    lines = QUANTIZED.splitlines()
    v_first = [line for line in lines if line.strip().startswith(("[in_v]", "[v_"))]
    first = next(index for index, line in enumerate(lines) if line.strip().startswith("[in]"))
    start = lines[first].index("[in_q]")
    quantizer, rest = lines[first][:start], lines[first][start:]
    others = [rest, *(line for line in lines[first + 1 :] if line not in v_first)]
    model = filled("\n".join([*lines[:first], quantizer, *v_first, *others]), **quantized({n: drawn(8) for n in "qkv"}))
    check(model, run, QUANTIZED_MERGED)


ALONE = {
    "shared key heads": (
        replaced(
            SEPARATE, ("Reshape(k1, shape)", "Reshape(k1, one)"), ("Reshape(v1, shape)", "Reshape(v1, one)"),
            ("float[8,8] w_k, float[8,8] w_v", "float[8,4] w_k, float[8,4] w_v, int64[4] one = {0, -1, 1, 4}"),
            ("float[8] b_k", "float[4] b_k"), ("float[8] b_v", "float[4] b_v"), ("N,3,2,4] k2", "N,3,1,4] k2"),
            ("N,3,2,4] v2", "N,3,1,4] v2"), ("N,2,3,4] k,", "N,1,3,4] k,"), ("N,2,3,4] v,", "N,1,3,4] v,"),
            ("float[N,3,8] k0, float[N,3,8] v0", "float[N,3,4] k0, float[N,3,4] v0"),
        ),
        "its projections have different numbers of heads",
    ),
    "an unknown shape": (
        replaced(SEPARATE, ("float[N,3,2,4] q2, float[N,3,2,4] k2, float[N,3,2,4] v2,", "")),
        "its projections are reshaped to more than heads",
    ),
    "tokens that a reshape multiplies": (
        replaced(SEPARATE, ("{0, -1, 2, 4}", "{0, -1, 1, 4}"), ("N,3,2,4", "N,6,1,4"), ("N,2,3,4", "N,1,6,4")),
        "its projections are reshaped to more than heads",
    ),
    "rows that a reshape takes apart": (
        replaced(DYNAMIC, ("{0, -1, 2, 4}", "{-1, 7, 2, 4}"), ("N,T,2,4", "M,U,2,4"), ("N,2,T,4", "M,2,U,4")),
        "its projections are reshaped to more than heads",
    ),
    "quantized and not": (
        replaced(QUANTIZED, ("MatMul(x_q, d_q)", "MatMul(x_q, f)"), ("int8 z =", "float[8,8] f, int8 z =")),
        "its projections are quantized in different ways",
    ),
    "scales along K": (
        replaced(QUANTIZED, ("<axis=1>(w_k", "<axis=0>(w_k")),
        "its weights have scales along K",
    ),
    "scales along K, counted from the end": (
        replaced(QUANTIZED, ("<axis=1>(w_k", "<axis=-2>(w_k")),
        "its weights have scales along K",
    ),
    "blocks along N": (
        replaced(
            QUANTIZED, ("<axis=1>", "<axis=1, block_size=4>"), ("float[8] s", "float[8,2] s"),
            ("int8[8] z", "int8[8,2] z"),
        ),
        "its weights have blocks along N",
    ),
    "a scale that is computed": (
        replaced(QUANTIZED, ("[k_dq] d_k = DequantizeLinear<axis=1>(w_k, s_k",
                             "t = Abs(s_k) [k_dq] d_k = DequantizeLinear<axis=1>(w_k, t")),
        "the scales of its weights are no constants",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "why"), ALONE.values(), ids=ALONE)
def test_leaves_projections_that_differ_alone_and_says_why(text: str, why: str) -> None:
    blocks = "block_size" in text
    model = filled(
        text, **(quantized({n: drawn(8, 2) if blocks else drawn(8) for n in "qkv"}) if "s_q" in text else {})
    )
    before = ir.to_proto(model)
    assert MergeProjections()(model).left_alone == (LeftAlone("layers.0", why),)
    assert ir.to_proto(model) == before


@pytest.mark.parametrize(
    "text",
    [
        replaced(KV_OF_ITS_OWN, ("MatMul(x, w_k)", "MatMul(z, w_k)"), ("x, float", "x, float[N,3,8] z, float")),
        replaced(
            SEPARATE, ("perm=[0,2,1,3]", "perm=[0,2,3,1]"), ("{0, -1, 2, 4}", "{0, 4, 2, -1}"), ("N,3,2,4", "N,4,2,3"),
        ),
        replaced(SEPARATE, ("MatMul(x, w_k)", "MatMul(x, t)"), ("[k_product]", "t = Relu(w_k) [k_product]")).replace(
            "MatMul(x, w_v)", "MatMul(z, w_v)").replace("[v_product]", "z = Relu(x) [v_product]"),
        replaced(SEPARATE, ("N,2,3,4] y)", "N,2,3,4] y, float[N,3,8] k0, float[N,3,8] v0)"),
                 (", float[N,3,8] k0, float[N,3,8] v0>", ">")),
        replaced(QUANTIZED, ("x_k = DequantizeLinear(i, s, z)", "x_k = DequantizeLinear(i, t, z)"),
                 ("x_v = DequantizeLinear(i, s, z)", "x_v = DequantizeLinear(i, u, z)"),
                 ("float s =", "float t = {0.03}, float u = {0.04}, float s =")),
        replaced(SEPARATE, ("Attention(q, k, v)", "Attention(q, q, q)")),
    ],
    ids=["three tensors", "another transpose", "no constant", "read as outputs", "three scales", "one for all"],
)  # fmt: skip
def test_what_is_no_group_of_projections_is_passed_over(text: str) -> None:
    model = filled(text, **(quantized({name: drawn(8) for name in "qkv"}) if "s_q" in text else {}))
    before = ir.to_proto(model)
    outcome = MergeProjections()(model)
    assert (outcome.changed, outcome.left_alone) == (0, ())
    assert ir.to_proto(model) == before
