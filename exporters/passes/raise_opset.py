"""Raise a graph to a newer opset, so that operators which came with it can be used.

    ReduceMean(x), axes=[−1], opset 14   →   ReduceMean(x, axes), opset 20

onnx's own version converter does it. It knows no control flow and no metadata, and it copies what it is given: a graph
with subgraphs is left as it is, modules, types and shapes are put back by name, and weights wait outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from exporters.module_names import MODULE_KEY
from exporters.passes.outcome import LeftAlone, Outcome

_LARGE = 1024  # bytes


@dataclass(frozen=True)
class RaiseOpset:
    """Raise the default domain to `opset`; a graph that is that new already stays as it is."""

    opset: int

    def __call__(self, model: ir.Model) -> Outcome:
        """Raise it; where that is not possible, it is left alone with the reason."""
        before = model.opset_imports.get("") or self.opset
        if before >= self.opset:
            return Outcome("raise opset", 0)
        raised = _raised(model, self.opset)
        if isinstance(raised, str):
            return Outcome("raise opset", 0, (LeftAlone(f"opset {before}", raised),))
        _put_back(raised, model.graph)
        model.graph = raised
        return Outcome("raise opset", 1)


def _raised(model: ir.Model, opset: int) -> ir.Graph | str:
    """The graph at `opset`, its large constants still inputs; or the reason why there is none."""
    import onnx.version_converter

    if any(True for _ in model.graph.subgraphs()) or model.functions:
        return "it has control flow or local functions, which onnx's converter does not know"
    light = model.clone()
    for name, value in list(light.graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > _LARGE:
            del light.graph.initializers[name]
            light.graph.inputs.append(value)
            value.const_value = None
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(light), opset)
    except (RuntimeError, ValueError, IndexError) as error:
        return f"onnx's converter cannot raise it: {' '.join(str(error).split())}"
    raised = ir.from_proto(proto)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(raised)
    return raised.graph


def _put_back(graph: ir.Graph, old: ir.Graph) -> None:
    """Give `graph` what the converter dropped: constants, modules, metadata, and what is known about values."""
    for value in [value for value in graph.inputs if value.name in old.initializers]:
        graph.inputs.remove(value)
        value.const_value = old.initializers[value.name or ""].const_value
        graph.register_initializer(value)
    values = {value.name: value for node in old for value in node.outputs}
    values |= {value.name: value for value in (*old.inputs, *old.outputs, *old.initializers.values())}
    modules = {node.name: node.metadata_props for node in old}
    for number, node in enumerate(graph):
        if node.name in modules:
            node.metadata_props.update(modules[node.name])
        else:
            _name_new(node, number)
        for value in node.outputs:
            _describe(value, values)
    for value in graph.inputs:
        _describe(value, values)
    graph.name = old.name
    graph.metadata_props.update(old.metadata_props)


def _name_new(node: ir.Node, number: int) -> None:
    """Name a node that the converter inserted after its reader's module."""
    readers = [reader for value in node.outputs for reader, _ in value.uses()]
    module = next((reader.metadata_props.get(MODULE_KEY, "") for reader in readers), "")
    node.name = f"{module}/{node.op_type}_{number}"
    if module:
        node.metadata_props[MODULE_KEY] = module


def _describe(value: ir.Value, known: dict[str | None, ir.Value]) -> None:
    if (old := known.get(value.name)) is not None:
        value.type, value.shape = old.type, old.shape
        value.metadata_props.update(old.metadata_props)
