from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.ranges import measure_amax
from exporters.linears import array_of, find_linears
from exporters.lint import lint
from exporters.module_names import MODULE_KEY
from exporters.passes.lower_attention import LowerAttention
from exporters.passes.lower_fake_quantize import LowerFakeQuantize
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.passes.place_quantizers import Measure, PlaceQuantizers
from exporters.passes.type_floats import TypeFloats
from exporters.quantizer import spread
from profiles.device import FloatType
from profiles.errors import GpusqError

Array = npt.NDArray[np.generic]
Float = npt.NDArray[np.float32]
Run = Callable[..., Float]

LINEAR = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,32] x) => (float[N,16] y)
    <float[32,16] w, float[16] b, float[N,16] h>
    { [fc] h = MatMul(x, w) [bias] y = Add(h, b) }
"""
GEMM = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,32] x) => (float[N,16] y)
    <float[16,32] w, float[16] b>
    { [fc] y = Gemm<transB=1>(x, w, b) }
"""
CONV = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,16,6,6] x) => (float[N,32,4,4] y)
    <float[32,16,3,3] w, float[32] b, float[N,16,6,6] r>
    { [relu] r = Relu(x) [fc] y = Conv(r, w, b) }
"""
ALL = get_args(FloatType)
BATCH = 4


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """`text` with each of the first replaced by the second; each is there."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def through(text: str, node: str, weight: str) -> str:
    """`text` with a stored weight that `node` makes the layer's weight of."""
    before = text[text.index("<float[") + 1 :].split(" w,")[0]
    return replaced(text, (f"{before} w", f"{weight}, {before} t"), ("[fc]", f"t = {node} [fc]"), ("x, w)", "x, t)"))


def filled(text: str, **arrays: Array) -> ir.Model:
    """The model with the constants that it declares, drawn, or given."""
    model = ir.from_onnx_text(text)
    random = np.random.default_rng(0)
    for value in [value for node in model.graph for value in node.inputs if value is not None]:
        if value.producer() is not None or value.is_graph_input() or value.is_initializer():
            continue
        shape = [dim for dim in value.shape or () if isinstance(dim, int)]
        array = arrays.get(value.name or "", random.standard_normal(shape, np.float32))
        value.const_value = ir.tensor(array, name=value.name)
        value.shape, value.dtype = ir.Shape(array.shape), value.const_value.dtype
        model.graph.register_initializer(value)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = node.name or ""
    return model


