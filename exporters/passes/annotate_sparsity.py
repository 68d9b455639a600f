"""Write the 2:4 state of each linear layer into its node's metadata.

    gpusq.sparsity = 2:4 | dense · gpusq.sparsity.axis · gpusq.sparsity.eligible = true | false · gpusq.sparsity.reason

Sparse initializers are not used: TensorRT's parser refuses them and finds the zeros in dense ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from exporters.linears import find_linears
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.sparsity import sparsity_of
from profiles.device import SparseKernels

KEY = "gpusq.sparsity"


@dataclass(frozen=True)
class AnnotateSparsity:
    """Annotate by the sparse kernels' rules of the target; None where it has no such kernels."""

    rules: SparseKernels | None

    def __call__(self, model: ir.Model) -> Outcome:
        """Annotate every linear layer; the dense ones are reported as left alone."""
        changed, left = 0, []
        for linear in find_linears(model.graph):
            found = sparsity_of(linear.values, linear.k_axis, self.rules, int8_output=linear.int8_output)
            props = {KEY: found.pattern, f"{KEY}.axis": str(found.axis), f"{KEY}.eligible": str(found.eligible).lower()}
            if found.reason:
                props[f"{KEY}.reason"] = found.reason
            current = {key: value for key, value in linear.node.metadata_props.items() if key.startswith(KEY)}
            if current != props:
                for key in current:
                    del linear.node.metadata_props[key]
                linear.node.metadata_props.update(props)
                changed += 1
            if found.pattern == "dense":
                left.append(LeftAlone(linear.module, found.reason))
        return Outcome("annotate sparsity", changed, tuple(left))
