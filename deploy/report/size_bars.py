"""Bars: the bytes of the weights, and how many layers are left at each step to a sparse kernel."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.manifest import Engine, Layer, Sizes
from deploy.report import formats
from deploy.report.document import Figure
from deploy.report.drawing.bars import Bar, bars


def sizes(computed: Sizes) -> Figure:
    """Two bars for the 2:4 layers, two for the whole model."""
    figures = [("every parameter", computed.total_fp32, computed.total_compressed)]
    if computed.pruned_fp32:
        figures.insert(0, ("2:4 layers", computed.pruned_fp32, computed.pruned_compressed))
    rows = [
        Bar(f"{what}, {form}", number, formats.size(number), series)
        for what, fp32, compressed in figures
        for series, (form, number) in enumerate((("stored", compressed), ("FP32", fp32)))
    ]
    alternative = "Bytes of the weights: " + "; ".join(f"{row.name} {row.figure}" for row in rows) + "."
    return Figure("sizes", bars(rows, alternative), alternative, "computed")


def funnel(layers: Sequence[Layer], engines: Sequence[Engine]) -> Figure:
    """From all layers with a weight to those that run on a sparse kernel."""
    chosen = [engine.sparse_chosen for engine in engines if engine.sparse_chosen is not None]
    steps = [
        ("with a weight", len(layers)),
        ("2:4", sum(layer.sparsity.pattern != "dense" for layer in layers)),
        ("eligible", sum(layer.sparsity.eligible for layer in layers)),
    ]
    rows = [Bar(name, number, str(number)) for name, number in steps]
    rows.append(Bar("chosen", chosen[-1], str(chosen[-1])) if chosen else Bar("chosen", 0, "not known", hollow=True))
    words = ", ".join(f"{row.name} {row.figure}" for row in rows)
    return Figure("funnel", bars(rows, f"Layers: {words}."), f"Layers: {words}.", "computed")
