"""The hard rules of TensorRT, checked on the graph before a compiler sees it.

Each rule has an identifier, a sentence and a cure. Some broken rules make the parser or the builder fail; the worse
ones compile and compute something else, such as a quantizer without a zero-point: uint8 by ONNX, signed by TensorRT. No
rule reads a weight: a model with external data is judged by its shapes, types, scales and zero-points.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from exporters.lint.operators import OPERATORS
from exporters.lint.quantization import QUANTIZATION
from exporters.lint.rule import Finding, Rule, Severity, Subject, found
from profiles.device import Device

__all__ = ["RULES", "Finding", "Rule", "Severity", "lint", "rules_for"]

RULES: tuple[Rule, ...] = (*QUANTIZATION, *OPERATORS)


def lint(model: ir.Model, device: Device | None = None) -> list[Finding]:
    """Return every breach of a rule in `model`, its subgraphs and its local functions, errors and warnings.

    Args:
        model: the graph; it is not changed.
        device: whose parser and kernels are meant. Without one, rules that depend on the device find nothing.
    """
    subject = Subject(_inlined(model), device)
    return [found(rule, place) for rule in rules_for(device) for place in rule.broken_by(subject)]


def rules_for(device: Device | None) -> tuple[Rule, ...]:
    """The rules that hold for `device`: all of them for TensorRT, those of ONNX itself for onnxruntime."""
    if device is None or device.runtime == "tensorrt":
        return RULES
    return tuple(rule for rule in RULES if rule.onnx)


def _inlined(model: ir.Model) -> ir.Model:
    """The model with its local functions in place, as the parser sees it."""
    if not model.functions:
        return model
    copy = model.clone()
    common.InlinePass()(copy)
    return copy
