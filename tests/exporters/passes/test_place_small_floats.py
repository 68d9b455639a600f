"""The placements `fp8`, `fp8-mha` and `nvfp4`, and what is made of their quantizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from calibration.ranges import measure_amax
from deploy.emulate_nvfp4 import emulate_nvfp4, holds_nvfp4
from deploy.manifest import Plan
from deploy.plan import read_plan
from deploy.tensorrt_api import ShapeRange, build_engine
from exporters.checkpoint import load_student
from exporters.lint import lint
from exporters.passes.inserter import Inserter
from exporters.passes.lower_fake_quantize import LowerFakeQuantize
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.passes.place_quantizers import PlaceQuantizers
from exporters.passes.placement_reads import attention_products
from exporters.passes.repair_qdq import RepairQdq
from exporters.passes.type_floats import TypeFloats
from exporters.placement import Placement
from exporters.small_floats import NVFP4_MAX
from exporters.surgery import Target, surgery
from profiles.device import load_device
from students.fashion_vit.sample import calibration_images, teacher_path

Float = npt.NDArray[np.float32]
Run = Callable[..., Float]
F8, F4 = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1
RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((32, 16), np.float32)
X = RANDOM.standard_normal((4, 3, 32), np.float32)
AMAX = 4.0


def linear(nodes: str = "[fc] y = MatMul(x, w)", weight: Float = W) -> ir.Model:
    """A graph of `nodes`, which read x and the constant w."""
    k, n = W.shape
    model = ir.from_onnx_text(f"""
        <ir_version: 11, opset_import: ["": 23]>
        g (float[N,3,{k}] x) => (float[N,3,{n}] y) <float[{",".join(map(str, weight.shape))}] w> {{ {nodes} }}
    """)
    value = next(value for node in model.graph for value in node.inputs if value is not None and value.name == "w")
    value.const_value = ir.tensor(weight, name="w")
    model.graph.register_initializer(value)
    return model


def placed(model: ir.Model, placement: Placement) -> Outcome:
    def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        return dict.fromkeys(names, AMAX)

    outcome = PlaceQuantizers(placement, measure, "float16")(model)
    LowerFakeQuantize()(model)
    RepairQdq()(model)
    return outcome


def op_types(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def e4m3(values: Float, scale: npt.NDArray[np.floating] | float) -> Float:
    ratio = np.clip(values / np.asarray(scale, np.float32), -448, 448)
    return np.asarray(ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.asarray(scale, np.float32))


def half_above(values: npt.NDArray[np.float32]) -> Float:
    """The float16 number that is equal or next above."""
    rounded = values.astype(np.float16)
    return np.where(rounded.astype(np.float32) < values, np.nextafter(rounded, np.float16(np.inf)), rounded).astype(
        np.float32
    )


def test_fp8_quantizes_both_inputs_and_computes_what_numpy_does(run: Run) -> None:
    model = linear()
    outcome = placed(model, "fp8")
    assert [change.what.split(",")[0] for change in outcome.changes] == ["fp8", "fp8"]
    assert op_types(model) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1}
    assert {v.dtype for n in model.graph for v in n.outputs if n.op_type == "QuantizeLinear"} == {F8}
    onnx.checker.check_model(ir.to_proto(model))
    scale = half_above(np.full(1, AMAX / 448, np.float32))
    expected = e4m3(X, scale) @ e4m3(W, half_above(np.abs(W).max(axis=0) / np.float32(448)))
    np.testing.assert_allclose(run(model, x=X), expected, rtol=1e-5, atol=1e-5)


def test_a_second_placement_changes_nothing() -> None:
    for placement in ("fp8", "nvfp4"):
        model = linear()
        placed(model, placement)
        before = ir.to_proto(model)
        if placement == "fp8":
            assert placed(model, placement).changed == 0
        assert RepairQdq()(model).changed == 0
        assert ir.to_proto(model) == before


@pytest.mark.parametrize(
    ("nodes", "weight"),
    [("[fc] y = MatMul(x, w)", W), ("t = Transpose<perm=[1,0]>(w) [fc] y = MatMul(x, t)", W.T.copy())],
    ids=["as it is", "transposed"],
)
def test_nvfp4_has_blocks_along_k_and_computes_what_its_emulation_does(
    nodes: str, weight: Float, run: Run, tmp_path: Path
) -> None:
    model = linear(nodes, weight)
    placed(model, "nvfp4")
    assert op_types(model) == {"TRT_FP4DynamicQuantize": 1, "DequantizeLinear": 4, "MatMul": 1}
    assert model.opset_imports["trt"] == 1
    stored = {value.dtype: list(value.shape or ()) for value in model.graph.initializers.values() if value.shape}
    assert (stored[F4], stored[F8]) == ([32, 16], [2, 16])
    ir.save(model, tmp_path / "model.onnx")
    assert ir.load(tmp_path / "model.onnx").graph.initializers.keys() == model.graph.initializers.keys()
    assert holds_nvfp4(model)
    emulate_nvfp4(model)
    found = run(model, x=X)
    np.testing.assert_allclose(found, nvfp4(X, AMAX, 2) @ nvfp4(W, float(np.abs(W).max()), 0), rtol=1e-5, atol=1e-5)
    assert not np.allclose(found, X @ W, atol=1e-3)


def nvfp4(values: Float, amax: float, axis: int) -> Float:
    """Written out once more, for arrays that a block divides."""
    g = np.float32(amax / NVFP4_MAX)
    moved = np.moveaxis(values, axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], -1, 16)
    scale = (np.abs(blocks).max(axis=-1, keepdims=True) / (np.float32(6) * g)).astype(ml_dtypes.float8_e4m3fn)
    step = scale.astype(np.float32) * g
    grid = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    nearest = grid[
        np.abs(blocks / step - grid[:, None, None, None, None].reshape(-1, *[1] * blocks.ndim)).argmin(axis=0)
    ]
    return np.moveaxis((nearest * step).reshape(moved.shape), -1, axis)


@pytest.mark.parametrize(
    ("placement", "nodes", "weight", "why"),
    [
        ("nvfp4", "[fc] y = MatMul(x, w)", W[:24], "K = 24 is no multiple of 16"),
        ("nvfp4", "u = Unsqueeze(x, one) [fc] y = Conv(u, w)", W.reshape(16, 1, 1, 32), "a convolution"),
        ("fp8", "[fc] y = MatMul(x, w)", W[:, :8], "N = 8 is below 16: slower in INT8"),
        (
            "fp8",
            "[fc] y = Conv(x, w)",
            W[:24].reshape(16, 3, 8),
            "a convolution with fewer than 16 channels: computed in float16 behind its FP8 quantizers",
        ),
    ],
)
def test_leaves_what_gains_nothing(placement: Placement, nodes: str, weight: Float, why: str) -> None:
    model = linear(nodes, weight)
    outcome = placed(model, placement)
    assert outcome.changed == 0
    assert any(left.where == "fc" and left.why.startswith(why) for left in outcome.left_alone)


ATTENTION = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,2,40,24] q, float[N,2,24,40] k, float[N,2,40,24] v, float[N,1,1,40] m) => (float[N,2,40,24] y)
    <float[N,2,40,40] s, float[N,2,40,40] a, float[N,2,40,40] p>
    { s = MatMul(q, k) [mask] a = Identity(s) [mix] p = Softmax<axis=-1>(a) [out] y = MatMul(p, v) }
"""

