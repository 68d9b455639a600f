"""The graph surgery: which passes run for a target, in which order.

The order matters: attention takes its form before types are set, sparsity is
judged on the values that are stored in the end, and the opset is declared when no operator changes any more.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from exporters.passes.annotate_sparsity import AnnotateSparsity
from exporters.passes.lower_attention import LowerAttention
from exporters.passes.outcome import Outcome, Pass
from exporters.passes.set_opset import SetOpset
from exporters.passes.type_float16 import TypeFloat16
from profiles.device import AttentionForm, Device, FloatType


@dataclass(frozen=True)
class Target:
    """What the graph is made for.

    Attributes:
        device: the profile.
        float_type: the type of what is not quantized.
    """

    device: Device
    float_type: FloatType

    @property
    def attention(self) -> AttentionForm:
        """The form that the target fuses; TensorRT has no float32 kernel for the Attention operator."""
        if self.device.runtime != "onnxruntime" and self.float_type == "float32":
            return "matmul"
        return self.device.onnx.attention


def passes_for(target: Target) -> list[Pass]:
    """The passes for `target`, in their order."""
    passes: list[Pass] = []
    if target.attention == "matmul":
        passes.append(LowerAttention())
    if target.float_type == "float16":
        passes.append(TypeFloat16())
    passes.append(AnnotateSparsity(target.device.sparse))
    passes.append(SetOpset(target.device.onnx.opset))
    return passes


def surgery(model: ir.Model, target: Target) -> list[Outcome]:
    """Run the passes on `model`, in place, and return what each did."""
    return [step(model) for step in passes_for(target)]
