"""One line for each gate of a bundle: met, missed, or not to be told here."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.gates import MIN_AGREEMENT, agreement_missed, small_floats
from deploy.manifest import Manifest, Plan, Verification
from deploy.report import formats
from deploy.report.document import Line
from deploy.requirements import Requirement, default_requirements, missed, parse_requirement


def gate_lines(manifest: Manifest) -> tuple[Line, ...]:
    """Return the gates that the bundle was held to; every sentence on one that was missed is among them."""
    lines = [*_numbers(manifest), *_floats(manifest.plan), *_required(manifest)]
    said = {detail for line in lines if line.state == "bad" for detail in line.details}
    rest = [Line("gate", "missed", "bad", "compiled", (each,)) for each in manifest.gates_missed if each not in said]
    return (*lines, *rest)


def _required(manifest: Manifest) -> Iterator[Line]:
    given = [parse_requirement(text) for text in manifest.required]
    plan, engines = manifest.plan, manifest.engines
    usual = default_requirements(plan, engines, float_type=manifest.float_type, placement="as-trained")
    wanted = [*given, *(one for one in usual if one.what not in {requirement.what for requirement in given})]
    for requirement in wanted:
        problems = list(missed([requirement], plan, engines))
        if not problems:
            yield Line(str(requirement), "met", "good", "compiled", (_met(requirement, plan),))
        for problem in problems:
            yield Line(str(requirement), "missed", "bad", "compiled", (problem.sentence,))


def _met(requirement: Requirement, plan: Plan | None) -> str:
    if plan is None or requirement.what in ("sparse", "all-tactics"):
        return "said by TensorRT's log"
    if requirement.what == "int8-gemms":
        int8 = [layer for layer in plan.layers if layer.asked == ("int8", "int8")]
        asked = [layer for layer in int8 if layer.judged or not requirement.judged]
        done = sum(layer.compiled == ("Int8", "Int8") for layer in asked)
        return f"{done} of {len(asked)} INT8 layers have INT8 kernels"
    return f"{sum(each.fused for each in plan.attentions)} of {len(plan.attentions)} attentions are one kernel"


def _floats(plan: Plan | None) -> Iterator[Line]:
    for name, count, wanted in () if plan is None else small_floats(plan):
        if count == wanted:
            yield Line(f"{name} kernels", "met", "good", "compiled", (f"all {wanted} {name} layers",))
        else:
            sentence = f"{count} of {wanted} {name} layers were compiled to {name} kernels"
            yield Line(f"{name} kernels", "missed", "bad", "compiled", (sentence,))


def _numbers(manifest: Manifest) -> Iterator[Line]:
    verified = manifest.verified
    if verified is None:
        yield Line("same answers as the student", "not verified here", "absent", "not here")
        return
    yield from _agreement(verified, given_samples=manifest.samples is not None)
    if verified.float16 is not None:
        if verified.float16.finite:
            yield Line(
                "float16 holds every value", "met", "good", "verified", (f"on {verified.float16.count} samples",)
            )
        else:
            sentence = "the model overflows in float16; convert with --precision fp32"
            yield Line("float16 holds every value", "missed", "bad", "verified", (sentence,))


def _agreement(verified: Verification, *, given_samples: bool) -> Iterator[Line]:
    if verified.agreement is None:
        return
    what = f"same answers as the student, for {formats.percent(MIN_AGREEMENT)} of the samples"
    found = f"{formats.percent(verified.agreement)} of {formats.count(verified.count)}"
    if not given_samples:
        yield Line(what, "not asked", "open", "verified", (f"{found}; the samples were made up, so it is no gate",))
    elif agreement_missed(verified, given_samples=True):
        sentence = f"the model and the student agree on {100 * verified.agreement:.1f} % of the samples, less than 99 %"
        yield Line(what, "missed", "bad", "verified", (sentence,))
    else:
        yield Line(what, "met", "good", "verified", (found,))
