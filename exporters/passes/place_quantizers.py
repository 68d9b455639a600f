"""Quantize what has no quantizer yet, by a named placement; `lower_fake_quantize` turns the quantizers into Q/DQ.

    x ─► MatMul              x ─► FakeQuantize, s = amax(x) / 127 ─► MatMul
          ▲            →                                              ▲
    W ────┘                  W ─► FakeQuantize, s[n] = amax(W[:, n]) / 127

| placement | quantizes |
|---|---|
| w8a8-linear | both inputs of linear layers and convolutions, weights per output channel, activations per tensor |
| w8a8-mha | also both products of each attention: q, k, the softmax with scale 1/127, v |
| sparse-int8 | also what follows a linear layer, bias included: NVIDIA reports sparse INT8 kernels chosen only there |
| w4 | weights alone, to 4 bits in blocks of 128 or 64 along K |
| fp8 | as w8a8-linear, to 8-bit floats (E4M3): s = amax / 448 |
| fp8-mha | also both products of each attention, the softmax with scale 1/448 |
| nvfp4 | both inputs of linear layers, to 4-bit floats in blocks of 16 along K (`exporters.small_floats`) |

`exporters.passes.placement_rules` tells what is left alone, as are modules that are marked to stay float, biases, what
the graph answers, and the sums of a transformer's residual stream. The sum of a CNN is quantized on the branch that
ends in no convolution, so that it stays the other convolution's epilogue. What is quantized already stays as it is.

A scale is rounded up to a float16 number where the graph will be float16: it then survives typing bit for bit, and an
INT8 GEMM writes Half and not Float. In the same way to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.weight_scales import WeightMethod, weight_amax
from exporters.answering_layer import answering_layers, bias_of, one_scale_is_enough
from exporters.derived_tensor import release
from exporters.linears import Linear, find_linears
from exporters.module_names import MODULE_KEY
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.passes.placement_reads import Read, attention_products, outputs, residuals
from exporters.passes.placement_rules import (
    activation,
    block_of,
    kept_float,
    no_block,
    no_fp4,
    no_fp8,
    no_fp8_attention,
    no_int8_attention,
    too_small,
)
from exporters.quantizer import DOMAIN, E4M3, INT4, INT8, OPERATOR, Grid
from exporters.small_floats import BLOCK, NVFP4_MAX
from profiles.device import FloatType
from profiles.errors import GpusqError

Measure = Callable[[ir.Model, Sequence[str]], Mapping[str, float]]
"""Returns amax of each of the named tensors of a graph."""

# The largest finite numbers: (2 − 2^−10)·2^15 and (2 − 2^−7)·2^127 for the short types.
LARGEST = {"float32": float(np.finfo(np.float32).max), "float16": 65504.0, "bfloat16": (2 - 2.0**-7) * 2.0**127}
_DEAD = 1.0  # amax of what is nothing but zeros
_SMALLEST = np.finfo(np.float32).smallest_normal  # what a scale must not fall below: a subnormal one may be 0 on a GPU


@dataclass(frozen=True)
class _Format:
    """What numbers are rounded to: the grid, its smallest and largest, and the amax that a scale of 1 stands for."""

    name: str
    grid: Grid
    low: int
    high: int
    reach: float


_INT8 = _Format("int8", "integers", *INT8, INT8[1])
_INT4 = _Format("int4", "integers", *INT4, INT4[1])
_FP8 = _Format("fp8", "e4m3", *E4M3, E4M3[1])
_FORMATS = {"fp8": _FP8, "fp8-mha": _FP8, "nvfp4": _Format("nvfp4", "nvfp4", -6, 6, NVFP4_MAX)}
_ATTENTION_RULES = {"w8a8-mha": no_int8_attention, "fp8-mha": no_fp8_attention}


@dataclass(frozen=True)
class PlaceQuantizers:
    """Quantize by `placement`; `measure` is asked once, for the tensors that need a scale.

    The scales of weights reach to the largest magnitude, or with `mse` to where the rounding error is the least. With
    `one_scale_answers` a weight whose product, with no bias, is the graph's answer gets one scale where that is enough.
    """

    placement: str
    measure: Measure
    float_type: FloatType
    weight_method: WeightMethod = "max"
    one_scale_answers: bool = False

    def __call__(self, model: ir.Model) -> Outcome:
        """Insert the quantizers.

        Raises:
            GpusqError: a range is not finite, or beyond what the graph's type can hold.
        """
        inserter = Inserter(model.graph)
        left: list[LeftAlone] = []
        weights = list(self._weights(model.graph, left))
        reads = [] if self.placement == "w4" else list(self._reads(model.graph, weights, left))
        amax = self._measured(model, reads)
        changes = [self._quantize_activation(inserter, read, amax) for read in reads]
        whole = self._of_one_scale(model.graph)
        changes += [self._quantize_weight(inserter, linear, whole=linear.node in whole) for linear in weights]
        if changes:
            model.opset_imports[DOMAIN] = 1
        return Outcome(f"place quantizers ({self.placement})", len(changes), tuple(left), tuple(changes))

    def _weights(self, graph: ir.Graph, left: list[LeftAlone]) -> Iterator[Linear]:
        kept = kept_float(graph)
        for linear in find_linears(graph):
            if linear.weight_dq is not None:
                continue
            why = kept.get(linear.module) or self._why_not(linear)
            if why:
                left.append(LeftAlone(linear.module, why))
            else:
                yield linear

    def _why_not(self, linear: Linear) -> str:
        if self.placement == "w4":
            return no_block(linear)
        more = {"fp8": no_fp8, "fp8-mha": no_fp8, "nvfp4": no_fp4}.get(self.placement)
        return too_small(linear) or (more(linear) if more else "")

    def _reads(self, graph: ir.Graph, linears: Sequence[Linear], left: list[LeftAlone]) -> Iterator[Read]:
        """What is to be quantized, each place once, but for what is quantized already."""
        kept = kept_float(graph)
        by_place = {
            (read.node, read.index): read
            for read in self._activations(graph, linears, left)
            if not _is_quantized(read) and read.place.rpartition(".")[0] not in kept
        }
        yield from by_place.values()

    def _activations(self, graph: ir.Graph, linears: Sequence[Linear], left: list[LeftAlone]) -> Iterator[Read]:
        for linear in linears:
            if linear.input_q is None:
                yield Read(activation(linear), linear.node, linear.activation_input, f"{linear.module}.input")
        if self.placement != "nvfp4":
            yield from residuals(graph, linears)
        if self.placement == "sparse-int8":
            yield from outputs(linears)
        if self.placement in _ATTENTION_RULES:
            yield from attention_products(graph, left, _ATTENTION_RULES[self.placement])

    def _measured(self, model: ir.Model, reads: Sequence[Read]) -> Mapping[Read, float]:
        names = list(dict.fromkeys(_name(read.value) for read in reads if read.amax is None))
        measured = self.measure(model, names) if names else {}
        return {read: measured[_name(read.value)] if read.amax is None else read.amax for read in reads}

    def _quantize_activation(self, inserter: Inserter, read: Read, amax: Mapping[Read, float]) -> Change:
        scale = self._scale(np.asarray(amax[read], np.float32), self._format.reach, read.place)
        along = {"axis": -1, "block": BLOCK} if self.placement == "nvfp4" else {}
        quantized = self._insert(inserter, read.value, scale, read.node, read.place, self._format, **along)
        read.node.replace_input_with(read.index, quantized)
        known = "" if read.amax is None else ", known without measuring"
        return Change(read.place, f"{self._format.name}, scale {float(scale):.6g}, amax {amax[read]:.6g}{known}")

    @property
    def _format(self) -> _Format:
        """What activations are rounded to."""
        return _FORMATS.get(self.placement, _INT8)

    def _of_one_scale(self, graph: ir.Graph) -> set[ir.Node]:
        """The layers whose weight gets one scale."""
        answering = [linear for linear in answering_layers(graph) if self.one_scale_answers and bias_of(linear) is None]
        found = {linear.node for linear in answering if one_scale_is_enough(linear.values)}
        for linear in answering:
            release(linear.weight.const_value)
        return found

    def _quantize_weight(self, inserter: Inserter, linear: Linear, *, whole: bool) -> Change:
        axis = None if whole else linear.n_axis
        block, kind = 0, self._format
        if self.placement == "w4":
            axis, block, kind = linear.k_axis, block_of(linear), _INT4
        elif self.placement == "nvfp4":
            axis, block = linear.k_axis, BLOCK
        place = f"{linear.module}.weight"
        shared = f"blocks of {block} along K" if block else "output channel" if axis is not None else "whole weight"
        reader, index = _own_reader(linear, inserter)
        amax = self._weight_amax(linear, axis, block, kind)
        scale = self._scale(amax, kind.reach, place)
        release(linear.weight.const_value)
        quantized = self._insert(inserter, linear.weight, scale, reader, place, kind, axis, block)
        reader.replace_input_with(index, quantized)
        return Change(place, f"{kind.name}, one scale for each {shared}")

    def _weight_amax(self, linear: Linear, axis: int | None, block: int, kind: _Format) -> npt.NDArray[np.float32]:
        if kind.grid == "nvfp4":  # that of the whole weight; its blocks have theirs from it
            axis, block = None, 0
        method = self.weight_method if kind.grid == "integers" else "max"
        return weight_amax(linear.values, axis, block, low=kind.low, high=kind.high, method=method)

    def _scale(self, amax: npt.NDArray[np.float32], high: float, place: str) -> npt.NDArray[np.float32]:
        return storable_scale(amax, high, self.float_type, place, rounded=self.placement != "nvfp4")

    def _insert(
        self,
        inserter: Inserter,
        value: ir.Value,
        scale: npt.NDArray[np.float32],
        before: ir.Node,
        place: str,
        kind: _Format,
        axis: int | None = None,
        block: int = 0,
    ) -> ir.Value:
        attributes: dict[str, int | str] = {"low": kind.low, "high": kind.high, "place": place}
        attributes |= {} if kind.grid == "integers" else {"grid": kind.grid}
        attributes |= ({} if axis is None else {"axis": axis}) | ({"block_size": block} if block else {})
        return inserter.node(
            OPERATOR,
            [value, inserter.initializer(f"{place}_scale", scale)],
            dtype=value.dtype or ir.DataType.FLOAT,
            module=before.metadata_props.get(MODULE_KEY, ""),
            attributes=attributes,
            before=before,
            shape=value.shape,
            domain=DOMAIN,
        )


def storable_scale(
    amax: npt.NDArray[np.float32], high: float, float_type: FloatType, place: str, *, rounded: bool = True
) -> npt.NDArray[np.float32]:
    """The scale amax / high, rounded up to what a graph of `float_type` can hold.

    Raises:
        GpusqError: the range is not finite, or beyond what the type can hold.
    """
    scale = np.maximum(np.where(amax > 0, amax, _DEAD) / high, _SMALLEST).astype(np.float32)
    if not (np.isfinite(amax).all() and (scale <= LARGEST[float_type]).all()):
        raise GpusqError(
            f"the range of {place!r} reaches {float(amax.max()):g}: no {float_type} can be its scale",
            hint="look for NaN or infinity in the weights and the samples",
        )
    if float_type == "float32" or not rounded:
        return scale
    short = scale.astype(ir.DataType[float_type.upper()].numpy())
    # The next number above a positive one has the next integer as its bits.
    higher = (short.view(np.uint16) + np.uint16(1)).view(short.dtype)
    return np.where(short.astype(np.float32) < scale, higher, short).astype(np.float32)


def _own_reader(linear: Linear, inserter: Inserter) -> tuple[ir.Node, int]:
    """What reads the stored weight on the way to the layer: the layer itself, or a Transpose or reshape of its own.

    Others that read the same Transpose keep the float weight. Layers that read one weight in one way share its integers
    in the end (`LowerFakeQuantize`), each through a DequantizeLinear of its own.
    """
    node, index = linear.node, 1 - linear.activation_input
    while (value := node.inputs[index]) is not linear.weight:
        producer = None if value is None else value.producer()
        assert producer is not None
        if len(producer.outputs[0].uses()) > 1 or producer.outputs[0].is_graph_output():
            node.replace_input_with(index, _copied(producer, inserter))
        else:
            node, index = producer, 0
    return node, index


def _copied(node: ir.Node, inserter: Inserter) -> ir.Value:
    old = node.outputs[0]
    return inserter.node(
        node.op_type,
        [value for value in node.inputs if value is not None],
        dtype=old.dtype or ir.DataType.FLOAT,
        module=node.metadata_props.get(MODULE_KEY, ""),
        attributes={name: attribute.value for name, attribute in node.attributes.items()},
        before=node,
        shape=old.shape,
    )


def _is_quantized(read: Read) -> bool:
    producer = read.value.producer()
    before = producer is not None and producer.op_type in ("DequantizeLinear", OPERATOR)
    return before or read.node.op_type == "QuantizeLinear"


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