def samples(model: ir.Model) -> dict[str, Array]:
    random = np.random.default_rng(1)
    shapes = {
        v.name or "": [dim if isinstance(dim, int) else BATCH for dim in v.shape or ()] for v in model.graph.inputs
    }
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def measured(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
    """The ranges on `samples`."""
    return measure_amax(model, names, samples(model), BATCH)


def place(model: ir.Model, placement: str = "w8a8-linear", float_type: FloatType = "float32") -> Outcome:
    return PlaceQuantizers(placement, measured, float_type)(model)


def quantized(model: ir.Model, placement: str = "w8a8-linear", float_type: FloatType = "float32") -> Outcome:
    """Place the quantizers and turn them into Q/DQ: a valid graph, of which no rule of the lint is broken."""
    outcome = place(model, placement, float_type)
    LowerFakeQuantize()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return outcome


def places(outcome: Outcome) -> list[str]:
    return [change.where for change in outcome.changes]


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def producers(node: ir.Node) -> list[str]:
    """What makes its inputs, but for constants."""
    made = [None if value is None else value.producer() for value in node.inputs]
    return [producer.op_type for producer in made if producer is not None]


def run_unoptimized(model: ir.Model, **inputs: Array) -> Float:
    """As onnxruntime computes it node by node: its fused 4-bit product rounds the activations to 8 bits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return np.asarray(session.run(None, inputs)[0], np.float32)


def largest_error(model: ir.Model, x: Float, weight: Float) -> Float:
    """How far y = x·W may be off: half a step of every x and every w [K, N], and of both."""
    (linear,) = find_linears(model.graph)
    scale, input_scale = linear.weight_scale, linear.input_scale
    assert scale is not None
    of_w = np.broadcast_to(np.asarray(scale, np.float32), weight.shape) * np.float32(0.5)
    of_x = 0 if input_scale is None else input_scale / 2
    return np.asarray(np.abs(x) @ of_w + of_x * (np.abs(weight) + of_w).sum(axis=0), np.float32)


@pytest.mark.parametrize(
    ("text", "axis", "as_kn"),
    [
        (LINEAR, 1, lambda w: w),
        (GEMM, 0, np.transpose),
        (replaced(GEMM, ("<transB=1>", ""), ("[16,32] w", "[32,16] w")), 1, lambda w: w),
        (through(LINEAR, "Transpose<perm=[1,0]>(w)", "float[16,32] w"), 0, np.transpose),
        (through(LINEAR, "Squeeze(w, zero)", "float[1,32,16] w, int64[1] zero = {0}"), 2, lambda w: w[0]),
    ],
    ids=["MatMul", "Gemm, transposed", "Gemm", "Transpose", "Squeeze"],
)  # fmt: skip
@pytest.mark.parametrize("float_type", ALL)
def test_w8a8_is_within_its_steps(
    text: str, axis: int, as_kn: Callable[[Float], Float], float_type: FloatType, run: Run
) -> None:
    """Every entry of the output within what half a step of each factor allows, and 1e-4 for rounding."""
    model = filled(text)
    weight = as_kn(np.asarray(array_of(model.graph.initializers["w"]), np.float32))
    inputs = samples(model)
    before = run(model, **inputs)
    outcome = place(model, float_type=float_type)
    (quantizer,) = (node for node in model.graph if node.op_type == "FakeQuantize" and "axis" in node.attributes)
    assert quantizer.attributes["axis"].as_int() == axis
    LowerFakeQuantize()(model)
    assert (outcome.name, outcome.changed, outcome.left_alone) == ("place quantizers (w8a8-linear)", 2, ())
    assert places(outcome) == ["fc.input", "fc.weight"]
    assert lint(model) == []
    (linear,) = find_linears(model.graph)
    assert (linear.weight_type, linear.activation_type) == ("int8", "int8")
    x = np.asarray(inputs["x"], np.float32)
    error = np.abs(run(model, **inputs) - before)
    bound = largest_error(model, x, weight)
    assert (error <= bound + 1e-4).all()
    assert error.max() > 0


def test_a_second_run_changes_nothing_neither_before_nor_after_q_and_dq() -> None:
    for text in (LINEAR, RESIDUAL, ATTENTION):
        for placement in ("w8a8-linear", "sparse-int8", "w8a8-mha", "w4"):
            model = filled(text)
            LowerAttention()(model)
            place(model, placement)
            once = ir.to_proto(model)
            assert place(model, placement).changed == 0
            assert ir.to_proto(model) == once
            LowerFakeQuantize()(model)
            lowered = ir.to_proto(model)
            outcome = place(model, placement)
            assert (outcome.changed, ir.to_proto(model)) == (0, lowered)


@pytest.mark.parametrize("float_type", ALL)
@settings(deadline=None)
@given(
    amax=st.lists(st.floats(0, 60000, width=32), min_size=1, max_size=8),
    high=st.sampled_from([7, 127]),
)
def test_scales_are_positive_and_nothing_saturates(float_type: FloatType, amax: list[float], high: int) -> None:
    """amax / scale rounds to the highest integer at most; in a shorter type the scale is the next one up."""
    largest = np.array(amax, np.float32)
    scale = PlaceQuantizers("w8a8-linear", measured, float_type)._scale(largest, high, "fc.weight")
    assert scale.dtype == np.float32
    assert (scale > 0).all()
    assert (np.rint(largest / scale) <= high).all()
    alive = scale[largest > 0]
    wanted = np.maximum(largest[largest > 0] / np.float32(high), np.finfo(np.float32).smallest_normal)
    if float_type != "float32":
        short = ir.DataType[float_type.upper()].numpy()
        assert np.array_equal(alive.astype(short).astype(np.float32), alive)
        assert (alive >= wanted).all()
        lower = (alive.astype(short).view(np.uint16) - np.uint16(1)).view(short)
        assert (lower.astype(np.float32) < wanted).all()
    else:
        assert np.array_equal(alive, wanted)


def test_float16_scales_survive_typing_bit_for_bit() -> None:
    model = filled(LINEAR)
    quantized(model, float_type="float16")
    before = {name: array_of(value) for name, value in model.graph.initializers.items() if name.endswith("_scale")}
    assert len(before) == 2
    TypeFloats("float16")(model)
    for name, scale in before.items():
        typed = array_of(model.graph.initializers[name])
        assert typed.dtype == np.float16
        assert np.array_equal(typed.astype(np.float32), scale)


def test_dead_channels_and_inputs_get_a_positive_scale(run: Run) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    weight[:, 3] = 0
    model = filled(LINEAR, w=weight)
    zeros = {"x": np.zeros((4, 32), np.float32)}
    PlaceQuantizers("w8a8-linear", lambda model, names: measure_amax(model, names, zeros, BATCH), "float32")(model)
    LowerFakeQuantize()(model)
    (linear,) = find_linears(model.graph)
    assert linear.weight_scale is not None
    assert linear.weight_scale[3] == np.float32(1 / 127)
    assert linear.input_scale == np.float32(1 / 127)
    bias = array_of(model.graph.initializers["b"])
    assert np.array_equal(run(model, **zeros), np.broadcast_to(bias, (4, 16)))


@pytest.mark.parametrize(("amax", "float_type"), [(np.nan, "float32"), (np.inf, "float32"), (1e7, "float16")])
def test_a_range_that_no_scale_can_hold_is_refused_by_name(amax: float, float_type: FloatType) -> None:
    model = filled(LINEAR)
    placing = PlaceQuantizers("w8a8-linear", lambda _, names: dict.fromkeys(names, amax), float_type)
    with pytest.raises(GpusqError, match=r"the range of 'fc\.input' reaches .*: no float.. can be its scale"):
        placing(model)


def test_measures_each_tensor_once_and_on_the_float_graph() -> None:
    asked: list[tuple[list[str], list[str]]] = []

    def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        asked.append((list(names), op_types(model)))
        return dict.fromkeys(names, 1.0)

    model = filled(SHARED_INPUT)
    PlaceQuantizers("w8a8-linear", measure, "float32")(model)
    assert asked == [(["x"], ["MatMul", "MatMul", "Add"])]


def test_measures_nothing_where_only_weights_are_quantized() -> None:
    def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        raise AssertionError(names)

    model = filled(WIDE)
    assert PlaceQuantizers("w4", measure, "float32")(model).changed == 1


SHARED_INPUT = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,32] x) => (float[N,16] y)
    <float[32,16] w1, float[32,16] w2, float[N,16] a, float[N,16] b>
    { [a] a = MatMul(x, w1) [b] b = MatMul(x, w2) [sum] y = Add(a, b) }
"""


def test_two_readers_share_a_q_and_have_a_dq_each() -> None:
    model = filled(SHARED_INPUT)
    quantized(model)
    assert op_types(model).count("QuantizeLinear") == 1
    assert op_types(model).count("DequantizeLinear") == 4


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (replaced(LINEAR, (",32]", ",15]"), ("[32,", "[15,")), "K = 15 is below 16: slower in INT8"),
        (replaced(LINEAR, (",16]", ",15]"), ("float[16]", "float[15]")), "N = 15 is below 16: slower in INT8"),
        (replaced(LINEAR, ("[N,", "[1,")), "it multiplies a single row: slower in INT8"),
        (replaced(LINEAR, ("[N,", "[1,1,")), "it multiplies a single row: slower in INT8"),
        (
            replaced(
                LINEAR, ("x, w)", "w, x)"), ("[32,16] w", "[16,32] w"), ("[N,32] x", "[32,1] x"), ("[N,16]", "[16,1]"),
                ("float[16] b", "float[1] b"),
            ),
            "it multiplies a single row: slower in INT8",
        ),
    ],
    ids=["K", "N", "one row", "one row of more axes", "one column"],
)  # fmt: skip
def test_small_linear_layers_stay(text: str, why: str) -> None:
    model = filled(text)
    before = ir.to_proto(model)
    assert place(model).left_alone == (LeftAlone("fc", why),)
    assert ir.to_proto(model) == before


