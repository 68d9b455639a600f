"""Give the graph FP16 types for strong typing, and change no trained scale.

Every float32 constant and tensor becomes float16; inputs and outputs of the graph stay float32, with a Cast beside
them. A Q/DQ scale becomes float16 only where that is exact, that is where it is a float16 number already. Any other
scale keeps its float32 bits, and its node works in float32 between two Casts:

    x (f16) ─► Q, scale s (f16)                    s is a float16 number
    x (f16) ─► Cast f32 ─► Q, scale s (f32)        it is not; likewise DQ ─► Cast f16

An input that reaches nothing but quantizers, through data movement alone, is quantized from float32: rounding it to
float16 first would cost accuracy and save nothing. Its quantizer reads the same scale in float32.

Both ways of holding a scale compile to INT8 GEMMs with the same number of kernels; behind a float16 scale the GEMM
writes Half, behind a float32 one it writes Float, twice the bytes. So train with scales that float16 can hold.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.derived_tensor import derived_tensor, release
from exporters.linears import QDQ, array_of, array_shape, trace_back
from exporters.module_names import MODULE_KEY
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.slices import flat_slices
from profiles.errors import GpusqError

_F16, _F32 = ir.DataType.FLOAT16, ir.DataType.FLOAT
# Operators that move their first input and compute nothing.
_MOVES = frozenset({"Pad", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Identity"})


@dataclass(frozen=True)
class TypeFloat16:
    """Type a float32 graph as float16."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Type it.

        Raises:
            GpusqError: a constant is beyond the range of float16.
        """
        graph = model.graph
        floats = [value for value in graph.inputs if value.dtype == _F32]
        island_of = {value: island for value in floats if (island := _island(value))}
        islands = island_of.values()
        wide_scales = dict.fromkeys(value for node in graph if node.op_type in QDQ for value in _inexact_scale(node))
        wide = {*wide_scales, *(scale for island in islands for scale in island.own_scales())}
        constants = [value for value in graph.initializers.values() if value.dtype == _F32 and value not in wide]
        inputs = [value for value in floats if value not in island_of and not _is_cast_only(value)]
        if changed := len(constants) + len(inputs):
            for value in constants:
                _type_constant(value)
            _type_tensors(graph, keep={value for island in islands for value in island.tensors})
            inserter = Inserter(graph)
            for island in islands:
                island.widen_scales(inserter)
            _cast_inputs_and_outputs(graph, inserter, inputs)
            reading_floats = {node for island in islands for node in island.quantizers}
            _cast_around_wide_scales(graph, inserter, wide_scales, besides=reading_floats)
        why = "it is no float16 number: kept in float32, and its GEMM writes Float, not Half"
        return Outcome("type float16", changed, tuple(LeftAlone(value.name or "", why) for value in wide_scales))


@dataclass(frozen=True)
class _Island:
    """The tensors between a graph input and the quantizers that read it, through data movement alone."""

    tensors: frozenset[ir.Value]
    quantizers: tuple[ir.Node, ...]

    def own_scales(self) -> list[ir.Value]:
        """The scales that nothing but these quantizers read."""
        scales = [scale for node in self.quantizers if (scale := node.inputs[1]) is not None]
        return [scale for scale in scales if all(node in self.quantizers for node, _ in scale.uses())]

    def widen_scales(self, inserter: Inserter) -> None:
        """Let the quantizers read their scale in float32, the type of what they quantize; the values are the same."""
        for node in self.quantizers:
            scale = node.inputs[1]
            if scale is not None and scale.dtype == _F16:
                array = array_of(scale).astype(np.float32)
                node.replace_input_with(1, inserter.initializer(f"{scale.name}_float32", array))


def _island(start: ir.Value) -> _Island | None:
    """What can stay float32 behind a graph input; None if anything else than a quantizer reads it in the end."""
    tensors, quantizers, waiting = [start], [], [start]
    while waiting:
        for node, index in waiting.pop().uses():
            if index == 0 and node.op_type == "QuantizeLinear":
                quantizers.append(node)
            elif index == 0 and node.op_type in _MOVES and not _reads_a_float(node):
                tensors.extend(node.outputs)
                waiting.extend(node.outputs)
            else:
                return None
    return _Island(frozenset(tensors), tuple(quantizers)) if quantizers else None


def _reads_a_float(node: ir.Node) -> bool:
    """Whether a further input is a float, such as the value that Pad fills in: it must have the type of the first."""
    return any(value is not None and value.dtype == _F32 for value in node.inputs[1:])


def _inexact_scale(node: ir.Node) -> list[ir.Value]:
    scale, _ = trace_back(node.inputs[1])
    if scale is None or scale.const_value is None:
        return []
    array = array_of(scale)
    return [] if array.dtype == np.float16 or _is_exact(array) else [scale]


def _is_exact(array: npt.NDArray[np.generic]) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.array_equal(array.astype(np.float16).astype(np.float32), array))


def _is_cast_only(value: ir.Value) -> bool:
    return all(node.op_type == "Cast" for node, _ in value.uses())


def _type_constant(value: ir.Value) -> None:
    tensor = value.const_value
    assert tensor is not None
    largest = _largest(array_of(value))
    release(tensor)
    if largest > float(np.finfo(np.float16).max):
        raise GpusqError(
            f"constant {value.name!r} holds {largest:g}, beyond the range of float16",
            hint="convert with --precision fp32",
        )
    shape = array_shape(value)
    value.const_value = derived_tensor([tensor], lambda array: array.astype(np.float16), _F16, shape, value.name)
    # A new type, since clones of a model share their types.
    value.type = ir.TensorType(_F16)


def _largest(array: npt.NDArray[np.generic]) -> float:
    """The largest magnitude of the finite values, 0 where there are none."""
    return max((_largest_of(part) for part in flat_slices(array)), default=0.0)


def _largest_of(part: npt.NDArray[Any]) -> float:
    largest = float(max(part.max(), -part.min()))
    return largest if np.isfinite(largest) else float(np.abs(part[np.isfinite(part)]).max(initial=0))


def _type_tensors(graph: ir.Graph, keep: Collection[ir.Value]) -> None:
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _F32:
            node.attributes["to"] = ir.AttrInt64("to", int(_F16))
        for value in node.outputs:
            if value.dtype == _F32 and value not in keep:
                value.type = ir.TensorType(_F16)


def _cast_inputs_and_outputs(graph: ir.Graph, inserter: Inserter, inputs: Sequence[ir.Value]) -> None:
    for value in inputs:
        uses = list(value.uses())
        cast = inserter.node(
            "Cast", [value], dtype=_F16, module="", attributes={"to": int(_F16)}, before=graph[0], shape=value.shape
        )
        for node, index in uses:
            node.replace_input_with(index, cast)
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype != _F16:
            continue
        name, value.name = value.name, f"{value.name}_float16"
        cast = inserter.node("Cast", [value], dtype=_F32, module="", attributes={"to": int(_F32)}, shape=value.shape)
        cast.name = name
        graph.outputs[index] = cast


def _cast_around_wide_scales(
    graph: ir.Graph, inserter: Inserter, wide_scales: Collection[ir.Value], besides: Collection[ir.Node]
) -> None:
    for node in [node for node in graph if node.op_type in QDQ and node.inputs[1] in wide_scales]:
        if node in besides:
            continue
        module = node.metadata_props.get(MODULE_KEY, "")
        if node.op_type == "QuantizeLinear":
            x = node.inputs[0]
            assert x is not None
            wide = inserter.node(
                "Cast", [x], dtype=_F32, module=module, attributes={"to": int(_F32)}, before=node, shape=x.shape
            )
            node.replace_input_with(0, wide)
            continue
        output = node.outputs[0]
        output.type = ir.TensorType(_F32)
        uses = list(output.uses())
        users = {user for user, _ in uses}
        narrow = inserter.node(
            "Cast",
            [output],
            dtype=_F16,
            module=module,
            attributes={"to": int(_F16)},
            before=next((user for user in graph if user in users), None),
            shape=output.shape,
        )
        for user, index in uses:
            user.replace_input_with(index, narrow)
