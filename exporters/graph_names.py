"""Names tie a graph together: each is defined once, each that is read is defined, and before the node that reads it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from heapq import heapify, heappop, heappush
from pathlib import Path

import onnx

from exporters.onnx_proto import label, subgraphs
from profiles.errors import GpusqError

_EXPORT_AGAIN = "the file is damaged or was edited: export the model again"


def check_names(path: Path, proto: onnx.ModelProto) -> None:
    """Raise GpusqError for the first undefined or doubly defined name, or for a cycle, in the model at `path`."""
    _check_graph(path, proto.graph, frozenset())
    for function in proto.functions:
        _check_nodes(path, function.node, function.input, function.output, frozenset())


def sort_nodes(proto: onnx.ModelProto) -> None:
    """Order the nodes of an acyclic model by what they read, in place and stable; subgraphs and functions too."""
    for owner in (proto.graph, *proto.functions):
        _sort(owner)


def _sort(owner: onnx.GraphProto | onnx.FunctionProto) -> None:
    for node in owner.node:
        for subgraph in subgraphs(node):
            _sort(subgraph)
    order = _order(owner.node)
    if order != sorted(order):
        nodes = [onnx.NodeProto.FromString(owner.node[index].SerializeToString()) for index in order]
        del owner.node[:]
        owner.node.extend(nodes)


def _check_graph(path: Path, graph: onnx.GraphProto, outer: Collection[str]) -> None:
    inputs = [value.name for value in graph.input]
    initializers = [tensor.name for tensor in graph.initializer]
    _check_once(path, "input", inputs)
    _check_once(path, "initializer", initializers)
    outputs = [value.name for value in graph.output]
    _check_once(path, "output", outputs)
    if not outputs:
        raise GpusqError(f"{path}: graph {graph.name!r} has no output", hint=_EXPORT_AGAIN)
    _check_nodes(path, graph.node, {*inputs, *initializers}, outputs, outer)


def _check_once(path: Path, kind: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            what = f"{kind} {name!r} is defined twice" if name else f"an {kind} has no name"
            raise GpusqError(f"{path}: {what}", hint=_EXPORT_AGAIN)
        seen.add(name)


def _check_nodes(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    given: Collection[str],
    outputs: Sequence[str],
    outer: Collection[str],
) -> None:
    producer: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in filter(None, node.output):
            if name in given or name in producer:
                raise GpusqError(f"{path}: {label(node)} defines {name!r} a second time", hint=_EXPORT_AGAIN)
            producer[name] = index
    known = {*given, *producer, *outer}
    for node in nodes:
        for name in filter(None, node.input):
            if name not in known:
                raise GpusqError(f"{path}: {label(node)} reads {name!r}, which nothing defines", hint=_EXPORT_AGAIN)
        for subgraph in subgraphs(node):
            _check_graph(path, subgraph, known)
    if undefined := [name for name in outputs if name not in known]:
        raise GpusqError(f"{path}: nothing computes the output {undefined[0]!r}", hint=_EXPORT_AGAIN)
    _check_acyclic(path, nodes, producer)


def _check_acyclic(path: Path, nodes: Sequence[onnx.NodeProto], producer: Mapping[str, int]) -> None:
    try:
        TopologicalSorter(_predecessors(nodes, producer)).prepare()
    except CycleError as error:
        loop = " → ".join(label(nodes[index]) for index in error.args[1][:4])
        raise GpusqError(f"{path}: the graph has a cycle: {loop}", hint=_EXPORT_AGAIN) from None


def _order(nodes: Sequence[onnx.NodeProto]) -> list[int]:
    """The indices of `nodes` so that each stands behind what it reads; of those that may come next, the first does."""
    producer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    sorter = TopologicalSorter(_predecessors(nodes, producer))
    sorter.prepare()
    ready, order = list(sorter.get_ready()), []
    heapify(ready)
    while ready:
        order.append(heappop(ready))
        sorter.done(order[-1])
        for index in sorter.get_ready():
            heappush(ready, index)
    return order


def _predecessors(nodes: Sequence[onnx.NodeProto], producer: Mapping[str, int]) -> dict[int, set[int]]:
    return {index: {producer[name] for name in _reads(node) if name in producer} for index, node in enumerate(nodes)}


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that the node and its subgraphs read."""
    yield from node.input
    for subgraph in subgraphs(node):
        yield from (value.name for value in subgraph.output)
        for inner in subgraph.node:
            yield from _reads(inner)
