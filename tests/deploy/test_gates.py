from __future__ import annotations

import pytest

from deploy.gates import missed_gates
from deploy.manifest import BlockAttention, Float16Check, Layer, Plan, Verification
from exporters.sparsity import Sparsity

SPARSITY = Sparsity("2:4", 0, 0.5, 0, eligible=True, reason="")
INT8 = Layer(
    module="fc",
    k=32,
    n=32,
    weight_type="int8",
    activation_type="int8",
    input_scale=0.1,
    weight_scale_min=0.1,
    weight_scale_max=0.1,
    sparsity=SPARSITY,
)
PLAN = Plan(
    source="a compiler",
    target="SM80",
    kernels=(),
    gemms_by_type={"Int8": 2},
    linear_gemms=2,
    linear_gemms_int8=2,
    attentions=(BlockAttention(module="blocks.0.attn", fused=True), BlockAttention(module="blocks.1.attn", fused=True)),
    kernels_per_block={},
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
    return missed_gates((INT8, INT8), plan, verified, given_samples=given_samples, float_type="float16")


def test_nothing_is_missed_where_all_is_as_asked() -> None:
    assert missed() == ()
    assert missed(plan=None) == ()


def test_gemm_that_is_not_int8_is_missed() -> None:
    assert missed(PLAN.model_copy(update={"linear_gemms_int8": 1})) == (
        "1 of 2 INT8 layers were compiled to INT8 GEMMs",
    )


def test_onnxruntimes_plan_is_held_to_nothing() -> None:
    assert missed(PLAN.model_copy(update={"linear_gemms_int8": 1, "target": "cpu"})) == ()


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
