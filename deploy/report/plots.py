"""The plots as Vega-Lite specifications, and what each says in words.

Colours are CSS variables, so that one drawing is readable in light, dark and print.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.manifest import Kernel, Manifest, Measurement, Plan, Sizes, Timing
from deploy.report import formats
from deploy.report.samples import Samples

Spec = dict[str, Any]

MAX_STEPS = 400
ROW = 24  # tiles side by side, before a block takes another row
LETTERS = {"gemm": "G", "fused-gemm": "F", "attention": "A", "pointwise": "P", "convolution": "C"}
GEMMS = ("gemm", "fused-gemm", "convolution")
WIDTHS = ("int4", "fp4", "int8", "fp8", "float8", "float16", "bfloat16", "float32")
COLOURS = {
    "int4": "int4",
    "int8": "int8",
    "fp8": "fp8",
    "float16": "float16",
    "bfloat16": "float16",
    "float32": "float32",
}


@dataclass(frozen=True)
class Plot:
    """A drawing and its text alternative."""

    spec: Spec
    alternative: str


def plots(manifest: Manifest, samples: Samples | None) -> dict[str, Plot]:
    """Return the plots by name: `latency`, `plan` and `sizes`, each only where there is something to draw."""
    drawn: dict[str, Plot] = {}
    if manifest.measured and samples:
        drawn["latency"] = latency(manifest.measured, samples)
    if manifest.plan and manifest.plan.kernels:
        drawn["plan"] = plan(manifest.plan)
    if manifest.sizes.total_fp32:
        drawn["sizes"] = sizes(manifest.sizes)
    return drawn


def latency(measured: Measurement, samples: Samples) -> Plot:
    """The share of runs that took at most so many milliseconds, for each model."""
    timings = {"student": measured.student}
    if measured.baseline and samples.baseline:
        timings["baseline"] = measured.baseline
    taken = {model: sorted(getattr(samples, model)) for model in timings}
    end = min(max(max(values) for values in taken.values()), 1.2 * max(t.p99_ms.value for t in timings.values()))
    cut = sum(len(values) - bisect_right(values, end) for values in taken.values())
    start = min(values[0] for values in taken.values())
    x = {
        "field": "ms",
        "type": "quantitative",
        "title": "latency, ms",
        "scale": {"domain": [start, end], "zero": False, "nice": False},
        "axis": {"tickCount": {"expr": "width / 110"}},
    }
    y = {"field": "share", "type": "quantitative", "title": "share of runs", "axis": {"format": ".0%"}}
    scale = {"domain": list(timings), "range": [f"var(--{model})" for model in timings]}
    colour = {"field": "model", "type": "nominal", "title": None, "scale": scale}
    line = {
        "data": {"values": [step for model, values in taken.items() for step in _steps(model, values)]},
        "mark": {"type": "line", "interpolate": "step-after", "clip": True, "strokeWidth": 2},
        "encoding": {
            "strokeDash": {"condition": {"test": "datum.model == 'baseline'", "value": [5, 3]}, "value": [1, 0]},
        },
    }
    point = {
        "data": {"values": [mark for model, timing in timings.items() for mark in _quantiles(model, timing)]},
        "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1, "clip": True},
        "encoding": {
            "shape": {
                "field": "quantile",
                "type": "nominal",
                "title": None,
                "legend": {"symbolFillColor": "var(--muted)", "symbolStrokeWidth": 0},
            },
            "tooltip": [_tip("model"), _tip("quantile"), _tip("latency")],
        },
    }
    words = "; ".join(
        f"{model} p50 {formats.milliseconds(t.p50_ms.value)}, p99 {formats.milliseconds(t.p99_ms.value)}"
        for model, t in timings.items()
    )
    alternative = f"Share of runs by latency, measured on {measured.device}: {words}."
    if cut:
        alternative += f" Not drawn: {formats.count(cut)} of the samples, slower than {formats.milliseconds(end)}."
    return Plot(_spec(alternative, 280, layer=[line, point], encoding={"x": x, "y": y, "color": colour}), alternative)


def plan(compiled: Plan) -> Plot:
    """One row of tiles for each block, one tile for each kernel."""
    rows = _tiles(compiled)
    blocks = _row_names(rows)
    types = sorted({row["types"] for row in rows}, key=_width)
    encoding = {
        "x": {"field": "position", "type": "ordinal", "axis": None, "scale": {"paddingInner": 0.06}},
        "y": {
            "field": "block",
            "type": "nominal",
            "title": None,
            "scale": {"domain": blocks, "paddingInner": 0.14},
            "axis": {"labelLimit": 150, "domain": False, "ticks": False, "labelPadding": 8},
        },
    }
    tile = {
        "mark": {"type": "rect", "cornerRadius": 3},
        "encoding": {
            "color": {
                "field": "types",
                "type": "nominal",
                "title": None,
                "scale": {"domain": types, "range": [_colour(name) for name in types]},
                "legend": {"columns": {"expr": "width > 500 ? 6 : 2"}, "labelLimit": 220},
            },
            "tooltip": [_tip("no."), _tip("kernel"), _tip("kind"), _tip("types", "input types"), _tip("modules")],
        },
    }
    label = {
        "mark": {
            "type": "text",
            "fontSize": 11,
            "fontWeight": 600,
            "tooltip": None,
            "text": {"expr": "bandwidth('x') > 66 ? datum.kind : bandwidth('x') > 10 ? datum.letter : ''"},
        },
        "encoding": {"color": {"field": "ink", "type": "nominal", "scale": None}},
    }
    kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(k.kind for k in compiled.kernels).most_common())
    alternative = f"The {formats.count(len(rows))} kernels compiled for {compiled.target}, by block: {kinds}."
    spec = _spec(alternative, 32 * len(blocks), data={"values": rows}, encoding=encoding, layer=[tile, label])
    return Plot(spec, alternative)


def sizes(computed: Sizes) -> Plot:
    """Two bars for the 2:4 layers, two for the whole model."""
    figures = [("every parameter", computed.total_fp32, computed.total_compressed)]
    if computed.pruned_fp32:
        figures.insert(0, ("2:4 layers", computed.pruned_fp32, computed.pruned_compressed))
    rows = [
        {"what": f"{what}, {form}", "form": form, "bytes": number, "size": formats.size(number)}
        for what, fp32, compressed in figures
        for form, number in (("FP32", fp32), ("compressed", compressed))
    ]
    encoding = {
        "y": {"field": "what", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 180}},
        "x": {
            "field": "bytes",
            "type": "quantitative",
            "axis": None,
            "scale": {"domainMax": 1.2 * computed.total_fp32},
        },
    }
    colour = {
        "field": "form",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": ["FP32", "compressed"], "range": ["var(--baseline)", "var(--student)"]},
    }
    bar = {
        "mark": {"type": "bar", "cornerRadiusEnd": 3, "height": {"band": 0.7}},
        "encoding": {"color": colour, "tooltip": [_tip("what"), _tip("size")]},
    }
    label = {
        "mark": {"type": "text", "align": "left", "dx": 6, "fill": "var(--text)", "tooltip": None},
        "encoding": {"text": {"field": "size"}},
    }
    alternative = "Bytes of the weights: " + "; ".join(f"{row['what']} {row['size']}" for row in rows) + "."
    spec = _spec(alternative, 30 * len(rows), data={"values": rows}, encoding=encoding, layer=[bar, label])
    return Plot(spec, alternative)


def _spec(description: str, height: int, **parts: Any) -> Spec:
    return {
        "description": description,
        "width": "container",
        "height": height,
        "config": {
            "background": None,
            "font": "system-ui, sans-serif",
            "view": {"stroke": None},
            "axis": {
                "labelColor": "var(--muted)",
                "titleColor": "var(--muted)",
                "gridColor": "var(--line)",
                "domainColor": "var(--line)",
                "tickColor": "var(--line)",
                "labelFontSize": 12,
                "titleFontSize": 12,
                "titleFontWeight": "normal",
            },
            "legend": {"labelColor": "var(--text)", "labelFontSize": 12, "orient": "top", "symbolType": "square"},
        },
        **parts,
    }


def _tip(field: str, title: str | None = None) -> Spec:
    return {"field": field.replace(".", "\\."), "type": "nominal", "title": title or field}


def _steps(model: str, values: Sequence[float]) -> list[Spec]:
    """Return at most MAX_STEPS steps of the distribution, at evenly spaced ranks, the first and last among them."""
    number = min(len(values), MAX_STEPS)
    ranks = sorted({round(i * (len(values) - 1) / max(number - 1, 1)) for i in range(number)})
    return [{"model": model, "ms": values[rank], "share": (rank + 1) / len(values)} for rank in ranks]


def _quantiles(model: str, timing: Timing) -> list[Spec]:
    return [
        {
            "model": model,
            "quantile": name,
            "share": share,
            "ms": interval.value,
            "latency": formats.milliseconds_interval(interval),
        }
        for name, share, interval in (("p50", 0.5, timing.p50_ms), ("p99", 0.99, timing.p99_ms))
    ]


def _tiles(compiled: Plan) -> list[Spec]:
    taken: Counter[str] = Counter()
    rows: list[Spec] = []
    for number, kernel in enumerate(compiled.kernels, start=1):
        block = _block(kernel)
        line, position = divmod(taken[block], ROW)
        taken[block] += 1
        rows.append(
            {
                "no.": number,
                "block": f"{block} · {line + 1}" if line else block,
                "position": position,
                "kernel": kernel.name,
                "kind": kernel.kind,
                "letter": LETTERS.get(kernel.kind, "?"),
                "types": _types(kernel),
                "ink": "var(--text)" if " + " in _types(kernel) else "var(--on-tile)",
                "modules": ", ".join(kernel.modules) or "none",
            }
        )
    return rows


def _row_names(tiles: list[Spec]) -> list[str]:
    """Return the rows by the first kernel of their block, a block's further rows right below it."""
    names = list(dict.fromkeys(tile["block"] for tile in tiles))
    first = {name: number for number, name in enumerate(names)}
    return sorted(names, key=lambda name: (first[name.split(" · ")[0]], first[name]))


def _block(kernel: Kernel) -> str:
    """Return the block of the kernel's first module: `blocks.0` of `blocks.0.mlp.fc2`, `head` of `head.fc`."""
    if not kernel.modules:
        return "no module"
    module = kernel.modules[0]
    block = re.match(r".*?\.\d+(?=\.|$)", module)
    return block.group() if block else re.split("[./]", module)[0]


def _types(kernel: Kernel) -> str:
    """Return the types of a kernel's inputs, of a GEMM's two operands: its scales and bias do not make it mixed."""
    types = kernel.types[:2] if kernel.kind in GEMMS else kernel.types
    return " + ".join(sorted({formats.type_name(name) for name in types}, key=_width)) or "no input"


def _width(types: str) -> tuple[int, int, str]:
    """Order types by width, the narrowest input first, pure before mixed."""
    first = types.split(" + ")[0]
    return (WIDTHS.index(first) if first in WIDTHS else len(WIDTHS), types.count("+"), types)


def _colour(types: str) -> str:
    names = types.split(" + ")
    colour = f"var(--{COLOURS.get(names[0], 'other')})"
    return colour if len(names) == 1 else f"color-mix(in srgb, {colour} 30%, var(--surface))"
