"""Prune the few groups that keep a layer from being 2:4, or 4:8 where its weight has 4 bits.

    5 -1 0 0 │ 3 2 -4 0 │ 0 0 0 7     →     5 -1 0 0 │ 3 0 -4 0 │ 0 0 0 7          along K

A group with more than two values keeps its two largest magnitudes, of a quantized weight by its integers; the other
groups stay as they are, and so do scales. What this costs is ‖W − W'‖ / ‖W‖, W being the dequantized weight; whether
the network bears it is for a test on data to tell.

Left alone are layers that break more than `max_share` of their groups, for they were not trained to be sparse, and
weights whose values something else reads as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.linears import WEIGHT_PATH, Linear, find_linears, find_untraced, scale_of
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.qdq_scales import spread
from exporters.sparsity import Sparsity, kernel_type, pattern_of, sparsity_of
from exporters.zero_pattern import prune
from profiles.errors import GpusqError

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Repair:
    """What was done to one layer.

    Attributes:
        where: the layer.
        groups: groups that were pruned.
        share: their share of all groups.
        weights: values that became zero.
        relative_error: ‖W − W'‖ / ‖W‖ of the dequantized weight, in the Frobenius norm.
    """

    where: str
    groups: int
    share: float
    weights: int
    relative_error: float

    def __str__(self) -> str:
        return (
            f"groups pruned: {self.groups} ({100 * self.share:.2g} %), weights set to zero: {self.weights}, "
            f"relative error: {self.relative_error:.2g}"
        )


@dataclass(frozen=True)
class Repaired(Outcome):
    """An outcome that tells of each repaired layer."""

    repairs: tuple[Repair, ...] = ()


@dataclass(frozen=True)
class RepairSparsity:
    """Repair the layers that break at most `max_share` of their groups.

    Raises:
        GpusqError: `max_share` is no share.
    """

    max_share: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.max_share <= 1:
            raise GpusqError(f"a share of groups lies between 0 and 1, not at {self.max_share:g}", hint="try 0.05")

    def __call__(self, model: ir.Model) -> Repaired:
        """Repair them; the other dense ones are reported as left alone."""
        linears = list(find_linears(model.graph))
        repairs: list[Repair] = []
        left = [LeftAlone(layer.module, layer.why) for layer in find_untraced(model.graph)]
        for linear in linears:
            found = sparsity_of(linear, None)
            if found.pattern != "dense":
                continue
            if reason := self._why_not(linear, found, linears):
                left.append(LeftAlone(linear.module, reason))
            else:
                repairs.append(_repair(linear, found))
        changes = tuple(Change(repair.where, str(repair)) for repair in repairs)
        return Repaired("repair sparsity", len(repairs), tuple(left), changes, tuple(repairs))

    def _why_not(self, linear: Linear, found: Sparsity, linears: Iterable[Linear]) -> str:
        if not found.broken_groups:
            return found.reason
        if found.broken_share > self.max_share:
            return f"{found.reason}: more than {100 * self.max_share:g} %"
        layers = {other.node for other in linears if other.weight is linear.weight}
        if reader := _other_reader(linear.weight, layers):
            return f"{reader} reads its weight as well"
        return "" if np.isfinite(linear.values.astype(np.float32)).all() else "its weight holds NaN or infinity"


def _repair(linear: Linear, found: Sparsity) -> Repair:
    tensor = linear.weight.const_value
    assert tensor is not None
    before = linear.values
    after = prune(before, linear.k_axis, pattern_of(kernel_type(linear)))
    linear.weight.const_value = ir.tensor(after, dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)
    zeroed = np.not_equal(before, after)
    return Repair(
        where=linear.module,
        groups=found.broken_groups,
        share=found.broken_share,
        weights=int(np.count_nonzero(zeroed)),
        relative_error=_relative_error(_dequantized(linear, before), zeroed),
    )


def _relative_error(weight: npt.NDArray[np.float32], zeroed: npt.NDArray[np.bool_]) -> float:
    """‖W − W'‖ / ‖W‖ where W' is W with some of its values zeroed."""
    squares = np.square(weight / np.abs(weight).max())  # so scaled that no square leaves float32's range at the top
    return float(np.sqrt(squares[zeroed].sum(dtype=np.float64) / squares.sum(dtype=np.float64)))


def _dequantized(linear: Linear, values: Array) -> npt.NDArray[np.float32]:
    """The real weight; its integers where a node between them and the DQ makes the scale's place unknown."""
    dq = linear.weight_dq
    scale = None if dq is None or dq.inputs[0] is not linear.weight else scale_of(dq)
    real = values.astype(np.float32)
    return real if scale is None or dq is None else real * spread(scale, dq, values.shape).astype(np.float32)


def _other_reader(value: ir.Value, layers: set[ir.Node]) -> str:
    """What reads `value` or what is made of it, other than `layers`; "" where nothing does."""
    if value.is_graph_output():
        return "an output of the graph"
    for node, _ in value.uses():
        if node in layers:
            continue
        if node.op_type not in WEIGHT_PATH:
            return node.op_type
        if reader := _other_reader(node.outputs[0], layers):
            return reader
    return ""
