"""Export a vision transformer by torch.onnx.export alone and by gpusq, and compare time and peak memory.

    python tests/exporters/measure_export.py [--model vit_large_patch16_224] [--rounds 3]

Each export runs in a process of its own, the two in turn. Memory is the peak of the resident set over the export alone:
the kernel's mark is reset when the model is built (proc(5), clear_refs).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SCRIPT = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import tests.conftest  # lets torchvision import
import timm
from exporters.save_onnx import save_onnx
from exporters.signature import parse_input
from exporters.student import ModuleStudent

def mib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

module, out = timm.create_model({model!r}).eval(), Path({out!r})
weights = sum(p.numel() * p.element_size() for p in module.parameters()) / 2**20
size = module.pretrained_cfg["input_size"]
open("/proc/self/clear_refs", "w").write("5")
before, start = mib("VmRSS"), time.perf_counter()
if {way!r} == "torch":
    torch.onnx.export(module, (torch.zeros(1, *size),), out, dynamo=True, opset_version=23, verbose=False)
else:
    save_onnx(ModuleStudent(module, (parse_input("x=1x" + "x".join(map(str, size))),)).export().model, out)
seconds = time.perf_counter() - start
print(json.dumps(dict(seconds=seconds, peak_mib=mib("VmHWM"), added_mib=mib("VmHWM") - before, weights_mib=weights)))
"""


def measure(model: str, way: str) -> dict[str, float]:
    """Seconds, the peak of the resident set in MiB, what the export added to it, and the weights' MiB."""
    with tempfile.TemporaryDirectory() as folder:
        script = _SCRIPT.format(root=str(ROOT), model=model, way=way, out=str(Path(folder) / "model.onnx"))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"torch": [], "gpusq": []}
    for _ in range(asked.rounds):
        for way, runs in found.items():
            runs.append(measure(asked.model, way))
    for way, runs in found.items():
        for key in ("seconds", "peak_mib", "added_mib", "weights_mib"):
            values = [run[key] for run in runs]
            print(f"{way:6} {key:12} {statistics.median(values):8.1f}  [{min(values):.1f}, {max(values):.1f}]")
    for key in ("seconds", "peak_mib"):
        ratios = [ours[key] / theirs[key] for ours, theirs in zip(found["gpusq"], found["torch"], strict=True)]
        print(f"gpusq / torch {key}: {statistics.median(ratios):.3f}  [{min(ratios):.3f}, {max(ratios):.3f}]")


if __name__ == "__main__":
    main()
