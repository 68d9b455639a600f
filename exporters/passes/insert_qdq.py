"""Put a student's trained scales into the graph as Q/DQ, one pair at the input of each linear layer.

    x ──────────► MatMul          x ─► Q ─► DQ ─► MatMul
                    ▲        →                       ▲
    W [K, N] float ─┘             W int8 [K, N] ─► DQ

    q = saturate(round_half_even(x / scale)),  x ≈ q · scale

The rules of TensorRT's explicit quantization that this keeps: symmetric with an explicit int8 zero-point (without one,
ONNX means uint8), per-tensor activations, one weight scale per output channel, no Transpose between the INT8 constant
and its DQ (the integers are stored as the node reads them), the bias untouched. Linear outputs, residual adds,
attention and LayerNorm stay in high precision. Where several layers read one tensor with one scale, they share its Q
and each has a DQ of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.linears import Linear, find_linears
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.outcome import LeftAlone, Outcome
from profiles.errors import GpusqError


@dataclass(frozen=True)
class QuantizedLinear:
    """What training decided about one linear layer.

    Attributes:
        weight: int8 [N, K].
        weight_scale: float32 [N], positive.
        input_scale: float32 [], positive.
    """

    weight: npt.NDArray[np.int8]
    weight_scale: npt.NDArray[np.float32]
    input_scale: npt.NDArray[np.float32]


@dataclass(frozen=True)
class InsertQdq:
    """Quantize the linear layers named in `layers`, by module."""

    layers: Mapping[str, QuantizedLinear]

    def __call__(self, model: ir.Model) -> Outcome:
        """Insert the pairs.

        Raises:
            GpusqError: a layer with trained scales is not in the graph, or has another shape there.
        """
        linears = list(find_linears(model.graph))
        self._check(linears)
        inserter = Inserter(model.graph)
        quantized: dict[tuple[ir.Value, bytes], ir.Value] = {}
        changed, left = 0, []
        for linear in linears:
            layer = self.layers.get(linear.module)
            if layer is None:
                left.append(LeftAlone(linear.module, "it has no trained scales"))
                continue
            if linear.weight_dq is not None:
                left.append(LeftAlone(linear.module, "it has Q/DQ already"))
                continue
            _quantize(linear, layer, inserter, quantized)
            changed += 1
        drop_unused_initializers(model.graph)
        return Outcome("insert Q/DQ", changed, tuple(left))

    def _check(self, linears: Sequence[Linear]) -> None:
        """Every trained layer must be in the graph and fit it, before anything is edited."""
        if lost := sorted(self.layers.keys() - {linear.module for linear in linears}):
            more = f" and {len(lost) - 1} more" if lost[1:] else ""
            raise GpusqError(
                f"the exported graph has no linear layer {lost[0]!r}{more}",
                hint="its trained scales would be lost: they may only belong to an nn.Linear that the forward uses",
            )
        for linear in linears:
            layer = self.layers.get(linear.module)
            if layer is not None and layer.weight.shape != (linear.n, linear.k):
                raise GpusqError(
                    f"layer {linear.module!r} is {linear.n}×{linear.k} in the graph, its trained weight "
                    f"{'×'.join(map(str, layer.weight.shape))}",
                    hint="the checkpoint belongs to another architecture",
                )


def _quantize(
    linear: Linear,
    layer: QuantizedLinear,
    inserter: Inserter,
    quantized: dict[tuple[ir.Value, bytes], ir.Value],
) -> None:
    module, node = linear.module, linear.node
    activation = node.inputs[0]
    assert activation is not None
    stored = layer.weight if linear.k_axis == 1 else np.ascontiguousarray(layer.weight.T)
    weight = inserter.initializer(f"{module}.weight_int8", stored)
    weight_scale = inserter.initializer(f"{module}.weight_scale", layer.weight_scale)
    weight_zero = inserter.initializer(f"{module}.weight_zero_point", np.zeros(layer.weight_scale.shape, np.int8))
    input_scale = inserter.initializer(f"{module}.input_scale", layer.input_scale)
    input_zero = inserter.initializer("zero_point_int8", np.zeros((), np.int8))

    key = (activation, layer.input_scale.tobytes())
    if key not in quantized:
        quantized[key] = inserter.node(
            "QuantizeLinear",
            [activation, input_scale, input_zero],
            dtype=ir.DataType.INT8,
            module=module,
            before=node,
            shape=activation.shape,
        )
    x = inserter.node(
        "DequantizeLinear",
        [quantized[key], input_scale, input_zero],
        dtype=ir.DataType.FLOAT,
        module=module,
        before=node,
        shape=activation.shape,
    )
    w = inserter.node(
        "DequantizeLinear",
        [weight, weight_scale, weight_zero],
        dtype=ir.DataType.FLOAT,
        module=module,
        attributes={"axis": 1 - linear.k_axis},
        before=node,
        shape=weight.shape,
    )
    node.replace_input_with(0, x)
    node.replace_input_with(1, w)
