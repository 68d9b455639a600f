"""What a candidate's plan and layers do otherwise than the baseline's, in the names of modules and blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from deploy.comparison.subject import Quantizers, Subject
from deploy.compiled_kernels import GEMM_KINDS
from deploy.manifest import Kernel, Layer, Plan
from deploy.plan import block_of
from profiles.record import Record

_SAME_SCALE = 1.05
_FLOATS = ("float", "half", "bfloat")


class Difference(Record):
    """One thing that is otherwise."""

    block: str
    sentence: str
    worse: bool


def differences(baseline: Subject, candidate: Subject) -> tuple[Difference, ...]:
    """Return what is otherwise, what made the plan worse first."""
    placed = list(_quantizers(baseline.quantizers, candidate.quantizers))
    found = list(placed)
    if baseline.plan is not None and candidate.plan is not None:
        found = [
            *_attentions(baseline.plan, candidate.plan, placed),
            *_gemms(baseline, candidate),
            *_blocks(baseline.plan, candidate.plan),
            *placed,
        ]
    found += _layers(baseline.layers, candidate.layers)
    return tuple(sorted(dict.fromkeys(found), key=lambda difference: not difference.worse))


def _attentions(before: Plan, after: Plan, placed: list[Difference]) -> Iterator[Difference]:
    was = {(attention.module, attention.node): attention.fused for attention in before.attentions}
    for attention in after.attentions:
        fused = was.get((attention.module, attention.node))
        if fused is None or fused == attention.fused:
            continue
        block = block_of(attention.module) or attention.module
        reasons = [change.sentence for change in placed if change.block == block]
        what = "now one kernel" if attention.fused else "no longer fused"
        yield Difference(
            block=block,
            sentence=f"{attention.module}: the attention is {what}" + (f": {'; '.join(reasons)}" if reasons else ""),
            worse=fused,
        )


def _quantizers(before: Quantizers, after: Quantizers) -> Iterator[Difference]:
    for (module, operator), count in sorted((before - after).items()):
        yield _quantizer(module, operator, count, "gone")
    for (module, operator), count in sorted((after - before).items()):
        yield _quantizer(module, operator, count, "new")


def _quantizer(module: str, operator: str, count: int, change: str) -> Difference:
    where = f"the {operator} of {module}" if module else "the model's input"
    many = "" if count == 1 else f" ({count} times)"
    return Difference(
        block=block_of(module) or module, sentence=f"Q/DQ after {where} is {change}{many}", worse=change == "gone"
    )


def _gemms(before: Subject, after: Subject) -> Iterator[Difference]:
    was, now = _gemm_types(before), _gemm_types(after)
    for module in was.keys() & now.keys():
        if was[module] != now[module]:
            yield Difference(
                block=block_of(module) or module,
                sentence=f"the GEMM of {module} is {now[module]}, it was {was[module]}",
                worse=_is_float(now[module]) and not _is_float(was[module]),
            )


def _gemm_types(subject: Subject) -> Mapping[str, str]:
    """By linear layer, the types of the GEMM that computes it."""
    assert subject.plan is not None
    linears = {layer.module for layer in subject.layers}
    kernels = [kernel for kernel in subject.plan.kernels if kernel.kind in GEMM_KINDS]
    return {
        module: "×".join(kernel.operands or kernel.types[:2])
        for kernel in kernels
        for module in kernel.modules
        if module in linears
    }


def _is_float(types: str) -> bool:
    return any(name in types.lower() for name in _FLOATS)


def _blocks(before: Plan, after: Plan) -> Iterator[Difference]:
    for block in dict.fromkeys([*before.kernels_per_block, *after.kernels_per_block]):
        was, now = before.kernels_per_block.get(block, 0), after.kernels_per_block.get(block, 0)
        if was != now:
            extra = _kernels(after, block) - _kernels(before, block)
            listed = ", ".join(f"{count} {kind} of {module}" for (kind, module), count in extra.items())
            yield Difference(
                block=block,
                sentence=f"{block} takes {now} kernels instead of {was}" + (f"; new: {listed}" if listed else ""),
                worse=now > was,
            )


def _kernels(plan: Plan, block: str) -> Counter[tuple[str, str]]:
    return Counter((kernel.kind, kernel.modules[0]) for kernel in plan.kernels if _starts_in(kernel, block))


def _starts_in(kernel: Kernel, block: str) -> bool:
    return bool(kernel.modules) and block_of(kernel.modules[0]) == block


def _layers(before: tuple[Layer, ...], after: tuple[Layer, ...]) -> Iterator[Difference]:
    was = {layer.module: layer for layer in before}
    for layer in after:
        if (old := was.get(layer.module)) is not None:
            yield from _layer(old, layer)


def _layer(old: Layer, new: Layer) -> Iterator[Difference]:
    block = block_of(new.module) or new.module
    if old.sparsity.pattern != new.sparsity.pattern:
        worse = new.sparsity.pattern == "dense"
        why = f": {new.sparsity.reason}" if worse and new.sparsity.reason else ""
        yield Difference(
            block=block,
            sentence=f"{new.module} is {new.sparsity.pattern}, it was {old.sparsity.pattern}{why}",
            worse=worse,
        )
    for what, before, after in (
        ("input scale", old.input_scale, new.input_scale),
        ("largest weight scale", old.weight_scale_max, new.weight_scale_max),
    ):
        if before and after and not 1 / _SAME_SCALE <= after / before <= _SAME_SCALE:
            yield Difference(
                block=block,
                sentence=f"the {what} of {new.module} is {after / before:.3g} times what it was",
                worse=False,
            )
