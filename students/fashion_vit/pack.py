"""From the module in training to the student file, INT8 weights and trained scales included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calibration.samples import InputSpec
from exporters.quantizer import INT8_HIGH
from exporters.student_file import WEIGHT, Array, StudentFile
from students.fashion_vit.data import MEAN, SCALE, STD
from students.fashion_vit.prune import SparseLinear, linears
from students.fashion_vit.quant import WEIGHT_LOW, QuantLinear

MODEL = "students.fashion_vit.model:fashion_vit"
LEARNED_SCALES = ("log_weight_scale", "log_input_scale")
INPUTS = {"image": InputSpec(shape=(1, 28, 28), dtype="float32", scale=SCALE, mean=MEAN, std=STD)}


@torch.no_grad()
def pack(model: nn.Module, config: dict[str, Any], card: dict[str, Any]) -> StudentFile:
    """The student file of a dense, pruned or quantized FashionVit; pruned weights are exact zeros in it.

    `config` is what `fashion_vit` was called with. A QuantLinear becomes an int8 weight with its two scales.
    """
    tensors = {name: t.numpy().copy() for name, t in model.state_dict().items() if not name.endswith(LEARNED_SCALES)}
    weight_scales: dict[str, Array] = {}
    input_scales: dict[str, Array] = {}
    for name, linear in linears(model).items():
        if isinstance(linear, SparseLinear):
            tensors[name + WEIGHT] = (linear.weight * linear.mask).numpy()
        if isinstance(linear, QuantLinear):
            scale = linear.weight_scale()
            tensors[name + WEIGHT] = int8_weight(linear.weight * linear.mask, scale).numpy()
            weight_scales[name] = scale.numpy()
            input_scales[name] = linear.input_scale().numpy()
    return StudentFile(
        model=MODEL,
        config=config,
        inputs=INPUTS,
        outputs=("logits",),
        tensors=tensors,
        weight_scales=weight_scales,
        input_scales=input_scales,
        card=card,
    )


def int8_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 [N, K] of a float32 weight [N, K] and its scale [N]: the integers that the fake quantization multiplied."""
    return torch.clamp(torch.round(weight / scale[:, None]), WEIGHT_LOW, INT8_HIGH).to(torch.int8)
