"""Give the graph FP16 or BF16 types for strong typing, and change no trained scale.

Every float32 constant and tensor becomes float16 (or bfloat16); inputs and outputs of the graph stay float32, with a
Cast beside them. A Q/DQ scale becomes float16 only where that is exact, that is where it is a float16 number already.
Any other scale keeps its float32 bits, and its node works in float32 between two Casts:

    x (f16) ─► Q, scale s (f16)                    s is a float16 number
    x (f16) ─► Cast f32 ─► Q, scale s (f32)        it is not; likewise DQ ─► Cast f16

An input that reaches nothing but quantizers, through data movement alone, is quantized from float32: rounding it to
float16 first would cost accuracy and save nothing. Its quantizer reads the same scale in float32. In the same way an
answer that an INT8 GEMM writes by itself is float32 from the start (`exporters.answering_layer`).

Both ways of holding a scale compile to INT8 GEMMs with the same number of kernels; behind a float16 scale the GEMM
writes Half, behind a float32 one it writes Float, twice the bytes. So train with scales that float16 can hold.

In the same way an island of nodes works in float32 that computes from integers or with constants beyond the type's
range (`exporters.passes.float_islands`), and so does a single input that ONNX allows no other type
(`exporters.float_ports`).

With samples, the largest value of every tensor is known. One that comes within a factor of two of 65504 stays float32,
and so do the nodes that make and read it. The factor is for inputs that no sample shows: the largest of n values grows
as √(2 ln n) where they are normal and as ln n where they are exponential, so a thousand times more than a million of
them reach 1.2 or 1.5 times as far. The range of bfloat16 is that of float32, and is not measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.derived_tensor import derived_tensor, release
from exporters.float_ports import may_give, may_read, reads_any
from exporters.infer_shape import infer_shape
from exporters.linears import QDQ, array_of, array_shape, trace_back
from exporters.module_names import MODULE_KEY, label_of
from exporters.passes.float_islands import (
    F32,
    KEPT_KEY,
    answering_products,
    behind_constants,
    control_flow,
    from_integers,
    quantized_inputs,
)
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.passes.place_quantizers import LARGEST, Measure
from exporters.slices import flat_slices
from profiles.errors import GpusqError

IoTypes = Literal["keep", "graph"]
"""Whether inputs and outputs of the graph stay float32 behind a Cast, or get the type of the graph."""
MARGIN = 2.0
_UNKNOWN = "its values are not all finite on the samples: it is typed all the same"


@dataclass(frozen=True)
class TypeFloats:
    """Type a float32 graph as `float_type`; `measure` tells the ranges of tensors, where there are samples.

    What it tells may be infinite or NaN. With `writes_float32` an INT8 product writes a float32 answer itself.
    """

    float_type: Literal["float16", "bfloat16"]
    measure: Measure | None = None
    io_types: IoTypes = "keep"
    writes_float32: bool = True

    def __call__(self, model: ir.Model) -> Outcome:
        """Type it.

        Raises:
            GpusqError: a constant is beyond the range of the type, and no function bounds what is made with it.
        """
        graph, opset = model.graph, model.opset_imports.get("") or 0
        short = ir.DataType[self.float_type.upper()]
        for node in graph:
            if any(value.type is None for value in node.outputs):
                infer_shape(node, opset)
        scales = dict.fromkeys(value for node in graph if node.op_type in QDQ for value in _inexact_scale(node, short))
        whole = from_integers(graph)
        large = _large_constants(graph, LARGEST[self.float_type])
        amax = self._measured(model)
        limit = LARGEST[self.float_type] / MARGIN
        reaching = {value: found for value, found in amax.items() if np.isfinite(found) and found > limit}
        _mark(reaching)
        wide = {
            *(node for node in graph if node.op_type in QDQ and node.inputs[1] in scales),
            *(node for node in graph if KEPT_KEY in node.metadata_props),
            *(quantized_inputs(graph) if self.io_types == "keep" else ()),
            *(answering_products(graph) if self.io_types == "keep" and self.writes_float32 else ()),
            *control_flow(graph),
            *whole,
            *(_readers(large) if amax else _bounded(graph, large, self.float_type)),
        }
        changed = _Typing(graph, short, opset, wide, self.io_types).run()
        writes = {"float16": "Half", "bfloat16": "BFloat16"}[self.float_type]
        why = f"it is no {self.float_type} number: kept in float32, and its GEMM writes Float, not {writes}"
        changes = [*_told_integers(whole), *_told_constants(large), *_told_ranges(reaching)] if changed else []
        left = [LeftAlone(value.name or "", why) for value in scales]
        left += [LeftAlone(value.name or "", _UNKNOWN) for value, found in amax.items() if not np.isfinite(found)]
        return Outcome(f"type {self.float_type}", changed, tuple(left), tuple(changes))

    def _measured(self, model: ir.Model) -> dict[ir.Value, float]:
        """The largest magnitude of each float32 tensor that is computed and read."""
        if self.measure is None or self.float_type != "float16":
            return {}
        values = [value for value in _computed(model.graph) if value.dtype == F32 and value.name and not _scales(value)]
        found = self.measure(model, [value.name or "" for value in values]) if values else {}
        return {value: found[value.name or ""] for value in values}


class _Typing:
    """The typing of one graph, where the nodes `wide` work in float32."""

    def __init__(
        self, graph: ir.Graph, short: ir.DataType, opset: int, wide: Collection[ir.Node], io_types: IoTypes
    ) -> None:
        self.graph = graph
        self.short = short
        self.opset = opset
        self.wide = wide
        self.answered = F32 if io_types == "keep" else short
        self.inserter = Inserter(graph)
        nodes = list(graph)
        self.next_node = dict(zip(nodes, [*nodes[1:], None], strict=True))

    def run(self) -> int:
        """Type everything; return how many values got a type or a copy of another type."""
        floats = [value for value in _computed(self.graph) if value.dtype == F32]
        typed = [value for value in floats if self.type_output(value)]
        constants = [value for value in self.graph.initializers.values() if value.dtype == F32]
        typed += [value for value in constants if self.type_constant(value)]
        casts = sum(self.cast(value) for value in floats)
        return len(typed) + casts + self.drop_casts()

    def type_output(self, value: ir.Value) -> bool:
        """Give what a node makes the short type, unless it stays float32."""
        node = value.producer()
        if node is None and self.answered == F32:
            return False
        if node is None:
            value.type = ir.TensorType(self.short)
            return True
        if self.stays(node, value):
            return False
        if node.op_type == "Cast" and not node.domain:
            node.attributes["to"] = ir.AttrInt64("to", int(self.short))
        elif "output_dtype" in node.attributes and node.op_type == "DequantizeLinear":
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(self.short))
        value.type = ir.TensorType(self.short)  # a new type, since clones of a model share their types
        return True

    def stays(self, node: ir.Node, value: ir.Value) -> bool:
        if node in self.wide:
            return True
        if node.op_type == "Cast" and not node.domain:
            readers = [self.read_type(user, index) for user, index in value.uses()]
            readers += [self.answered] * value.is_graph_output()
            return bool(readers) and set(readers) <= {F32, None}
        return not may_give(node, value.index() or 0, self.short, self.opset)

    def read_type(self, node: ir.Node, index: int) -> ir.DataType | None:
        """The type in which a node reads a float; None where it reads any."""
        if reads_any(node):
            return None
        known = node in self.wide or node.graph is not self.graph or not may_read(node, index, self.short, self.opset)
        return F32 if known else self.short

    def type_constant(self, value: ir.Value) -> bool:
        """Give a constant the short type where it is read so, and leave it float32 where not: two, if both."""
        tensor = value.const_value
        wide = [use for use in value.uses() if self.read_type(*use) == F32]
        if tensor is None or (wide and len(wide) == len(value.uses())):
            return False
        if wide:
            copy = self.inserter.lazy_initializer(f"{value.name}_float32", [value], np.array, F32, array_shape(value))
            for node, index in wide:
                node.replace_input_with(index, copy)
        dtype = self.short.numpy()
        shape = array_shape(value)
        value.const_value = derived_tensor([tensor], lambda array: array.astype(dtype), self.short, shape, value.name)
        value.type = ir.TensorType(self.short)
        self.answer(value)
        return True

    def cast(self, value: ir.Value) -> bool:
        """Cast a value for those that read it in the other type; return whether there are any."""
        other = self.short if value.dtype == F32 else F32
        uses = [use for use in value.uses() if self.read_type(*use) == other]
        if uses:
            cast = self.add_cast(value, other, [node for node, _ in uses])
            for node, index in uses:
                node.replace_input_with(index, cast)
        return self.answer(value) or bool(uses)

    def add_cast(self, value: ir.Value, dtype: ir.DataType, users: Collection[ir.Node]) -> ir.Value:
        """Cast it right where it is made, for the module of the node that works in float32."""
        producer = value.producer()
        beside = next((node for node in (producer, *users) if node in self.wide), None)
        return self.inserter.node(
            "Cast",
            [value],
            dtype=dtype,
            module="" if producer is None or beside is None else beside.metadata_props.get(MODULE_KEY, ""),
            attributes={"to": int(dtype)},
            before=self.graph[0] if producer is None else self.next_node[producer],
            shape=value.shape,
        )

    def answer(self, value: ir.Value) -> bool:
        """Let the graph answer an output in the other type, under its name, where it is to; return whether it is."""
        if not value.is_graph_output() or value.dtype == self.answered or value.is_graph_input():
            return False
        dtype = self.answered
        name, value.name = value.name, f"{value.name}_{value.dtype.name.lower() if value.dtype else 'untyped'}"
        attributes = {"to": int(dtype)}
        cast = self.inserter.node("Cast", [value], dtype=dtype, module="", attributes=attributes, shape=value.shape)
        cast.name = name
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = cast
        return True

    def drop_casts(self) -> int:
        """Remove the casts of the short type to itself; return how many."""
        same = [node for node in self.graph if node.op_type == "Cast" and not node.domain and self.is_same(node)]
        for node in same:
            assert node.inputs[0] is not None
            self.inserter.replace(node, node.inputs[0])
        return len(same)

    def is_same(self, cast: ir.Node) -> bool:
        """Whether a Cast casts the short type to itself, and what it reads can answer for it where the graph does."""
        (x,), (y,) = cast.inputs, cast.outputs
        named = x is None or x.is_graph_input() or x.is_graph_output() or x.is_initializer()
        return x is not None and x.dtype == y.dtype == self.short and not (named and y.is_graph_output())


def _computed(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _scales(value: ir.Value) -> bool:
    """Whether it is nothing but the scale of a quantizer, which has a type of its own."""
    uses = list(value.uses())
    return bool(uses) and all(node.op_type in QDQ and index == 1 for node, index in uses)


def _inexact_scale(node: ir.Node, short: ir.DataType) -> list[ir.Value]:
    scale, _ = trace_back(node.inputs[1])
    if scale is None or scale.const_value is None or scale.dtype != F32:
        return []
    array = array_of(scale)
    with np.errstate(over="ignore"):
        exact = np.array_equal(array.astype(short.numpy()).astype(np.float32), array)
    return [] if exact else [scale]


def _large_constants(graph: ir.Graph, limit: float) -> dict[ir.Value, float]:
    """The float32 constants that hold finite values beyond the range of the type, each with its largest magnitude."""
    largest: dict[ir.Value, float] = {}
    for value in graph.initializers.values():
        scales = all(node.op_type in QDQ for node, _ in value.uses())
        if value.dtype == F32 and value.const_value is not None and not scales:
            largest[value] = _largest(array_of(value))
            release(value.const_value)
    return {value: found for value, found in largest.items() if found > limit}


def _largest(array: npt.NDArray[np.generic]) -> float:
    """The largest magnitude of the finite values, 0 where there are none."""
    return max((_largest_of(part) for part in flat_slices(array)), default=0.0)


def _largest_of(part: npt.NDArray[Any]) -> float:
    largest = float(max(part.max(), -part.min()))
    return largest if np.isfinite(largest) else float(np.abs(part[np.isfinite(part)]).max(initial=0))


def _bounded(graph: ir.Graph, large: Mapping[ir.Value, float], float_type: str) -> Collection[ir.Node]:
    """The nodes that work with constants beyond the type's range."""
    found = behind_constants(graph, large)
    for unbounded in found.values():
        if unbounded is not None:
            raise GpusqError(
                f"constant {unbounded.name!r} holds {large[unbounded]:g}, beyond the range of {float_type}",
                hint="give samples with --data, which show what stays in range, or convert with --precision fp32",
            )
    return found


def _readers(values: Collection[ir.Value]) -> Collection[ir.Node]:
    return {node for value in values for node, _ in value.uses()}


def _mark(reaching: Mapping[ir.Value, float]) -> None:
    """Note on the nodes that make and read these values that they work in float32, and why."""
    for value, amax in reaching.items():
        producer = value.producer()
        for node in (*([] if producer is None else [producer]), *_readers([value])):
            node.metadata_props.setdefault(KEPT_KEY, f"{value.name} reaches {amax:g}")


def _told_integers(nodes: Mapping[ir.Node, ir.Node]) -> Iterator[Change]:
    for origin, count in Counter(nodes.values()).items():
        yield Change(label_of(origin), f"computed from integers: {count} nodes stay float32")


def _told_constants(large: Mapping[ir.Value, float]) -> Iterator[Change]:
    for value, largest in large.items():
        yield Change(value.name or "", f"beyond the range at {largest:g}: what reads it stays float32")


def _told_ranges(reaching: Mapping[ir.Value, float]) -> Iterator[Change]:
    for value, amax in reaching.items():
        yield Change(value.name or "", f"reaches {amax:g} on the samples: what makes and reads it stays float32")
