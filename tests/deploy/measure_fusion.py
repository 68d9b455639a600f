"""The fusion model beside the compiler: `python tests/deploy/measure_fusion.py deit.onnx resnet.onnx …`.

One row of a Markdown table for each file and precision: the kernels that TensorRT-RTX compiles for SM80, those of the
fusion model, how many products differ in size, and what that does to the predicted latency at batch 8 on A100.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from deploy.fusion_model import fused_kernels
from deploy.graph_file import read_graph
from deploy.kernel_work import ModelWork, works_of
from deploy.predict import Precision, compiled_work, typed_graph
from deploy.usual_shapes import usual_shapes
from profiles.cost_parameters import load_parameters
from profiles.device import load_device
from profiles.latency import latency_of
from profiles.machine import machine_of

_PRECISIONS: tuple[Precision, ...] = ("fp16", "int8")


def main() -> None:
    """Print the table."""
    heading = ("model", "precision", "compiled", "fusion model", "products that differ", "latency beside")
    print(f"| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
    for name in sys.argv[1:]:
        for precision in _PRECISIONS:
            print(row(Path(name), precision), flush=True)


def row(path: Path, precision: Precision) -> str:
    """The row of one file."""
    device = load_device("a100")
    with tempfile.TemporaryDirectory() as folder:
        typed = typed_graph(path, device, precision, Path(folder) / path.name)
        compiled = compiled_work(typed, device).works
        graph = read_graph(typed)
        fused = works_of(fused_kernels(graph, *usual_shapes(graph, ())))
    differ = (products(compiled) - products(fused)).total()
    ms = [latency_of([w.work for w in works], machine_of(device), load_parameters()).ms for works in (compiled, fused)]
    counts = f"{len(compiled)} | {len(fused)} | {differ} of {products(compiled).total()}"
    return f"| {path.stem} | {precision} | {counts} | {ms[1] / ms[0]:.2f} |"


def products(works: list[ModelWork] | tuple[ModelWork, ...]) -> Counter[tuple[object, ...]]:
    """The sizes of the products with their types."""
    kinds = ("gemm", "convolution", "attention")
    found = (each.work for each in works if each.work.kind in kinds)
    return Counter((work.kind, work.number, work.m, work.n, work.k, work.groups) for work in found)


if __name__ == "__main__":
    main()
