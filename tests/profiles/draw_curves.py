"""Draw the scaling curves of docs/predict.md and print the paper's range: `python -m tests.profiles.draw_curves`.

Run by hand after a fit. Everything in it is predicted, from the kernels in profiles/data/works.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from profiles.cost_parameters import load_parameters
from profiles.device import Device, load_device
from profiles.latency import latency_of
from profiles.machine import machine_of
from profiles.published import pruned, read_works
from profiles.work import Work

DOCS = Path(__file__).parents[2] / "docs"
Rows = list[dict[str, Any]]
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BASELINES = ("fp32", "tf32", "fp16")


def main() -> None:
    """Write the SVG files, their PNG beside the first argument's folder, and print the table."""
    import vl_convert

    for name, chart in {
        "predict-batch": _chart(list(_batches()), "batch", "images per s"),
        "predict-sequence": _chart(list(_sequences()), "tokens", "tokens per s"),
        "predict-width": _chart(list(_widths()), "width", "speed-up of 2:4"),
        "predict-power": _chart(list(_powers()), "batch", "images per s"),
    }.items():
        (DOCS / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(json.dumps(chart)), encoding="utf-8")
        if len(sys.argv) > 1:
            (Path(sys.argv[1]) / f"{name}.png").write_bytes(vl_convert.vegalite_to_png(json.dumps(chart)))
    print("\n".join(_paper()))


def _ms(works: tuple[Work, ...] | list[Work], device: Device) -> float:
    return latency_of(works, machine_of(device), load_parameters()).ms


def _at(model: str, number: str, batch: int, *, sparse: bool = False) -> list[Work]:
    compiled, works = read_works(model, number)
    return [work.scaled(batch / compiled) for work in (pruned(works) if sparse else works)]


def _batches() -> Iterator[dict[str, Any]]:
    for name, batch in itertools.product(("a100", "agx-orin"), _BATCHES):
        for label, number, sparse in (("FP16", "fp16", False), ("INT8", "int8", False), ("INT8 2:4", "int8", True)):
            ms = _ms(_at("deit-s-224", number, batch, sparse=sparse), load_device(name))
            yield {"x": batch, "y": 1e3 * batch / ms, "line": label, "facet": f"DeiT-S, {name}"}


def _block(tokens: int, width: int, number: str, *, sparse: bool = False) -> list[Work]:
    """A transformer block of one sequence: four GEMMs and an attention."""
    size, heads = {"fp16": 2, "int8": 1}[number], width // 64
    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    gemms = [
        Work("gemm", number, tokens, n, k, 1, tokens * k * size, k * n * size, tokens * n * 2, pruned=sparse)
        for k, n in sizes
    ]
    attention = Work("attention", "fp16", tokens, tokens, 64, heads, 6 * tokens * width, 0, 2 * tokens * width)
    moving = Work("pointwise", "fp16", read=4 * tokens * width, written=2 * tokens * width, count=4)
    return [*gemms, attention, moving]


def _sequences() -> Iterator[dict[str, Any]]:
    for name, tokens in itertools.product(("a100", "agx-orin"), (64, 128, 256, 512, 1024, 2048, 4096)):
        for label, number, sparse in (("FP16", "fp16", False), ("INT8", "int8", False), ("INT8 2:4", "int8", True)):
            works = [replace(w, count=12 * w.count) for w in _block(tokens, 768, number, sparse=sparse)]
            yield {"x": tokens, "y": 1e3 * tokens / _ms(works, load_device(name)), "line": label, "facet": name}


def _widths() -> Iterator[dict[str, Any]]:
    for name, width in itertools.product(("a100", "agx-orin"), (192, 384, 768, 1024, 2048, 4096)):
        for batch in (1, 8, 32):
            dense, sparse = (
                [replace(w, count=12).scaled(batch) for w in _block(197, width, "int8", sparse=on)]
                for on in (False, True)
            )
            device = load_device(name)
            yield {
                "x": width,
                "y": _ms(dense, device) / _ms(sparse, device),
                "line": f"batch {batch:02}",
                "facet": name,
            }


def _powers() -> Iterator[dict[str, Any]]:
    orin = load_device("agx-orin")
    assert orin.power is not None
    for mode, batch in itertools.product(orin.power.modes, _BATCHES):
        for number in ("fp16", "int8"):
            ms = _ms(_at("deit-s-224", number, batch), orin.at(mode.name))
            yield {"x": batch, "y": 1e3 * batch / ms, "line": mode.name, "facet": f"DeiT-S, {number}"}


def _chart(rows: Rows, x: str, y: str) -> dict[str, Any]:
    log = y != "speed-up of 2:4"
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "data": {"values": rows},
        "facet": {"column": {"field": "facet", "title": None}},
        "spec": {
            "width": 300,
            "height": 220,
            "mark": {"type": "line", "point": True},
            "encoding": {
                "x": {"field": "x", "type": "quantitative", "scale": {"type": "log", "base": 2}, "title": x},
                "y": {
                    "field": "y",
                    "type": "quantitative",
                    "scale": {"type": "log"} if log else {"zero": False},
                    "title": f"predicted {y}",
                },
                "color": {"field": "line", "type": "nominal", "title": None},
            },
        },
    }


def _paper() -> Iterator[str]:
    """The predicted speed-ups of INT8 with 2:4 over each baseline, beside the paper's claims."""
    yield "| model | device | batch | FP32 | TF32 | FP16 |"
    yield "|---|---|---|---|---|---|"
    for model, name, batch in itertools.product(
        ("deit-t-224", "deit-s-224", "vit-b-224", "swin-t-224", "swin-b-224"), ("a100", "agx-orin"), (1, 64)
    ):
        if not (Path(__file__).parents[2] / "profiles/data/works" / f"{model}.json").is_file():
            continue
        device = load_device(name)
        student = _ms(_at(model, "int8", batch, sparse=True), device)
        ratios = (_ms(_at(model, number, batch), device) / student for number in _BASELINES)
        yield f"| {model} | {name} | {batch} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |"


if __name__ == "__main__":
    main()
