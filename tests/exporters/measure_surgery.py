"""Operate on graphs by gpusq, and tell seconds, peak memory and which weights were read, and by which pass.

    python tests/exporters/measure_surgery.py vit [--model vit_base_patch16_224] [--rounds 3]
    python tests/exporters/measure_surgery.py decoder [--layers 32] [--dtype float float16]

`vit` exports a vision transformer and quantizes it, w8a8-linear for the A100, beside Model Optimizer's INT8 of the same
file, where `GPUSQ_MODELOPT_PYTHON` names an interpreter that has it. Both are measured with one calibration sample,
and without: of Model Optimizer, which wants one, the time and the peak inside of its calibrator are left out then
(making it and its session, running the model, reading its ranges); gpusq is given the ranges. Reading the file and
writing the result count for both; imports count for the memory, not for the time.

`decoder` makes the graph of Llama-2 7B with its weights in a sparse file and brings it to the A100 as fp16, w8a8-linear
with given ranges, and w4. A weight counts as read by each stage in which its values are asked for.

Each run is a process of its own. Memory is the peak of its resident set, mapped files included (proc(5), VmHWM).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from calibration.ranges import measure_amax  # noqa: E402
from exporters.onnx_file import read_onnx  # noqa: E402
from exporters.placement import Placement  # noqa: E402
from exporters.save_onnx import save_onnx  # noqa: E402
from exporters.surgery import Target, passes_for  # noqa: E402
from profiles.device import load_device  # noqa: E402
from tests.exporters.llama_decoder import BYTES, Decoder  # noqa: E402

PLACEMENTS: tuple[Placement, ...] = ("fp16", "w8a8-linear", "w4")
MODELOPT = "GPUSQ_MODELOPT_PYTHON"
GIVEN, MEASURED, MEASURING = "ranges given", "ranges measured", "measuring"
T = TypeVar("T")
RANGE = 8.0  # stands for every activation's amax, where ranges are given
_MODELOPT = """
import json, sys, time
import numpy as np
import onnxruntime.quantization.calibrate
import modelopt.onnx.quantization.int8
from modelopt.onnx.quantization import ort_patching, quantize
path, out, name, *shape = sys.argv[1:]
sample = np.random.default_rng(0).standard_normal([int(size) for size in shape], np.float32)
measuring, outside_mib, inside = 0.0, 0.0, False

def peak_mib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

def apart(function):
    def wrapped(*arguments, **keywords):
        global measuring, outside_mib, peaks, inside
        if inside:
            return function(*arguments, **keywords)
        outside_mib, start, inside = max(outside_mib, peak_mib()), time.perf_counter(), True
        try:
            return function(*arguments, **keywords)
        finally:
            measuring, inside = measuring + time.perf_counter() - start, False
            peaks.append(peak_mib())
            open("/proc/self/clear_refs", "w").write("5")
    return wrapped

peaks = []
for function in ("_create_calibrator_with_extra_options", "_collect_data_minmax_calibrator",
                 "_compute_data_minmax_calibrator"):
    setattr(ort_patching, function, apart(getattr(ort_patching, function)))
start = time.perf_counter()
quantize(path, quantize_mode="int8", calibration_data={name: sample}, calibration_method="max",
         calibration_eps=["cpu"], calibration_shapes=f"{name}:{'x'.join(shape)}", output_path=out)