UNMASKED = ATTENTION.replace("[mask] a = Identity(s)", "").replace("(a)", "(s)")


def test_fp8_mha_quantizes_all_four_operands_of_an_attention() -> None:
    model = ir.from_onnx_text(UNMASKED)
    outcome = placed(model, "fp8-mha")
    assert [change.where for change in outcome.changes] == ["mix.q", "mix.k", "mix.softmax", "mix.v"]
    assert outcome.changes[2].what == "fp8, scale 0.00223351, amax 1, known without measuring"
    assert op_types(model)["QuantizeLinear"] == 4


def test_fp8_mha_leaves_an_attention_whose_mask_is_computed() -> None:
    model = ir.from_onnx_text(ATTENTION.replace("Identity(s)", "Add(s, m)"))
    outcome = placed(model, "fp8-mha")
    why = "its mask is computed: TensorRT-RTX does not fuse each such attention in FP8"
    assert (outcome.changed, outcome.left_alone) == (0, (LeftAlone("mix", why),))


@pytest.mark.parametrize(
    ("placement", "profile", "gemms"),
    [("fp8", "l4", {"FP8": 9, "Half": 1}), ("nvfp4", "rtx-5090", {"FP4E2M1": 9, "Half": 1})],
)
def test_compiles_to_gemms_of_the_type(
    exported_student: ir.Model, placement: Placement, profile: str, gemms: dict[str, int], tmp_path: Path
) -> None:
    """But for the classifier, which has 10 outputs."""
    model, device = exported_student.clone(), load_device(profile)
    surgery(model, Target(device, "float16", placement), lambda _, names: dict.fromkeys(names, AMAX))
    assert lint(model, device) == []
    assert {finding.rule.id for finding in lint(model, load_device("a100"))} == {"Q016"}
    plan = compiled(model, profile, tmp_path)
    assert plan.gemms_by_type == gemms
    assert [attention.fused for attention in plan.attentions] == [True, True]


