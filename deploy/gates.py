"""Is what came out less than was asked for? Each gate that is missed is one sentence; none is silent.

`convert` writes them into the manifest and the report, and the command line exits with 3.
"""

from __future__ import annotations

from collections.abc import Iterator

from deploy.manifest import Layer, Plan, Verification

MIN_AGREEMENT = 0.99


def missed_gates(
    layers: tuple[Layer, ...], plan: Plan | None, verified: Verification, *, given_samples: bool, float_type: str
) -> tuple[str, ...]:
    """Return what is less than was asked for.

    Args:
        layers: the linear layers of the model.
        plan: what the compiler made of it; onnxruntime's is held to nothing, its Gemm has no INT8 kernel.
        verified: how it compares with the student.
        given_samples: whether the user gave the samples; on random ones the classes are near ties.
        float_type: the type of what is not quantized; in float32 no attention is fused.
    """
    return (*_numbers(verified, given_samples=given_samples), *_kernels(layers, plan, float_type))


def agreement_missed(verified: Verification, *, given_samples: bool) -> bool:
    """Whether the model and the student answer too often with different classes."""
    return given_samples and verified.agreement is not None and verified.agreement < MIN_AGREEMENT


def _numbers(verified: Verification, *, given_samples: bool) -> Iterator[str]:
    if agreement_missed(verified, given_samples=given_samples) and verified.agreement is not None:
        yield f"the model and the student agree on {100 * verified.agreement:.1f} % of the samples, less than 99 %"
    if verified.float16 is not None and not verified.float16.finite:
        yield "the model overflows in float16; convert with --precision fp32"


def _kernels(layers: tuple[Layer, ...], plan: Plan | None, float_type: str) -> Iterator[str]:
    if plan is None or plan.target == "cpu":
        return
    asked = sum(layer.weight_type == layer.activation_type == "int8" for layer in layers)
    if plan.linear_gemms_int8 < asked:
        yield f"{plan.linear_gemms_int8} of {asked} INT8 layers were compiled to INT8 GEMMs"
    unfused = [attention.module for attention in plan.attentions if not attention.fused]
    if unfused and float_type != "float32":
        yield f"the attention of {unfused[0]} is not fused" + (f" (and {len(unfused) - 1} more)" if unfused[1:] else "")