seconds = time.perf_counter() - start
outside_mib = max(outside_mib, peak_mib())
found = dict(seconds=seconds, measuring=measuring, peak_mib=max(outside_mib, *peaks), outside_mib=outside_mib)
print(json.dumps(found))
"""


@dataclass
class Stages:
    """What one run did, stage by stage: reading the file, each pass, measuring inside of one, and saving.

    Attributes:
        seconds: by stage, in their order.
        peak_mib: by stage, the highest resident set of the process so far.
        tensors: by stage, the bytes of each tensor of a file whose values were asked for, by name.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, dict[str, int]] = field(default_factory=dict)
    _stage: str = ""

    def watch(self) -> None:
        """Note every reading of an external tensor from now on, in this process."""
        for method in ("numpy", "tobytes", "tofile"):
            setattr(ir.ExternalTensor, method, self._noted(getattr(ir.ExternalTensor, method)))

    def run(self, stage: str, step: Callable[[], T]) -> T:
        """Do one stage."""
        self._stage, start = stage, perf_counter()
        done = step()
        self.seconds[stage] = perf_counter() - start
        self.peak_mib[stage] = peak_mib()
        return done

    def _noted(self, method: Callable[..., T]) -> Callable[..., T]:
        def noted(tensor: ir.ExternalTensor, *arguments: Any) -> T:
            self.tensors.setdefault(self._stage, {})[tensor.name] = tensor.nbytes
            return method(tensor, *arguments)

        return noted


def peak_mib() -> float:
    """The highest resident set of this process so far, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def operate(path: Path, out: Path, placement: Placement, sample: Mapping[str, Sequence[int]]) -> Stages:
    """Bring the graph in `path` to the A100 and write it to `out`.

    Ranges are measured on one random sample of the shapes `sample`; where it is empty, they are given.
    """
    stages = Stages()
    stages.watch()

    def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        if not sample:
            return dict.fromkeys(names, RANGE)
        random, start = np.random.default_rng(0), perf_counter()
        amax = measure_amax(model, names, {n: random.standard_normal(s, np.float32) for n, s in sample.items()}, 1)
        stages.seconds[MEASURING] = perf_counter() - start
        return amax

    model = stages.run("read", lambda: read_onnx(path))
    for step in passes_for(Target(load_device("a100"), "float16", placement), measure):
        stages.run(type(step).__name__, functools.partial(step, model))
    stages.run("save", lambda: save_onnx(model, out))
    return stages


def in_a_process(path: Path, placement: Placement, sample: Mapping[str, Sequence[int]] | None = None) -> Stages:
    """`operate` in a process of its own; what it wrote is gone."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        asked = ["once", str(path), str(Path(folder) / "out.onnx"), placement, json.dumps(sample or {})]
        return Stages(**_last_line([sys.executable, "-W", "ignore", __file__, *asked]))


def _last_line(command: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_decoder(decoder: Decoder, placements: Sequence[Placement], folder: Path) -> dict[Placement, Stages]:
    """Operate on `decoder`, made in `folder`, once for each placement."""
    path = decoder.save(folder)
    return {placement: in_a_process(path, placement) for placement in placements}


def show_decoder(decoder: Decoder, found: Mapping[Placement, Stages]) -> None:
    """Print what each stage took and read."""
    print(f"{decoder.parameters / 1e9:.2f} billion parameters, {decoder.dtype}, {decoder.weight_bytes / 2**30:.1f} GiB")
    for placement, stages in found.items():
        total, peak = sum(stages.seconds.values()), max(stages.peak_mib.values())
        print(f"{placement}: {total:.1f} s, peak {peak:.0f} MiB")
        for stage, seconds in stages.seconds.items():
            read = stages.tensors.get(stage, {})
            if read or seconds >= 1:
                amount = f"{len(read):4} weights, {sum(read.values()) / 2**20:8.0f} MiB read"
                print(f"  {stage:20} {seconds:7.1f} s  peak {stages.peak_mib[stage]:6.0f} MiB  {amount}")


@dataclass(frozen=True)
class Run:
    """Seconds and peak MiB of one run, with and without what it took to run the model on samples."""

    seconds: float
    measuring: float
    peak_mib: float
    outside_mib: float

    @staticmethod
    def of(stages: Stages) -> Run:
        """Sum up; the peak of the whole where ranges were measured, which is inside of a pass."""
        measuring = stages.seconds.pop(MEASURING, 0.0)
        peak = max(stages.peak_mib.values())
        return Run(sum(stages.seconds.values()), measuring, peak, peak)

    @property
    def outside(self) -> float:
        """Seconds without those on samples."""
        return self.seconds - self.measuring


def measure_vit(path: Path, rounds: int, shape: Sequence[int]) -> dict[str, list[Run]]:
    """Quantize the model in `path` in turn by gpusq, ranges given and measured, and by Model Optimizer."""
    (name,) = [value.name or "" for value in ir.load(path).graph.inputs]
    python, found = os.environ.get(MODELOPT), dict[str, list[Run]]()
    for _ in range(rounds):
        for way, sample in ((GIVEN, {}), (MEASURED, {name: shape})):
            found.setdefault(way, []).append(Run.of(in_a_process(path, "w8a8-linear", sample)))
        if python:
            with tempfile.TemporaryDirectory() as folder:
                asked = [str(path), str(Path(folder) / "out.onnx"), name, *map(str, shape)]
                found.setdefault("modelopt", []).append(Run(**_last_line([python, "-c", _MODELOPT, *asked])))
    return found


def show_vit(found: Mapping[str, Sequence[Run]]) -> None:
    """Print medians and spreads, and how many times less gpusq takes than Model Optimizer."""
    for way, runs in found.items():
        for key in ("seconds", "measuring", "peak_mib", "outside_mib"):
            print(f"{way:16} {key:11} {_spread([getattr(run, key) for run in runs])}")
    if "modelopt" not in found:
        print(f"Model Optimizer is not measured: {MODELOPT} names no interpreter that has it")
        return
    for ours, with_sample, keys in (
        (GIVEN, "without samples", ("outside", "outside_mib")),
        (MEASURED, "with one sample", ("seconds", "peak_mib")),
    ):
        for what, key in zip(("seconds", "peak memory"), keys, strict=True):
            pairs = zip(found["modelopt"], found[ours], strict=True)
            ratios = [getattr(theirs, key) / getattr(mine, key) for theirs, mine in pairs]
            print(f"Model Optimizer / gpusq, {what} {with_sample}: {_spread(ratios)}")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):8.2f}  [{min(values):.2f}, {max(values):.2f}]"


