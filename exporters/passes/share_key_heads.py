"""Let query heads share key and value heads, instead of repeating those for them (grouped queries, arXiv 2305.13245).

    k [B, 3, M, d] ─► Unsqueeze ─► Expand [B, 3, 3, M, d] ─► Reshape [B, 9, M, d] ─┐
    q [B, 9, N, d] ────────────────────────────────────────────────────────────────┴► Attention
                                                                →    Attention(q [B, 9, N, d], k [B, 3, M, d], …)

Attention gives query head h the key head h // 3, which is the one that was repeated for it. The repeated keys and
values of a cache were written and read again in each step: those of SmolLM2-135M at 1024 tokens are 94 of 429 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.known_sizes import KnownSizes, Size
from exporters.module_names import label_of
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.passes.products import made_by
from exporters.passes.put_in_place import drop_unused
from exporters.qdq_scales import constant_of, input_at


@dataclass(frozen=True)
class ShareKeyHeads:
    """Share them in every Attention node with 4-D inputs."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Share them; an attention whose keys and values are repeated in different ways is left alone."""
        changed, left = 0, []
        for node in [node for node in model.graph if node.op_type == "Attention" and not node.domain]:
            key, value = (_repeated(input_at(node, index)) for index in (1, 2))
            if key is None and value is None:
                continue
            if key is None or value is None or _heads(key) != _heads(value):
                why = "its keys and values are repeated in different ways"
                left.append(LeftAlone(label_of(node), why))
                continue
            node.replace_input_with(1, key)
            node.replace_input_with(2, value)
            changed += 1
        if changed:
            drop_unused(model)
        return Outcome("share key heads", changed, tuple(left))


def _heads(value: ir.Value) -> int | ir.SymbolicDim | None:
    return None if value.shape is None else value.shape[1]


def _repeated(value: ir.Value | None) -> ir.Value | None:
    """The x [B, H, M, d] whose heads are repeated in `value` [B, H · G, M, d], each G times in a row."""
    reshape = made_by(value, "Reshape")
    expand = None if reshape is None else made_by(reshape.inputs[0], "Expand")
    unsqueeze = None if expand is None else made_by(expand.inputs[0], "Unsqueeze")
    x = None if unsqueeze is None else unsqueeze.inputs[0]
    if x is None or expand is None:
        return None
    known = KnownSizes()
    made, wide, narrow, with_axis = (known.dims(each) for each in (value, expand.outputs[0], x, expand.inputs[0]))
    if made is None or wide is None or narrow is None or with_axis != [*narrow[:2], 1, *narrow[2:]]:
        return None
    if len(made) != 4 or not _repeats_third(constant_of(expand.inputs[1]), with_axis) or not _joins(wide, made):
        return None
    return x


def _repeats_third(target: npt.NDArray[np.generic] | None, dims: Sequence[Size]) -> bool:
    """Whether an Expand to `target` repeats a tensor of `dims` along its third axis and no other."""
    if target is None or len(dims) != 5 or len(target) != 5:
        return False
    return all(axis == 2 or size in (1, dims[axis]) for axis, size in enumerate(target.tolist()))


def _joins(wide: Sequence[Size], made: Sequence[Size]) -> bool:
    """Whether [B, H, G, M, d] becomes [B, H · G, M, d]."""
    heads, groups = wide[1:3]
    if not isinstance(heads, int) or not isinstance(groups, int):
        return False
    return made[1] == heads * groups and made[3] == wide[4] and (made[0] == wide[0] or made[2] == wide[3])