@pytest.mark.parametrize(
    "text",
    [LINEAR, replaced(LINEAR, ("[N,", "[2,")), replaced(LINEAR, ("[N,", "[1,M,")), replaced(LINEAR, ("[N,", "[1,7,"))],
    ids=["any number", "two", "one image of any tokens", "one image"],
)
def test_layers_of_more_than_one_row_are_quantized(text: str) -> None:
    assert place(filled(text)).changed == 2


FEW = "slower in INT8"
GROUPED = "a grouped convolution with few channels or a small kernel: slower in INT8"


@pytest.mark.parametrize(
    ("weight", "channels", "attributes", "why"),
    [
        ("32,16,3,3", 16, "", ""),
        ("16,16,1,1", 16, "", ""),
        ("32,3,3,3", 3, "", ""),
        ("32,3,3,5", 3, "", f"a convolution of 3 to 32 channels: {FEW}"),
        ("8,16,3,3", 16, "", ""),
        ("12,17,3,3", 17, "", f"a convolution of 17 to 12 channels: {FEW}"),
        ("8,8,3,3", 8, "", f"a convolution of 8 to 8 channels: {FEW}"),
        ("32,1,3,3", 32, "group=32", ""),
        ("32,1,1,1", 32, "group=32", GROUPED),
        ("20,1,3,3", 20, "group=20", GROUPED),
        ("32,1,2,3", 32, "group=32", GROUPED),
        ("32,16,1,1", 32, "group=2", ""),
        ("32,4,3,3", 32, "group=8", ""),
    ],
)
def test_convolutions(weight: str, channels: int, attributes: str, why: str) -> None:
    outputs = weight.split(",")[0]
    text = replaced(
        CONV, ("[N,16,6,6]", f"[N,{channels},6,6]"), ("[32,16,3,3] w", f"[{weight}] w"), ("[32] b", f"[{outputs}] b"),
        ("[N,32,4,4]", f"[N,{outputs},H,W]"), ("Conv(", f"Conv<{attributes}>(" if attributes else "Conv("),
    )  # fmt: skip
    outcome = place(filled(text))
    assert outcome.left_alone == ((LeftAlone("fc", why),) if why else ())
    assert outcome.changed == (0 if why else 2)


