"""Is what came out less than was asked for? Each gate that is missed is one sentence; none is silent.

`convert` writes them into the manifest and the report, and the command line exits with 3 and shows which layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from deploy.manifest import Engine, Plan, Verification
from deploy.requirements import HEADING, Missed, Requirement, Row, default_requirements, missed
from deploy.text_table import text_table

MIN_AGREEMENT = 0.99
# How a layer's weight, a kernel's operand and a user call it.
_SMALL_FLOATS = (("float8_e4m3fn", "FP8", "FP8"), ("float4_e2m1fn", "FP4E2M1", "NVFP4"))


def missed_gates(
    plan: Plan | None,
    verified: Verification,
    *,
    given_samples: bool,
    float_type: str,
    placement: str = "as-trained",
    engines: Sequence[Engine] = (),
    required: Sequence[Requirement] = (),
) -> tuple[str, ...]:
    """Return what is less than was asked for.

    Args:
        plan: what the compiler made of it; onnxruntime's is held to nothing, its Gemm has no INT8 kernel.
        verified: how it compares with the student.
        given_samples: whether the user gave the samples; on random ones the classes are near ties.
        float_type: the type of what is not quantized; in float32 no attention is fused.
        placement: which quantizers were placed.
        engines: what was built.
        required: what the user requires beside what is required by default.
    """
    found = missed_requirements(plan, engines, float_type=float_type, placement=placement, required=required)
    return (*_numbers(verified, given_samples=given_samples), *_floats(plan), *(each.sentence for each in found))


def missed_requirements(
    plan: Plan | None, engines: Sequence[Engine], *, float_type: str, placement: str, required: Sequence[Requirement]
) -> tuple[Missed, ...]:
    """The requirements that a build does not meet: the user's, and by default those of nothing less than asked.

    What the user says of something goes before the default.
    """
    said = {requirement.what for requirement in required}
    default = default_requirements(plan, engines, float_type=float_type, placement=placement)
    wanted = [*required, *(requirement for requirement in default if requirement.what not in said)]
    return tuple(missed(wanted, plan, engines))


def to_text(found: Iterable[tuple[str, Sequence[Row]]]) -> str:
    """For the terminal: each sentence, and below it which layers, and why."""
    return "\n".join(part for sentence, rows in found for part in _parts(sentence, rows))


def sentences_text(sentences: Sequence[str], plan: Plan | None) -> str:
    """The gates that a manifest says are missed, with the layers of those that are about layers."""
    engines: tuple[Engine, ...] = ()
    of_all = missed([Requirement("int8-gemms", 1)], plan, engines)  # the default leaves some out
    default = missed_requirements(plan, engines, float_type="float16", placement="as-trained", required=())
    rows = {each.sentence: each.rows for each in (*of_all, *default)}
    return to_text((sentence, rows.get(sentence, ())) for sentence in sentences)


def _parts(sentence: str, rows: Sequence[Row]) -> Iterator[str]:
    yield f"Gate missed: {sentence}"
    if rows:
        yield text_table([HEADING, *rows])


def agreement_missed(verified: Verification, *, given_samples: bool) -> bool:
    """Whether the model and the student answer too often with different classes."""
    return given_samples and verified.agreement is not None and verified.agreement < MIN_AGREEMENT


def small_floats(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """Of each type of 8- and 4-bit floats that layers are stored in: its name, the layers computed in it, and all."""
    for stored, operand, name in _SMALL_FLOATS:
        asked = [layer for layer in plan.layers if layer.asked[1:] == (stored,)]
        if asked:
            yield name, sum(layer.compiled == (operand, operand) for layer in asked), len(asked)


def not_judged(plan: Plan) -> Iterator[str]:
    """What is left to TensorRT on the device, its INT8 not being the compiler's to judge; nothing in most plans."""
    count = sum(not layer.judged for layer in plan.layers)
    if count:
        yield f"{count} INT8 convolutions left to TensorRT on the device: {plan.source} has none for {plan.target}"


def _floats(plan: Plan | None) -> Iterator[str]:
    for name, count, wanted in () if plan is None else small_floats(plan):
        if count < wanted:
            yield f"{count} of {wanted} {name} layers were compiled to {name} kernels"


def _numbers(verified: Verification, *, given_samples: bool) -> Iterator[str]:
    if agreement_missed(verified, given_samples=given_samples) and verified.agreement is not None:
        yield f"the model and the student agree on {100 * verified.agreement:.1f} % of the samples, less than 99 %"
    if verified.float16 is not None and not verified.float16.finite:
        yield "the model overflows in float16; convert with --precision fp32"
