"""Declare an opset that the target's parser takes, after checking that it has every operator as it is used here.

Nothing is rewritten: an operator fits if the target opset has it and knows each attribute and input that the node uses.
What a newer version of an operator added, types and attributes with defaults, a graph that does not use it does not
miss.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from exporters.passes.outcome import Outcome
from profiles.errors import GpusqError

# The IR version that came with each opset (onnx/docs/Versioning.md).
_IR_VERSION = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10}


@dataclass(frozen=True)
class SetOpset:
    """Lower the default domain's opset to `opset`; a parser takes older ones as well."""

    opset: int

    def __call__(self, model: ir.Model) -> Outcome:
        """Set it.

        Raises:
            GpusqError: an operator, an attribute or an input does not exist at that opset.
        """
        before = model.opset_imports.get("", 0)
        if before <= self.opset:
            return Outcome("set opset", 0)
        for node in model.graph:
            if not node.domain:
                self._check(node)
        model.opset_imports[""] = self.opset
        model.ir_version = _IR_VERSION.get(self.opset, model.ir_version)
        return Outcome("set opset", 1)

    def _check(self, node: ir.Node) -> None:
        hint = f"the target's parser takes opset {self.opset}; choose a profile with a newer runtime"
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        except onnx.defs.SchemaError:
            raise GpusqError(f"{node.name}: opset {self.opset} has no operator {node.op_type}", hint=hint) from None
        if unknown := [name for name in node.attributes if name not in schema.attributes]:
            raise GpusqError(
                f"{node.name}: {node.op_type} has no attribute {unknown[0]!r} at opset {self.opset}", hint=hint
            )
        if len(node.inputs) > schema.max_input:
            raise GpusqError(
                f"{node.name}: {node.op_type} has {len(node.inputs)} inputs, at opset {self.opset} at most "
                f"{schema.max_input}",
                hint=hint,
            )