def test_the_first_convolution_of_a_small_image_is_quantized() -> None:
    text = replaced(
        CONV,
        ("[relu] r = Relu(x) ", ""),
        ("Conv(r", "Conv(x"),
        ("[N,16,6,6]", "[N,3,6,6]"),
        ("[32,16,", "[8,3,"),
        ("[32] b", "[8] b"),
        ("[N,32,4", "[N,8,4"),
    )
    assert place(filled(text)).changed == 2


def test_a_transposed_convolution_stays_in_float() -> None:
    text = replaced(
        CONV,
        ("Conv(", "ConvTranspose("),
        ("[32,16,3,3] w", "[32,32,3,3] w"),
        ("[N,16,6,6]", "[N,32,6,6]"),
        ("[N,32,4,4]", "[N,32,8,8]"),
    )
    outcome = place(filled(text))
    assert outcome.changed == 0
    assert [left.why for left in outcome.left_alone] == ["no kernel computes ConvTranspose on integers"]


# A CNN's block: the sum of a convolution's branch and the identity.
RESIDUAL = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,16,6,6] x) => (float[N,16,6,6] y)
    <float[16,16,3,3] w1, float[16,16,3,3] w2, float[N,16,6,6] r, float[N,16,6,6] a, float[N,16,6,6] b,
     float[N,16,6,6] c, float[N,16,6,6] s>
    {
        [stem] r = Relu(x)
        [conv1] a = Conv<pads=[1,1,1,1]>(r, w1)
        [act] b = Relu(a)
        [conv2] c = Conv<pads=[1,1,1,1]>(b, w2)
        [sum] s = Add(c, r)
        [out] y = Relu(s)
    }
"""


@pytest.mark.parametrize("text", [RESIDUAL, RESIDUAL.replace("Add(c, r)", "Add(r, c)")])
@pytest.mark.parametrize("placement", ["w8a8-linear", "sparse-int8"])
def test_the_sum_of_a_cnn_is_quantized_on_its_identity_alone(text: str, placement: str, run: Run) -> None:
    """Within 3 % of the largest output."""
    model = filled(text)
    inputs = samples(model)
    before = run(model, **inputs)
    outcome = quantized(model, placement)
    assert places(outcome) == ["conv1.input", "conv2.input", "sum.identity", "conv1.weight", "conv2.weight"]
    node = next(node for node in model.graph if node.name == "sum")
    assert set(producers(node)) == {"Conv", "DequantizeLinear"}
    assert op_types(model).count("QuantizeLinear") == 2  # of r, for conv1 and the sum, and of b
    assert np.abs(run(model, **inputs) - before).max() <= 0.03 * np.abs(before).max()


def test_of_two_convolutions_in_a_sum_one_is_quantized() -> None:
    text = replaced(
        RESIDUAL,
        ("Add(c, r)", "Add(c, d)"),
        ("[sum]", "[down] d = Conv(r, w3) [sum]"),
        ("w1,", "w1, float[16,16,1,1] w3,"),
    )
    outcome = quantized(filled(text))
    assert [where for where in places(outcome) if "identity" in where] == ["sum.identity"]


@pytest.mark.parametrize(
    "text",
    [
        replaced(
            RESIDUAL, ("Conv<pads=[1,1,1,1]>(b, w2)", "Conv<group=16>(b, w2)"), ("[16,16,3,3] w2", "[16,1,1,1] w2")
        ),
        replaced(RESIDUAL, ("[out]", "[also] t = Relu(c) [out]"), ("6,6] y)", "6,6] y, float[N,16,6,6] t)")),
        replaced(RESIDUAL, ("Add(c, r)", "Add(c, e)"), ("<float[16", "<float[16,1,1] e, float[16")),
    ],
    ids=["a convolution that stays", "a branch that is read elsewhere", "a constant"],
)
def test_sums_that_are_no_residual_of_a_quantized_convolution_stay(text: str) -> None:
    assert not [where for where in places(place(filled(text))) if "identity" in where]


TRANSFORMER = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,5,32] x) => (float[N,5,32] y)
    <float[32,64] w1, float[64,32] w2, float[32] b, float[N,5,64] h, float[N,5,64] a, float[N,5,32] o, float[N,5,32] p>
    {
        [fc1] h = MatMul(x, w1)
        [act] a = Gelu(h)
        [fc2] o = MatMul(a, w2)
        [bias] p = Add(o, b)
        [residual] y = Add(x, p)
    }
"""