def export_vit(model: str, shape: Sequence[int], folder: Path) -> Path:
    """Export a model of timm with random weights."""
    from exporters.signature import Input
    from exporters.to_onnx import to_onnx

    importlib.import_module("tests.conftest")  # lets torchvision import, which timm does
    timm = importlib.import_module("timm")
    inputs = (Input("image", (2, *shape[1:]), "float32", {0: "batch"}),)
    exported = to_onnx(timm.create_model(model).eval(), inputs, ("logits",))
    save_onnx(exported.model, folder / "model.onnx")
    return folder / "model.onnx"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ways = parser.add_subparsers(dest="way", required=True)
    vit = ways.add_parser("vit")
    vit.add_argument("--model", default="vit_base_patch16_224")
    vit.add_argument("--onnx", type=Path, help="a file that was exported before")
    vit.add_argument("--rounds", type=int, default=3)
    vit.add_argument("--shape", type=int, nargs="+", default=[1, 3, 224, 224])
    decoder = ways.add_parser("decoder")
    decoder.add_argument("--layers", type=int, default=32)
    decoder.add_argument("--dtype", choices=BYTES, nargs="+", default=["float"])
    decoder.add_argument("--placements", choices=PLACEMENTS, nargs="+", default=PLACEMENTS)
    once = ways.add_parser("once", help="one run, for this script itself")
    for name in ("path", "out", "placement", "sample"):
        once.add_argument(name)
    asked = parser.parse_args()
    if asked.way == "once":
        stages = operate(Path(asked.path), Path(asked.out), asked.placement, json.loads(asked.sample))
        print(json.dumps({"seconds": stages.seconds, "peak_mib": stages.peak_mib, "tensors": stages.tensors}))
        return
    with tempfile.TemporaryDirectory() as folder:
        if asked.way == "vit":
            path = asked.onnx or export_vit(asked.model, asked.shape, Path(folder))
            show_vit(measure_vit(path, asked.rounds, asked.shape))
            return
        for dtype in asked.dtype:
            made = Decoder(layers=asked.layers, dtype=dtype)
            show_decoder(made, measure_decoder(made, asked.placements, Path(folder)))


if __name__ == "__main__":
    main()
