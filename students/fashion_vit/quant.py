"""Quantization-aware training: fake quantization with learned scales (LSQ, arXiv 1902.08153), masks kept.

Symmetric INT8, weights per output channel in [-127, 127], activations per tensor in [-128, 127]. The forward pass is
exactly `clamp(round_half_even(x / s), low, high) * s`, what QuantizeLinear and DequantizeLinear compute. Backwards,
x gets the incoming gradient where it was not clamped (straight through), and s gets

    Σ g · (round(x/s) − x/s  inside,  low or high  outside) · 1/√(count · high)        (LSQ, equations 2 and 3)

What is learned is log s: scales stay positive, and Adam's steps become relative ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from exporters.fake_quantize import fake_quantize
from exporters.quantizer import INT8_HIGH, INT8_LOW
from students.fashion_vit.prune import SparseLinear, linears, replace

WEIGHT_LOW = -127
DEAD_SCALE = 1.0
CLIP_CANDIDATES = 40


class LearnedFakeQuant(torch.autograd.Function):
    """`fake_quantize` with LSQ's gradients; the scale is [] (per tensor) or [N, 1] (per row of x [N, K])."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        """The quantized and dequantized x."""
        ctx.save_for_backward(x, scale)
        ctx.bounds = low, high
        return fake_quantize(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The gradients of x and of the scale, each in its shape."""
        (grad,) = grads
        x, scale = ctx.saved_tensors
        low, high = ctx.bounds
        ratio = x / scale
        rounded = ratio.round()
        clamped = rounded.clamp(low, high)
        inside = rounded == clamped
        slope = clamped.sub_(ratio.mul_(inside)).mul_(grad)
        total = slope.sum(dim=1, keepdim=True) if scale.ndim else slope.sum()
        return grad * inside, total * (x.numel() / scale.numel() * high) ** -0.5, None, None


def learned_fake_quant(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """`fake_quantize(x, scale, low, high)`, differentiable in `x` and `scale`."""
    result: Tensor = LearnedFakeQuant.apply(x, scale, low, high)  # type: ignore[no-untyped-call]
    return result


class QuantLinear(SparseLinear):
    """A SparseLinear whose input and masked weight are fake-quantized with learned scales."""

    def __init__(self, source: SparseLinear, input_scale: Tensor) -> None:
        super().__init__(source, source.mask)
        amax = self.weight.detach().abs().amax(dim=1)
        scale = torch.where(amax > 0, amax / INT8_HIGH, torch.full_like(amax, DEAD_SCALE))
        self.log_weight_scale = nn.Parameter(scale.log())
        self.log_input_scale = nn.Parameter(input_scale.log())

    def forward(self, x: Tensor) -> Tensor:
        """[…, K] → […, N]."""
        x = learned_fake_quant(x, self.input_scale(), INT8_LOW, INT8_HIGH)
        scale = self.weight_scale()[:, None]
        weight = learned_fake_quant(self.weight * self.mask, scale, WEIGHT_LOW, INT8_HIGH)
        return nn.functional.linear(x, weight, self.bias)

    def weight_scale(self) -> Tensor:
        """float32 [N], every value a float16 number."""
        return as_float16_number(self.log_weight_scale.exp())

    def input_scale(self) -> Tensor:
        """float32 [], a float16 number."""
        return as_float16_number(self.log_input_scale.exp())


def as_float16_number(scale: Tensor) -> Tensor:
    """The nearest float16 number, in float32, with a straight-through gradient.

    An FP16 engine then holds the trained scale exactly, and its INT8 GEMMs write FP16 and not FP32. The sum is exact:
    the two summands lie within a factor of two of each other (Sterbenz).
    """
    return scale + (scale.half().float() - scale).detach()


def quantize(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace, in place, every SparseLinear by a QuantLinear; `batches` are model inputs to take the ranges from."""
    scales = input_scales(model, batches)
    for name, linear in linears(model).items():
        if isinstance(linear, SparseLinear):
            replace(model, name, QuantLinear(linear, scales[name]))


@torch.no_grad()
def input_scales(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """For each linear of `model`, the float32 [] scale that minimises the squared error of its inputs."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears(model)}
    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].detach()))
        for name, linear in linears(model).items()
    ]
    try:
        for batch in batches:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: best_scale(torch.cat([x.flatten() for x in parts])) for name, parts in seen.items()}


def best_scale(x: Tensor) -> Tensor:
    """The per-tensor scale [], among clips at 1/40, 2/40 … 40/40 of amax, with the smallest squared error on x."""
    amax = x.abs().max()
    if amax == 0:
        return torch.full_like(amax, DEAD_SCALE)
    candidates = amax * torch.arange(1, CLIP_CANDIDATES + 1) / CLIP_CANDIDATES / INT8_HIGH
    errors = torch.stack([(fake_quantize(x, scale) - x).square().mean() for scale in candidates])
    return candidates[errors.argmin()]