def test_the_sum_of_a_transformer_stays(run: Run) -> None:
    """Within 2 % of the largest output."""
    model = filled(TRANSFORMER)
    inputs = samples(model)
    before = run(model, **inputs)
    outcome = quantized(model)
    assert places(outcome) == ["fc1.input", "fc2.input", "fc1.weight", "fc2.weight"]
    assert np.abs(run(model, **inputs) - before).max() <= 0.02 * np.abs(before).max()


def test_biases_stay() -> None:
    for text in (LINEAR, GEMM, CONV, TRANSFORMER):
        model = filled(text)
        bias = array_of(model.graph.initializers["b"])
        quantized(model, "sparse-int8")
        assert array_of(model.graph.initializers["b"]).tobytes() == bias.tobytes()


QUANTIZED = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,32] x) => (float[N,16] y)
    <float s = {0.0173}, int8 z = {0}, int8[32,32] w, float[32] sw, int8[32] zw, float[32,16] w2, float[N,32] d,
     float[N,32] h, int8[N,32] q>
    {
        [in] q = QuantizeLinear(x, s, z)
        [out] d = DequantizeLinear(q, s, z)
        [weight] v = DequantizeLinear<axis=1>(w, sw, zw)
        [trained] h = MatMul(d, v)
        [fc] y = MatMul(h, w2)
    }
"""


@pytest.mark.parametrize("placement", ["w8a8-linear", "w8a8-mha", "w4"])
def test_what_is_quantized_already_stays_bit_for_bit(placement: str) -> None:
    random = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        "w": random.integers(-127, 128, (32, 32)).astype(np.int8),
        "sw": random.uniform(0.001, 0.01, 32).astype(np.float32),
        "zw": np.zeros(32, np.int8),
        "w2": random.standard_normal((32, 16)).astype(np.float32),
    }
    model = filled(QUANTIZED, **arrays)
    outcome = quantized(model, placement)
    assert not [where for where in places(outcome) if where.startswith("trained")]
    for name in ("w", "sw", "zw", "s", "z"):
        if name in arrays:
            assert array_of(model.graph.initializers[name]).tobytes() == arrays[name].tobytes()
    names = [node.name for node in model.graph]
    assert [name for name in names if name in ("in", "out", "weight", "trained", "fc")] == [
        "in",
        "out",
        "weight",
        "trained",
        "fc",
    ]
    trained = next(node for node in model.graph if node.name == "trained")
    assert [value.name for value in trained.inputs if value is not None] == ["d", "v"]


def test_a_weight_beside_a_quantized_input_is_quantized_alone() -> None:
    text = replaced(
        QUANTIZED,
        ("MatMul(d, v)", "MatMul(d, f)"),
        ("[weight] v = DequantizeLinear<axis=1>(w, sw, zw)", ""),
        ("int8[32,32] w, float[32] sw, int8[32] zw", "float[32,32] f"),
    )
    model = filled(text)
    assert places(quantized(model)) == ["fc.input", "trained.weight", "fc.weight"]
    assert place(filled(text), "w4").left_alone[0] == LeftAlone(
        "trained", "its input is quantized, and no GEMM multiplies INT8 by INT4"
    )


TIED = """
    <ir_version: 11, opset_import: ["": 23]>
    g (int64[N,5] ids) => (float[N,5,40] y)
    <float[40,32] table, float[N,5,32] e, float[32,40] t>
    { [embed] e = Gather(table, ids) [move] t = Transpose<perm=[1,0]>(table) [head] y = MatMul(e, t) }
