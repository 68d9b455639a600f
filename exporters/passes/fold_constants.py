"""Compute what does not depend on the inputs, once and for all, and infer types and shapes on the way.

    Shape(w) ─► Gather ─► Concat ─► x ─► Reshape          Reshape(x, [−1, 197, 384])
    Constant ─► Pad ─► Slice ─► …  ─► shift mask     →    shift mask, a constant [64, 49, 49]

onnxscript's folder does it, for constants of at most `limit` elements: greater ones are weights, which are not read.
Q/DQ of constants stay (`fold_quantized.py` has the rules for them), and so do the subgraphs of control flow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from exporters.module_names import MODULE_KEY
from exporters.passes.outcome import Outcome
from exporters.passes.put_in_place import drop_unused
from profiles.errors import GpusqError

_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_FOLDER_METADATA = "pkg.onnxscript."


@dataclass(frozen=True)
class FoldConstants:
    """Fold constants of at most `limit` elements into constants of at most `limit` elements."""

    limit: int = 2**20

    def __call__(self, model: ir.Model) -> Outcome:
        """Fold them; counted are the nodes that are gone."""
        graph = model.graph
        before = list(graph)
        origins = {value.name: _Origin.of(node) for node in graph.all_nodes() for value in node.outputs}
        while self._fold(model):
            pass
        _restore(graph, origins)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        drop_unused(model)
        return Outcome("fold constants", sum(node.graph is not graph for node in before))

    def _fold(self, model: ir.Model) -> bool:
        """Fold once and tell whether nodes were removed, which may make others constant."""
        try:
            from onnxscript.optimizer import fold_constants
        except ImportError:
            raise GpusqError("onnxscript is not installed", hint="pip install 'gpusq[onnx]'") from None

        before = set(model.graph)
        fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=self.limit,
            output_size_limit=self.limit,
            should_fold=self._should_fold,
        )
        return bool(before - set(model.graph))

    def _should_fold(self, node: ir.Node) -> bool | None:
        """False for what onnxscript would fold although it is large or quantized; None leaves the choice to it."""
        large = any(_size(value) > self.limit for value in node.inputs)
        return False if large or node.op_type in _QUANTIZERS else None


@dataclass(frozen=True)
class _Origin:
    """What a node is called and where it belongs."""

    name: str | None
    module: str | None

    @staticmethod
    def of(node: ir.Node) -> _Origin:
        return _Origin(node.name, node.metadata_props.get(MODULE_KEY))


def _size(value: ir.Value | None) -> int:
    tensor = None if value is None else value.const_value
    return 0 if tensor is None else tensor.size


def _restore(graph: ir.Graph, origins: dict[str | None, _Origin]) -> None:
    """Give nodes that were put in another's place its name and module, and remove the folder's own metadata."""
    for node in graph.all_nodes():
        origin = origins.get(node.outputs[0].name) if node.outputs else None
        if origin is not None and node.name is None:
            node.name = origin.name
            if origin.module:
                node.metadata_props[MODULE_KEY] = origin.module
        _clean([node, *node.outputs])
    for part in (graph, *graph.subgraphs()):
        _clean(part.initializers.values())


def _clean(items: Iterable[Any]) -> None:
    for item in items:
        for key in [key for key in item.metadata_props if key.startswith(_FOLDER_METADATA)]:
            del item.metadata_props[key]
