"""What a rule is, what it looks at, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import onnx_ir as ir

from exporters.linears import Linear, find_linears
from exporters.module_names import MODULE_KEY
from profiles.device import Device

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Subject:
    """The model that is judged, and the device that it is for, where that is known."""

    model: ir.Model
    device: Device | None = None

    def graphs(self) -> Iterator[ir.Graph]:
        """The graph and the bodies of its If, Loop and Scan nodes."""
        yield from self.model.graphs()

    def nodes(self) -> Iterator[ir.Node]:
        """Every node, those of subgraphs included."""
        for graph in self.graphs():
            yield from graph

    @cached_property
    def constants(self) -> frozenset[ir.Value]:
        """What the compiler can compute before it sees an input: constants, and nodes that read nothing else."""
        known: set[ir.Value] = set()
        for graph in self.graphs():
            known.update(graph.initializers.values())
            for node in graph:
                if node.op_type == "Constant" or (node.inputs and all(v is None or v in known for v in node.inputs)):
                    known.update(node.outputs)
        return frozenset(known)

    def linears(self) -> Iterator[Linear]:
        """Every layer with a constant weight."""
        for graph in self.graphs():
            yield from find_linears(graph)


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        id: how users and tools call it; never given to another rule.
        sentence: what must hold, and what happens where it does not.
        cure: how to mend it.
        broken_by: yields each node or value that breaks it.
        severity: `error` where the compiler refuses or computes something else, `warning` where that may be meant.
        onnx: whether ONNX itself says so; any other rule is TensorRT's.
    """

    id: str
    sentence: str
    cure: str
    broken_by: Callable[[Subject], Iterator[ir.Node | ir.Value]]
    severity: Severity = "error"
    onnx: bool = False


@dataclass(frozen=True)
class Finding:
    """A node or value that breaks a rule.

    Attributes:
        rule: the rule.
        where: the name of the node or value; what a node computes where it has no name.
        module: the module that the node belongs to, "" where that is not known.
    """

    rule: Rule
    where: str
    module: str = ""

    def __str__(self) -> str:
        return f"{self.rule.id} {self.where}: {self.rule.sentence}"


def found(rule: Rule, place: ir.Node | ir.Value) -> Finding:
    """The finding that `place` breaks `rule`."""
    if isinstance(place, ir.Value):
        return Finding(rule, place.name or "")
    return Finding(rule, place.name or place.op_type, place.metadata_props.get(MODULE_KEY, ""))