"""


@pytest.mark.parametrize(
    "text",
    [
        TIED,
        replaced(
            TIED,
            ("[move] t = Transpose<perm=[1,0]>(table) ", ""),
            ("MatMul(e, t)", "MatMul(e, table)"),
            ("[40,32] table", "[32,32] table"),
            (",40] y", ",32] y"),
        ),
    ],
    ids=["behind a Transpose", "directly"],
)
def test_an_embedding_keeps_the_float_table_that_a_head_shares(text: str, run: Run) -> None:
    """Within 2 % of the largest output."""
    model = filled(text)
    table = array_of(model.graph.initializers["table"])
    ids = {"ids": np.random.default_rng(0).integers(0, len(table), (4, 5))}
    before = run(model, **ids)
    PlaceQuantizers("w8a8-linear", lambda model, names: measure_amax(model, names, ids, BATCH), "float32")(model)
    LowerFakeQuantize()(model)
    gather = next(node for node in model.graph if node.op_type == "Gather")
    assert gather.inputs[0] is model.graph.initializers["table"]
    assert array_of(model.graph.initializers["table"]).tobytes() == table.tobytes()
    (linear,) = find_linears(model.graph)
    assert (linear.weight_type, linear.activation_type) == ("int8", "int8")
    assert np.abs(run(model, **ids) - before).max() <= 0.02 * np.abs(before).max()


def test_layers_that_read_one_transpose_of_a_weight_share_its_integers(run: Run) -> None:
    """Within 2 % of the largest output."""
    text = replaced(
        SHARED_INPUT, ("[a]", "t = Transpose<perm=[1,0]>(w1) [a]"), ("(x, w1)", "(x, t)"), ("(x, w2)", "(x, t)"),
        ("float[32,16] w1, float[32,16] w2", "float[16,32] w1, float[32,16] t"),
    )  # fmt: skip
    model = filled(text)
    inputs = samples(model)
    before = run(model, **inputs)
    quantized(model)
    assert "Transpose" not in op_types(model)
    first, second = find_linears(model.graph)
    assert (first.weight_type, second.weight_type) == ("int8", "int8")
    assert first.weight is second.weight
    assert first.weight_dq is not second.weight_dq
    assert np.abs(run(model, **inputs) - before).max() <= 0.02 * np.abs(before).max()


@pytest.mark.parametrize("placement", ["w8a8-linear", "w4", "fp8", "nvfp4"])
def test_layers_that_read_one_weight_share_what_is_stored_of_it(placement: str) -> None:
    text = replaced(SHARED_INPUT, ("(x, w2)", "(x, w1)"), ("32,16] w1", "64,16] w1"), ("[N,32]", "[N,64]"))
    model = filled(text)
    place(model, placement, "float32")
    LowerFakeQuantize()(model)
    first, second = find_linears(model.graph)
    assert first.weight is second.weight
    kinds = {"w8a8-linear": "int8", "w4": "int4", "fp8": "float8_e4m3fn", "nvfp4": "float4_e2m1fn"}
    assert first.weight_type == kinds[placement]
    assert [value.name for value in model.graph.initializers.values() if array_of(value).size == 64 * 16] == [
        first.weight.name
    ]


@pytest.mark.parametrize("placement", ["w8a8-linear", "w4"])
@pytest.mark.parametrize("answered", [False, True], ids=["by a node", "as an output"])
def test_others_that_read_the_transpose_of_a_weight_keep_the_float_one(placement: str, answered: bool) -> None:
    text = replaced(
        LINEAR, ("[fc]", "[move] t = Transpose<perm=[1,0]>(w) [other] r = Relu(t) [fc]"), ("(x, w)", "(x, t)"),
        ("float[32,16] w", "float[16,64] w, float[64,16] t"), ("[N,32]", "[N,64]"),
        ("float[N,16] y)", "float[N,16] y, float[64,16] r)"),
    )  # fmt: skip
    if answered:
        text = replaced(text, ("[64,16] r)", "[64,16] t)"), (", float[64,16] t,", ","), ("[other] r = Relu(t)", ""))
    model = filled(text)
    inputs = samples(model)
    expected = array_of(model.graph.initializers["w"]).T
    quantized(model, placement)
    (linear,) = find_linears(model.graph)
    assert linear.weight_type == ("int8" if placement == "w8a8-linear" else "int4")
    second = model.graph.outputs.pop(1)
    model.graph.outputs.insert(0, second)
    assert np.array_equal(run_unoptimized(model, **inputs), expected if answered else np.maximum(expected, 0))


WIDE = LINEAR.replace("[N,32]", "[N,256]").replace("[32,16]", "[256,16]")


@pytest.mark.parametrize(
    ("text", "k", "axis", "block"),
    [
        (WIDE, 256, 0, 128),
        (WIDE.replace("256", "192"), 192, 0, 64),
        (GEMM.replace("32]", "256]"), 256, 1, 128),
        (through(WIDE, "Transpose<perm=[1,0]>(w)", "float[16,256] w"), 256, 0, 128),
    ],
    ids=["MatMul", "blocks of 64", "Gemm, transposed", "Transpose"],
)  # fmt: skip
@pytest.mark.parametrize("float_type", ALL)
def test_w4_is_within_half_a_step_of_each_block_along_k(
    text: str, k: int, axis: int, block: int, float_type: FloatType
) -> None:
    """Weights within half a step of their block; outputs as the dequantized weights give them, within 1e-4."""
    model = filled(text)
    weight = np.asarray(array_of(model.graph.initializers["w"]), np.float32)
    inputs = samples(model)
    outcome = quantized(model, "w4", float_type)
    assert places(outcome) == ["fc.weight"]
    assert outcome.changes[0].what == f"int4, one scale for each blocks of {block} along K"
    (linear,) = find_linears(model.graph)
    assert (linear.weight_type, linear.activation_type, linear.k_axis) == ("int4", "float32", axis)
    dq = linear.weight_dq
    assert dq is not None
    assert (dq.attributes["axis"].as_int(), dq.attributes["block_size"].as_int()) == (axis, block)
    scale = linear.weight_scale
    assert scale is not None
    assert scale.shape == ((16, k // block) if axis else (k // block, 16))
    each = spread(np.asarray(scale, np.float32), linear.shape, axis, block)
    real = linear.values.astype(np.float32) * each
    stored = weight if weight.shape == linear.shape else weight.T
    assert (np.abs(real - stored) <= each * np.float32(0.50001)).all()
    assert np.asarray(linear.values, np.int32).max() == 7
    expected = np.asarray(inputs["x"]) @ (real.T if axis else real) + array_of(model.graph.initializers["b"])
    assert np.abs(run_unoptimized(model, **inputs) - expected).max() <= 1e-4


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (WIDE.replace("256", "96"), "K = 96 is no multiple of 64"),
        (WIDE.replace(",16]", ",8]").replace("float[16]", "float[8]"), "K or N is below 16"),
        (CONV, "4-bit weights are for linear layers"),
    ],
)
def test_what_gets_no_4_bit_weight(text: str, why: str) -> None:
    outcome = place(filled(text), "w4")
    assert (outcome.changed, outcome.left_alone) == (0, (LeftAlone("fc", why),))


def test_w4_of_one_row_is_quantized() -> None:
    """A decoder's step multiplies one row: there 4-bit weights are read fastest."""
    assert place(filled(WIDE.replace("[N,", "[1,")), "w4").changed == 1


