"""The layers of a model that have a constant weight, and the bytes that their weights need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from deploy.manifest import Layer, Sizes
from exporters.linears import QDQ, Linear, array_of, find_linears
from exporters.sparsity import compressed_bytes, sparsity_of
from profiles.device import Device

_FP32_BYTES = 4


def layers_of(model: ir.Model, device: Device | None) -> tuple[Layer, ...]:
    """Describe every GEMM and convolution with a constant weight, its sparsity judged by the rules of `device`."""
    return tuple(_layer(linear, device) for linear in find_linears(model.graph))


def sizes_of(model: ir.Model) -> Sizes:
    """Compute the bytes of the weights from the real tensors: in FP32, and with every 2:4 weight compressed."""
    linears = list(find_linears(model.graph))
    pruned = [linear for linear in linears if sparsity_of(linear.values, linear.k_axis, None).pattern == "2:4"]
    pruned_fp32 = sum(linear.values.size * _FP32_BYTES for linear in pruned)
    pruned_compressed = sum(compressed_bytes(linear.values, bits=linear.values.itemsize * 8) for linear in pruned)
    scales = sum(_scale_bytes(linear) for linear in pruned)
    rest = _arrays_besides(model, pruned)
    total_fp32 = pruned_fp32 + sum(array.size * _FP32_BYTES for array in rest)
    total = pruned_compressed + sum(array.nbytes for array in rest) + sum(_scale_bytes(linear) for linear in linears)
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
    return f"{len(pruned)} of {len(layers)} linears 2:4 along K, {100 * share:.1f} % of the weights"


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
        sparsity=sparsity_of(
            linear.values, linear.k_axis, device.sparse if device else None, int8_output=linear.int8_output
        ),
    )


def _scale_bytes(linear: Linear) -> int:
    scale = linear.weight_scale
    return 0 if scale is None else (scale.size + 1) * _FP32_BYTES


def _arrays_besides(
    model: ir.Model, pruned: Sequence[Linear]
) -> list[np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Every constant of the network itself: neither a pruned weight, nor a scale or zero-point, nor a shape."""
    weights = {linear.weight for linear in pruned}
    qdq = {value for node in model.graph if node.op_type in QDQ for value in node.inputs[1:]}
    return [
        array_of(value)
        for value in model.graph.initializers.values()
        if value not in weights and value not in qdq and value.dtype != ir.DataType.INT64
    ]
