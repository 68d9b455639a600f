"""Write the structured sparsity of each layer with a constant weight into its node's metadata.

    gpusq.sparsity           2:4 | 4:8 | dense
    gpusq.sparsity.axis      the axis of the stored weight along which the groups run
    gpusq.sparsity.eligible  true | false: by the rules of the target's sparse kernels
    gpusq.sparsity.reason    why not, or what is still asked

Sparse initializers are not used: TensorRT's parser refuses them and finds the zeros in dense ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from exporters.linears import find_linears, find_untraced
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.sparsity import sparsity_of
from profiles.device import SparseKernels

KEY = "gpusq.sparsity"


@dataclass(frozen=True)
class AnnotateSparsity:
    """Annotate by the sparse kernels' rules of the target; None where it has no such kernels."""

    rules: SparseKernels | None

    def __call__(self, model: ir.Model) -> Outcome:
        """Annotate every such layer; the dense ones and those whose K is not known are reported as left alone."""
        changed, left = 0, []
        for linear in find_linears(model.graph):
            found = sparsity_of(linear, self.rules)
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
        left += [LeftAlone(layer.module, layer.why) for layer in find_untraced(model.graph)]
        return Outcome("annotate sparsity", changed, tuple(left))