def test_sparse_int8_quantizes_what_a_linear_layer_answers(run: Run) -> None:
    """Within 3 % of the largest output."""
    model = filled(TRANSFORMER)
    inputs = samples(model)
    before = run(model, **inputs)
    outcome = quantized(model, "sparse-int8")
    assert places(outcome) == ["fc1.input", "fc2.input", "fc1.output", "fc2.output", "fc1.weight", "fc2.weight"]
    readers = {node.name: producers(node) for node in model.graph}
    assert readers["act"] == ["DequantizeLinear"]
    assert readers["residual"] == ["DequantizeLinear"]
    assert readers["bias"] == ["MatMul"]
    assert np.abs(run(model, **inputs) - before).max() <= 0.03 * np.abs(before).max()


@pytest.mark.parametrize("text", [LINEAR, GEMM])
def test_sparse_int8_leaves_what_the_graph_answers_float(text: str) -> None:
    model = filled(text)
    assert places(quantized(model, "sparse-int8")) == ["fc.input", "fc.weight"]
    last = model.graph.outputs[0].producer()
    assert last is not None
    assert last.op_type != "DequantizeLinear"


def test_sparse_int8_with_several_readers_shares_one_q(run: Run) -> None:
    """The result is answered, read by two nodes, and is the input of the next layer: one Q, and no reader twice."""
    text = replaced(
        LINEAR, ("(float[N,16] y)", "(float[N,16] y, float[N,16] r, float[N,16] z)"),
        ("float[32,16] w", "float[32,16] w, float[16,16] w2, float[N,16] t"),
        ("y = Add(h, b)", """y = Add(h, b) [one] r = Relu(y) [two] t = Sigmoid(y)
            [next] u = MatMul(y, w2) [sum] z = Add(u, t)"""),
    )  # fmt: skip
    model = filled(text)
    inputs = samples(model)
    before = run(model, **inputs)
    quantized(model, "sparse-int8")
    y = next(node for node in model.graph if node.name == "bias").outputs[0]
    assert [user.op_type for user, _ in y.uses()] == ["QuantizeLinear"]
    (q,) = (user for user, _ in y.uses())
    readers = sorted(user.name or "" for dq, _ in q.outputs[0].uses() for user, _ in dq.outputs[0].uses())
    assert readers == ["next", "one", "two"]
    assert all(value.uses() or value.is_graph_output() for node in model.graph for value in node.outputs)
    assert [value.name for value in model.graph.outputs] == ["y", "r", "z"]
    assert np.abs(run(model, **inputs) - before).max() <= 0.03 * np.abs(before).max()


