"""The named placements: which quantizers a graph gets that has none yet."""

from __future__ import annotations

from typing import Literal, get_args

Placement = Literal["as-trained", "fp16", "w8a8-linear", "w8a8-mha", "sparse-int8", "w4"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
KEPT_FLOAT = "gpusq.precision"  # in a node's metadata: no placement quantizes its module, and why


def places(placement: Placement) -> bool:
    """Whether the placement adds quantizers; the others leave the graph to what training decided."""
    return placement not in ("as-trained", "fp16")


def measures(placement: Placement) -> bool:
    """Whether it quantizes activations, whose ranges have to be measured on samples."""
    return places(placement) and placement != "w4"
