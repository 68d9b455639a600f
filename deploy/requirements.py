"""What a build must come to: `--require`, and what is required of every build without being said.

    --require int8-gemms=100%        so many of the layers that are quantized to INT8 have an INT8 kernel
    --require fused-attention        every attention is one kernel; =90% is enough of them
    --require sparse>=40             at least so many layers have a kernel for sparse weights
    --require all-tactics            no kernel went untried because memory was short while TensorRT was building

By default INT8 layers have INT8 kernels, and attentions of graphs that are not float32 are fused. For `sparse-int8`,
whose quantizers are there for nothing else, one sparse kernel is required where TensorRT built the engine. Layers that
the compiler is no judge of, TensorRT-RTX having no such kernels for the device, are left to TensorRT on the device by
default; what a user requires holds for them as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from deploy.manifest import CompiledLayer, Engine, Plan
from profiles.errors import GpusqError

What = Literal["int8-gemms", "fused-attention", "sparse", "all-tactics"]
Row = tuple[str, str, str, str]
_SHARE = re.compile(r"(int8-gemms|fused-attention)(?:=(\d+(?:\.\d+)?)%?)?")
_COUNT = re.compile(r"sparse(?:>=(\d+))?")
_INT8 = ("int8", "int8")
_COMPILED_INT8 = ("Int8", "Int8")
_PERCENT = 100


@dataclass(frozen=True)
class Requirement:
    """One gate: a share from 0 to 1 of what it is about, or for `sparse` a number of layers.

    Attributes:
        what: what it is about.
        least: how much of that.
        judged: leave out layers that the compiler is no judge of, as the default does.
    """

    what: What
    least: float
    judged: bool = False

    def __str__(self) -> str:
        """As `--require` takes it."""
        if self.what == "sparse":
            return f"sparse>={self.least:.0f}"
        if self.what == "all-tactics":
            return self.what
        return f"{self.what}={_PERCENT * self.least:g}%"


@dataclass(frozen=True)
class Missed:
    """A requirement that is not met: one sentence, and for each layer what was asked, what came out, and why."""

    requirement: Requirement
    sentence: str
    rows: tuple[Row, ...] = ()


HEADING: Row = ("layer", "asked", "compiled", "why")


def parse_requirement(text: str) -> Requirement:
    """Read one `--require`.

    Raises:
        GpusqError: it is none, or more than 100 % is asked.
    """
    if match := _SHARE.fullmatch(text):
        share = float(match[2] or _PERCENT) / _PERCENT
        if share <= 1:
            return Requirement("int8-gemms" if match[1] == "int8-gemms" else "fused-attention", share)
    if text == "all-tactics":
        return Requirement("all-tactics", 0)
    if match := _COUNT.fullmatch(text):
        return Requirement("sparse", float(match[1] or 1))
    raise GpusqError(
        f"--require {text}: not understood", hint="write int8-gemms=100%, fused-attention, sparse>=1 or all-tactics"
    )


def default_requirements(
    plan: Plan | None, engines: Iterable[Engine], *, float_type: str, placement: str
) -> list[Requirement]:
    """What is required of a plan without being said."""
    found: list[Requirement] = []
    if plan is not None and plan.target != "cpu":
        if any(layer.asked == _INT8 and layer.judged for layer in plan.layers):
            found.append(Requirement("int8-gemms", 1, judged=True))
        if plan.attentions and float_type != "float32":
            found.append(Requirement("fused-attention", 1))
    if placement == "sparse-int8" and _of_tensorrt(engines):
        found.append(Requirement("sparse", 1))
    return found


def missed(requirements: Iterable[Requirement], plan: Plan | None, engines: Sequence[Engine]) -> Iterator[Missed]:
    """Those of `requirements` that the build does not meet, or of which it cannot be told whether it does.

    Args:
        requirements: what is required.
        plan: the compiled kernels; None where nothing was compiled.
        engines: what was built.
    """
    for requirement in dict.fromkeys(requirements):
        if requirement.what == "sparse":
            yield from _sparse(requirement, plan, engines)
        elif requirement.what == "all-tactics":
            yield from _tactics(requirement, engines)
        elif plan is None or plan.target == "cpu":
            where = "nothing was compiled" if plan is None else "onnxruntime's graph has no such kernels"
            yield Missed(requirement, f"{requirement} cannot be told: {where}")
        elif requirement.what == "int8-gemms":
            yield from _int8(requirement, plan.layers)
        else:
            yield from _attention(requirement, plan)


def _int8(requirement: Requirement, layers: Sequence[CompiledLayer]) -> Iterator[Missed]:
    asked = [layer for layer in layers if layer.asked == _INT8 and (layer.judged or not requirement.judged)]
    less = [layer for layer in asked if layer.compiled != _COMPILED_INT8]
    if not asked:
        yield Missed(requirement, f"{requirement}: no layer of the model is quantized to INT8")
    elif len(less) > (1 - requirement.least) * len(asked):
        rows = tuple(
            (layer.module, "×".join(layer.asked), "×".join(layer.compiled) or "–", _why(layer)) for layer in less
        )
        sentence = f"{len(asked) - len(less)} of {len(asked)} INT8 layers were compiled to INT8 GEMMs"
        yield Missed(requirement, sentence, rows)


def _why(layer: CompiledLayer) -> str:
    if not layer.judged:
        return "this compiler has no such kernel for the device; TensorRT on the device has"
    if not layer.kernel:
        return "no kernel of the plan names it"
    if not layer.compiled:
        return f"it is a part of {layer.kernel}, which is no GEMM"
    if layer.compiled[-1] == "Int8":
        return "the weight is INT8, the activation is not: its quantizer was not fused"
    return "its weight is dequantized before the product"


def _attention(requirement: Requirement, plan: Plan) -> Iterator[Missed]:
    unfused = [attention for attention in plan.attentions if not attention.fused]
    if not plan.attentions:
        yield Missed(requirement, f"{requirement}: no attention was found in the model")
    elif len(unfused) > (1 - requirement.least) * len(plan.attentions):
        more = f" (and {len(unfused) - 1} more)" if unfused[1:] else ""
        rows = tuple((each.module, "one kernel", "several", each.node) for each in unfused)
        yield Missed(requirement, f"the attention of {unfused[0].module} is not fused{more}", rows)


def _sparse(requirement: Requirement, plan: Plan | None, engines: Sequence[Engine]) -> Iterator[Missed]:
    chosen = [engine.sparse_chosen for engine in _of_tensorrt(engines) if engine.sparse_chosen is not None]
    if not chosen:
        why = "the log of the build says nothing of it" if _of_tensorrt(engines) else "TensorRT built no engine here"
        yield Missed(
            requirement, f"{requirement} cannot be told: {why}; TensorRT-RTX and onnxruntime have no sparse kernels"
        )
    elif max(chosen) < requirement.least:
        dense = [layer for layer in plan.layers if not layer.sparse] if plan is not None else []
        rows = tuple(
            (layer.module, "sparse", "dense", layer.kernel or "no kernel of the plan names it") for layer in dense
        )
        yield Missed(
            requirement,
            f"TensorRT chose sparse kernels for {max(chosen)} layers, not for {requirement.least:.0f}",
            rows,
        )


def _tactics(requirement: Requirement, engines: Iterable[Engine]) -> Iterator[Missed]:
    built = _of_tensorrt(engines)
    skipped = sum(engine.tactics_skipped for engine in built)
    if not built:
        yield Missed(requirement, f"{requirement} cannot be told: TensorRT built no engine here")
    elif skipped:
        yield Missed(requirement, f"{skipped} kernels were not tried for want of memory: build on a quiet device")


def _of_tensorrt(engines: Iterable[Engine]) -> list[Engine]:
    return [engine for engine in engines if engine.runtime == "tensorrt"]
