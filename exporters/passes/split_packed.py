"""Take the packed q, k and v of one projection apart with a Split across the batch, not with Slices.

    [3, batch, heads, tokens, head size] ─► Slice, Squeeze ×3   →   Reshape [3·batch, heads, …] ─► Split in 3

The compiler pulls a Slice along the packed axis back through the GEMM: it then cuts the INT8 weight in three,
dequantizes it and runs the GEMM in FP16 (compiled with TensorRT-RTX 1.7 for sm86, four blocks: 4 of 18 GEMMs lost, 59
kernels instead of 47). It cannot pull back a Split across the batch. What the Attention operator reads is left as it
is: there the slices cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.linears import array_of
from exporters.module_names import MODULE_KEY
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.outcome import Outcome

_PARTS = 3


@dataclass(frozen=True)
class SplitPacked:
    """Replace the slices of every packed tensor that no Attention operator reads."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Replace them."""
        inserter, changed = Inserter(model.graph), 0
        for value in [value for node in model.graph for value in node.outputs]:
            parts = _parts(value)
            if parts:
                _split(value, parts, inserter)
                changed += 1
        if changed:
            drop_unused_initializers(model.graph)
        return Outcome("split packed projections", changed)


def _parts(packed: ir.Value) -> list[tuple[ir.Node, ir.Node]]:
    """The Slice and the Squeeze of q, k and v, in that order; empty if `packed` is read in any other way."""
    shape = packed.shape
    if shape is None or len(shape) != 5 or shape[0] != _PARTS or not all(isinstance(dim, int) for dim in shape[2:]):
        return []
    if packed.is_graph_output() or len(packed.uses()) != _PARTS:
        return []
    found: dict[int, tuple[ir.Node, ir.Node]] = {}
    for cut, _ in packed.uses():
        squeeze = _squeeze_of(cut)
        if squeeze is None or any(user.op_type == "Attention" for user, _ in squeeze.outputs[0].uses()):
            return []
        found[_integer(cut.inputs[1]) or 0] = (cut, squeeze)
    return [found[index] for index in range(_PARTS)] if found.keys() == set(range(_PARTS)) else []


def _squeeze_of(cut: ir.Node) -> ir.Node | None:
    """The Squeeze behind a Slice [index] along axis 0."""
    if cut.op_type != "Slice" or len(cut.inputs) != 4 or len(cut.outputs[0].uses()) != 1:
        return None
    start, end, axis = (_integer(value) for value in cut.inputs[1:])
    ((squeeze, _),) = cut.outputs[0].uses()
    if start is None or end != start + 1 or axis != 0 or squeeze.op_type != "Squeeze":
        return None
    return squeeze if len(squeeze.inputs) == 2 and _integer(squeeze.inputs[1]) == 0 else None


def _integer(value: ir.Value | None) -> int | None:
    if value is None or value.const_value is None or array_of(value).size != 1:
        return None
    return int(array_of(value).item())


def _split(packed: ir.Value, parts: list[tuple[ir.Node, ir.Node]], inserter: Inserter) -> None:
    squeezes = [squeeze for _, squeeze in parts]
    order = {node: index for index, node in enumerate(inserter.graph)}
    before = min((cut for cut, _ in parts), key=order.__getitem__)
    module = before.metadata_props.get(MODULE_KEY, "")
    assert packed.dtype is not None
    assert packed.shape is not None
    dims = [-1, *(int(dim) for dim in packed.shape[2:])]  # type: ignore[arg-type]
    shape = inserter.initializer(f"{module}.flat", np.asarray(dims, np.int64))
    flat = inserter.node(
        "Reshape",
        [packed, shape],
        dtype=packed.dtype,
        module=module,
        before=before,
        shape=ir.Shape([None, *packed.shape[2:]]),
    )
    outputs = inserter.nodes(
        "Split",
        [flat],
        dtype=packed.dtype,
        module=module,
        attributes={"axis": 0, "num_outputs": _PARTS},
        before=before,
        outputs=_PARTS,
    )
    for squeeze, output in zip(squeezes, outputs, strict=True):
        output.shape = squeeze.outputs[0].shape
        inserter.replace(squeeze, output)
    for cut, _ in parts:
        inserter.graph.remove(cut, safe=True)