def compiled(model: ir.Model, profile: str, folder: Path) -> Plan:
    """What TensorRT-RTX makes of it ahead of time."""
    pytest.importorskip("tensorrt_rtx", reason="compiling ahead of time needs tensorrt-rtx")
    ahead = load_device(profile).ahead_of_time
    assert ahead is not None
    ir.save(model, folder / "model.onnx")
    built = build_engine(
        folder / "model.onnx", "tensorrt-rtx", compute_capability=ahead.compute_capability, batch=ShapeRange(1, 2, 4)
    )
    return read_plan(built.log, model, source=built.runtime, target=ahead.compute_capability)


@pytest.mark.parametrize(("tokens", "fused"), [(32, True), (31, False)])
def test_an_fp8_attention_of_32_tokens_is_one_kernel(tmp_path: Path, tokens: int, fused: bool) -> None:
    """And none of fewer, wherefore the placement leaves those in float16."""
    text = UNMASKED.replace("40", str(tokens))
    model = ir.from_onnx_text(text)
    assert placed(model, "fp8-mha").changed == (4 if fused else 0)
    if not fused:
        model = ir.from_onnx_text(text)
        reads = list(attention_products(model.graph, [], lambda *_: ""))
        fp8 = PlaceQuantizers("fp8-mha", lambda *_: {}, "float16")
        inserter = Inserter(model.graph)
        for read in reads:
            fp8._quantize_activation(inserter, read, dict.fromkeys(reads, AMAX))
        LowerFakeQuantize()(model)
    TypeFloats("float16")(model)
    (attention,) = compiled(model, "l4", tmp_path).attentions
    assert attention.fused == fused


@pytest.mark.parametrize(("placement", "least"), [("fp8", 0.9995), ("nvfp4", 0.99)])
def test_the_shipped_teacher_keeps_its_answers(
    teacher: ir.Model, images: Float, run: Run, placement: Placement, least: float
) -> None:
    """Cosine of the logits to those of float32, on images that it was not calibrated on."""
    model = teacher.clone()
    (name,) = (str(value.name) for value in model.graph.inputs)
    expected = run(model, **{name: images[64:]})
    calibration = {name: images[:64]}
    surgery(
        model,
        Target(load_device("rtx-5090"), "float16", placement),
        lambda graph, names: measure_amax(graph, names, calibration, 32),
    )
    if placement == "nvfp4":
        emulate_nvfp4(model)
    found = run(model, **{name: images[64:]})
    cosine = np.sum(found * expected) / np.sqrt(np.sum(found**2) * np.sum(expected**2))
    assert least <= cosine < 0.99999


@pytest.fixture(scope="module")
def teacher() -> ir.Model:
    return load_student(teacher_path()).export().model


@pytest.fixture(scope="module")
def images() -> Float:
    with np.load(calibration_images()) as data:
        return np.asarray((data["image"][:128] / np.float32(255) - 0.2860) / 0.3530, np.float32)


def test_types_keep_the_scales_of_blocks_in_float32() -> None:
    model = linear()
    placed(model, "nvfp4")
    TypeFloats("float16")(model)
    dynamic = next(node for node in model.graph if node.op_type == "TRT_FP4DynamicQuantize")
    assert [value.dtype for value in dynamic.inputs if value is not None] == [ir.DataType.FLOAT16, ir.DataType.FLOAT]
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert {value.dtype for value in product.inputs if value is not None} == {ir.DataType.FLOAT16}
