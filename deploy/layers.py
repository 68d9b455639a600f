"""The layers of a model that have a constant weight, and the bytes that their weights need."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import onnx_ir as ir

from deploy.manifest import Layer, Sizes
from exporters.linears import QDQ, Linear, find_linears
from exporters.sparsity import PATTERNS, compressed_bytes, sparsity_of
from exporters.zero_pattern import Pattern
from profiles.device import Device

_FP32_BYTES = 4


def layers_of(model: ir.Model, device: Device | None) -> tuple[Layer, ...]:
    """Describe every GEMM and convolution with a constant weight, its sparsity judged by the rules of `device`."""
    return tuple(_layer(linear, device) for linear in find_linears(model.graph))


def sizes_of(model: ir.Model) -> Sizes:
    """Compute the bytes of the weights from the real tensors: in FP32, and with every 2:4 weight compressed."""
    linears = list(find_linears(model.graph))
    patterns = [PATTERNS.get(sparsity_of(linear, None).pattern) for linear in linears]
    found = [(linear, pattern) for linear, pattern in zip(linears, patterns, strict=True) if pattern is not None]
    pruned = [linear for linear, _ in found]
    pruned_fp32 = sum(prod(linear.shape) * _FP32_BYTES for linear in pruned)
    pruned_compressed = sum(_compressed(linear, pattern) for linear, pattern in found)
    scales = sum(_scale_bytes(linear) for linear in pruned)
    rest = _tensors_besides(model, pruned)
    total_fp32 = pruned_fp32 + sum(tensor.size * _FP32_BYTES for tensor in rest)
    total = pruned_compressed + sum(tensor.nbytes for tensor in rest) + sum(_scale_bytes(linear) for linear in linears)
    return Sizes(
        pruned_fp32=pruned_fp32,
        pruned_compressed=pruned_compressed,
        pruned_ratio=pruned_fp32 / pruned_compressed if pruned_compressed else 1.0,
        scales=scales,
        total_fp32=total_fp32,
        total_compressed=total,
        total_ratio=total_fp32 / total if total else 1.0,
    )


def summary(layers: Sequence[Layer]) -> str:
    """One line: "48 of 49 linears 2:4 along K, 97.8 % of the weights"."""
    pruned = [layer for layer in layers if layer.sparsity.pattern == "2:4"]
    weights = sum(layer.k * layer.n for layer in layers)
    share = sum(layer.k * layer.n for layer in pruned) / weights if weights else 0.0
    return f"{len(pruned)} of {len(layers)} {noun(layers)} 2:4 along K, {100 * share:.1f} % of the weights"


def noun(layers: Sequence[Layer]) -> str:
    """What `layers` are called: linears, as long as no convolution is among them."""
    return "linears" if all(layer.kind == "gemm" for layer in layers) else "layers"


def _layer(linear: Linear, device: Device | None) -> Layer:
    scale = linear.weight_scale
    return Layer(
        module=linear.module,
        kind=linear.kind,
        k=linear.k,
        n=linear.n,
        group=linear.group,
        weight_type=linear.weight_type,
        activation_type=linear.activation_type,
        input_scale=linear.input_scale,
        weight_scale_min=None if scale is None else float(scale.min()),
        weight_scale_max=None if scale is None else float(scale.max()),
        sparsity=sparsity_of(linear, device.sparse if device else None),
    )


def _scale_bytes(linear: Linear) -> int:
    scale = linear.weight_scale
    return 0 if scale is None else (scale.size + 1) * _FP32_BYTES


def _compressed(linear: Linear, pattern: Pattern) -> int:
    assert linear.weight.const_value is not None
    return compressed_bytes(prod(linear.shape), bits=linear.weight.const_value.dtype.bitwidth, pattern=pattern)


def _tensors_besides(model: ir.Model, pruned: Sequence[Linear]) -> list[ir.TensorProtocol]:
    """Every constant of the network itself: neither a pruned weight, nor a scale or zero-point, nor a shape."""
    weights = {linear.weight for linear in pruned}
    qdq = {value for node in model.graph if node.op_type in QDQ for value in node.inputs[1:]}
    return [
        value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and value not in weights
        and value not in qdq
        and value.dtype != ir.DataType.INT64
    ]