ATTENTION = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,2,7,16] q, float[N,2,7,16] k, float[N,2,7,16] v) => (float[N,2,7,16] y)
    { [mix] y = Attention(q, k, v) }
"""


@pytest.mark.parametrize("float_type", ALL)
def test_w8a8_mha_quantizes_both_products(float_type: FloatType, run: Run) -> None:
    """Within 3 % of the largest output; softmax has the scale 1/127, in a shorter type the next one up."""
    model = filled(ATTENTION)
    inputs = samples(model)
    before = run(model, **inputs)
    LowerAttention()(model)
    outcome = quantized(model, "w8a8-mha", float_type)
    assert places(outcome) == ["mix.q", "mix.k", "mix.softmax", "mix.v"]
    assert outcome.changes[2].what.endswith("amax 1, known without measuring")
    scale = np.float32(array_of(model.graph.initializers["mix.softmax_scale"]).item())
    step = {"float32": 0, "float16": 2**-10, "bfloat16": 2**-7}[float_type]
    assert scale == np.float32(1 / 127) if float_type == "float32" else np.float32(1 / 127) <= scale <= (1 + step) / 127
    for node in model.graph:
        if node.op_type == "MatMul":
            assert producers(node) == ["DequantizeLinear", "DequantizeLinear"]
    assert np.abs(run(model, **inputs) - before).max() <= 0.03 * np.abs(before).max()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ATTENTION.replace("16]", "48]"), "head size 48 is none of 16, 32, 64: no INT8 kernel"),
        (ATTENTION.replace("7,16] v", "7,24] v").replace("7,16] y", "7,24] y"), "head size 24 is none of 16, 32, 64"),
        (ATTENTION.replace("2,7,", "2,513,"), "513 tokens are more than 512: no INT8 kernel"),
        (
            ATTENTION.replace("2,7,16] k", "2,600,16] k").replace("2,7,16] v", "2,600,16] v"),
            "600 tokens are more than 512",
        ),
        (ATTENTION.replace("2,7,", "2,T,"), "its number of tokens is not known: an INT8 kernel takes at most 512"),
    ],
    ids=["head size", "head size of v", "tokens", "keys", "dynamic tokens"],
)
def test_an_attention_without_an_int8_kernel_stays(text: str, why: str) -> None:
    model = filled(text)
    LowerAttention()(model)
    before = ir.to_proto(model)
    (left,) = place(model, "w8a8-mha").left_alone
    assert left.where == "mix"
    assert why in left.why
    assert ir.to_proto(model) == before


@pytest.mark.parametrize("size", [16, 32, 64])
def test_an_attention_of_512_tokens_is_quantized(size: int) -> None:
    model = filled(ATTENTION.replace("16]", f"{size}]").replace("2,7,", "2,512,"))
    LowerAttention()(model)
    placing = PlaceQuantizers("w8a8-mha", lambda _, names: dict.fromkeys(names, 1.0), "float32")
    assert placing(model).changed == 4


def test_a_mask_that_is_added_is_passed() -> None:
    text = replaced(ATTENTION, ("v) =>", "v, float[N,1,7,7] m) =>"), ("(q, k, v)", "(q, k, v, m)"))
    model = filled(text)
    LowerAttention()(model)
    assert place(model, "w8a8-mha").changed == 4


def test_a_softmax_between_linear_layers_is_no_attention() -> None:
    text = replaced(
        LINEAR, ("y = Add(h, b)", "p = Softmax(h) [mix] y = MatMul(p, w2)"),
        ("<float[32,16] w, float[16] b", "<float[32,16] w, float[16,16] w2, float[N,16] p"),
    )  # fmt: skip
    outcome = place(filled(text), "w8a8-mha")
    assert places(outcome) == ["fc.input", "mix.input", "fc.weight", "mix.weight"]


def test_stored_integers_are_of_four_bits() -> None:
    model = filled(WIDE)
    quantized(model, "w4")
    (linear,) = find_linears(model.graph)
    assert linear.values.dtype == ml_dtypes.int4


def test_measure_is_a_function_of_the_graph_and_names() -> None:
    function: Measure = measured
    assert function(filled(LINEAR), ["x"])["x"] > 0
