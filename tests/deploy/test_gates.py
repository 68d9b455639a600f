from __future__ import annotations

import pytest

from deploy.gates import missed_gates, not_judged, sentences_text
from deploy.manifest import BlockAttention, CompiledLayer, Float16Check, Plan, Verification
from deploy.requirements import parse_requirement

INT8 = CompiledLayer(module="fc", asked=("int8", "int8"), compiled=("Int8", "Int8"), kernel="k")
HALF = CompiledLayer(module="fc2", asked=("int8", "int8"), compiled=("Half", "Half"), kernel="k")
PLAN = Plan(
    source="a compiler",
    target="SM80",
    kernels=(),
    gemms_by_type={"Int8": 2},
    linear_gemms=2,
    linear_gemms_int8=2,
    attentions=(BlockAttention(module="blocks.0.attn", fused=True), BlockAttention(module="blocks.1.attn", fused=True)),
    kernels_per_block={},
    layers=(INT8, INT8),
)
VERIFIED = Verification(
    samples="samples",
    samples_sha256="0" * 64,
    count=1000,
    labelled=False,
    runtime="onnxruntime",
    student_top1=None,
    onnx_top1=None,
    agreement=0.995,
    max_abs_difference=0.1,
    drop=None,
    float16=Float16Check(count=64, finite=True, agreement=1.0, max_abs_difference=0.1),
)


def missed(
    plan: Plan | None = PLAN, verified: Verification = VERIFIED, *, given_samples: bool = True
) -> tuple[str, ...]:
    return missed_gates(plan, verified, given_samples=given_samples, float_type="float16")


def test_nothing_is_missed_where_all_is_as_asked() -> None:
    assert missed() == ()
    assert missed(plan=None) == ()


def test_gemm_that_is_not_int8_is_missed() -> None:
    assert missed(PLAN.model_copy(update={"layers": (INT8, HALF)})) == (
        "1 of 2 INT8 layers were compiled to INT8 GEMMs",
    )


def test_layer_that_is_not_fp8_or_fp4_is_missed() -> None:
    fp8 = CompiledLayer(module="a", asked=("float8_e4m3fn", "float8_e4m3fn"), compiled=("FP8", "FP8"), kernel="k")
    half = fp8.model_copy(update={"compiled": ("Half", "Half")})
    fp4 = CompiledLayer(module="b", asked=("float32", "float4_e2m1fn"), compiled=("FP4E2M1", "FP4E2M1"), kernel="k")
    assert missed(PLAN.model_copy(update={"layers": (fp8, fp4)})) == ()
    assert missed(PLAN.model_copy(update={"layers": (fp8, half, fp4)})) == (
        "1 of 2 FP8 layers were compiled to FP8 kernels",
    )
    dequantized = fp4.model_copy(update={"compiled": ()})
    assert missed(PLAN.model_copy(update={"layers": (dequantized,)})) == (
        "0 of 1 NVFP4 layers were compiled to NVFP4 kernels",
    )


def test_onnxruntimes_plan_is_held_to_nothing() -> None:
    assert missed(PLAN.model_copy(update={"layers": (HALF,), "target": "cpu"})) == ()


def test_attention_that_is_not_fused_is_missed_by_name() -> None:
    unfused = tuple(attention.model_copy(update={"fused": False}) for attention in PLAN.attentions)
    assert missed(PLAN.model_copy(update={"attentions": unfused})) == (
        "the attention of blocks.0.attn is not fused (and 1 more)",
    )


@pytest.mark.parametrize(("given", "count"), [(True, 1), (False, 0)])
def test_disagreement_is_missed_on_samples_that_the_user_gave(given: bool, count: int) -> None:
    found = missed(verified=VERIFIED.model_copy(update={"agreement": 0.98}), given_samples=given)
    assert len(found) == count


def test_overflow_in_float16_is_missed() -> None:
    check = Float16Check(count=64, finite=False, agreement=0.0, max_abs_difference=None)
    (found,) = missed(verified=VERIFIED.model_copy(update={"float16": check}))
    assert "overflows in float16" in found


def test_what_the_user_requires_goes_before_the_default() -> None:
    plan = PLAN.model_copy(update={"layers": (INT8, HALF)})
    required = (parse_requirement("int8-gemms=50%"),)
    assert missed_gates(plan, VERIFIED, given_samples=True, float_type="float16", required=required) == ()


def test_what_is_left_to_the_device_is_told_and_missed_where_it_is_required() -> None:
    left = HALF.model_copy(update={"module": "conv", "judged": False})
    plan = PLAN.model_copy(update={"layers": (INT8, left), "target": "SM75"})
    assert missed(plan) == ()
    assert list(not_judged(plan)) == [
        "1 INT8 convolutions left to TensorRT on the device: a compiler has none for SM75"
    ]
    assert list(not_judged(PLAN)) == []
    required = (parse_requirement("int8-gemms"),)
    sentences = missed_gates(plan, VERIFIED, given_samples=True, float_type="float16", required=required)
    assert sentences == ("1 of 2 INT8 layers were compiled to INT8 GEMMs",)
    assert sentences_text(sentences, plan).splitlines()[-1].split()[:3] == ["conv", "int8×int8", "Half×Half"]


def test_the_table_names_the_layers_of_a_sentence() -> None:
    plan = PLAN.model_copy(update={"layers": (INT8, HALF)})
    text = sentences_text(missed(plan), plan)
    assert text.splitlines()[0] == "Gate missed: 1 of 2 INT8 layers were compiled to INT8 GEMMs"
    assert text.splitlines()[-1].split() == [
        "fc2",
        "int8×int8",
        "Half×Half",
        *["its", "weight", "is", "dequantized", "before", "the", "product"],
    ]
