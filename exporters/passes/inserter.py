"""New nodes and initializers, named after the module they belong to and unique in their graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.derived_tensor import derived_tensor
from exporters.module_names import MODULE_KEY

Attributes = Mapping[str, int | float | str | Sequence[int]]


class Inserter:
    """Adds to one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._taken = {node.name for node in graph} | set(graph.initializers) | {value.name for value in graph.inputs}
        self._taken |= {value.name for node in graph for value in node.outputs}

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        *,
        dtype: ir.DataType,
        module: str,
        attributes: Attributes | None = None,
        before: ir.Node | None = None,
        shape: ir.Shape | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Insert a node with one output ahead of `before`, or at the end, and return that output."""
        (output,) = self.nodes(
            op_type, inputs, dtype=dtype, module=module, attributes=attributes, before=before, outputs=1, domain=domain
        )
        output.shape = shape
        return output

    def nodes(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        *,
        dtype: ir.DataType,
        module: str,
        attributes: Attributes | None,
        before: ir.Node | None,
        outputs: int,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """Insert a node with several outputs of one type, and return them."""
        node = ir.node(op_type, list(inputs), attributes=dict(attributes or {}), num_outputs=outputs, domain=domain)
        node.name = self._unique(f"{module}/{op_type}" if module else op_type)
        if module:
            node.metadata_props[MODULE_KEY] = module
        for index, output in enumerate(node.outputs):
            output.name = self._unique(f"{node.name}:{index}")
            output.type = ir.TensorType(dtype)
        if before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(before, node)
        return node.outputs

    def initializer(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """Register a constant; one that has this name and these very bytes already is used again."""
        existing = self.graph.initializers.get(name)
        if existing is not None and existing.const_value is not None:
            held = existing.const_value.numpy()
            if held.dtype == array.dtype and held.shape == array.shape and held.tobytes() == array.tobytes():
                return existing
        tensor = ir.tensor(array, name=self._unique(name))
        value = ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape(array.shape))
        value.type = ir.TensorType(tensor.dtype)
        self.graph.register_initializer(value)
        return value

    def lazy_initializer(
        self,
        name: str,
        sources: Sequence[ir.Value],
        compute: Callable[..., npt.NDArray[Any]],
        dtype: ir.DataType,
        shape: Sequence[int],
    ) -> ir.Value:
        """Register a constant that `compute` makes of the constants `sources` each time it is read, and never held."""
        unique = self._unique(name)
        tensors = [source.const_value for source in sources if source.const_value is not None]
        tensor = derived_tensor(tensors, compute, dtype, shape, unique)
        value = ir.Value(name=unique, const_value=tensor, shape=ir.Shape(shape))
        value.type = ir.TensorType(dtype)
        self.graph.register_initializer(value)
        return value

    def replace(self, node: ir.Node, new: ir.Value) -> None:
        """Let `new` take the place of the only output of `node`, its name included, and remove the node."""
        old = node.outputs[0]
        if old.is_graph_output():
            name = old.name
            for index, value in enumerate(self.graph.outputs):
                if value is old:
                    self.graph.outputs[index] = new
            old.name, new.name = None, name
        ir.convenience.replace_all_uses_with(old, new)
        self.graph.remove(node, safe=True)

    def _unique(self, base: str) -> str:
        name, count = base, 1
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name


def drop_unused_initializers(graph: ir.Graph) -> None:
    """Remove the constants that nothing reads any more."""
    for name in [
        name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()
    ]:
        del graph.initializers[name]
