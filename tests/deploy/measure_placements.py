"""What `--placement best` takes for models, devices and batches, next to the fixed placements: all of it predicted.

    python tests/deploy/measure_placements.py deit.onnx swin.onnx … [--profiles a100 agx-orin] [--batches 1 32]

The samples are random numbers, or with --data what is given, one source for each model: latencies do not depend on
them, losses do. Every graph is made and compiled once for each device, and its kernels are scaled to each batch. One
row of a Markdown table for each model, device and batch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from deploy.manifest import MODEL_FILE

sys.path.insert(0, str(Path(__file__).parents[2]))
import tests.conftest  # noqa: F401  lets torchvision import
from calibration.samples import SampleSource, random_inputs
from deploy.best_placement import points_lost, usual_inputs
from deploy.costly import TARGET_DROP
from deploy.job import Job
from deploy.placement_candidates import candidates
from deploy.placement_choice import Trial, choose
from deploy.predict import predict
from deploy.progress import Progress
from deploy.surgery import write_graph
from exporters.checkpoint import LoadOptions, load_student
from exporters.placement import Placement
from exporters.student import sample_specs
from profiles.device import Device, load_device
from profiles.errors import GpusqError

_SAMPLES = 8


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--profiles", nargs="+", default=["a100", "agx-orin"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--target-drop", type=float, default=TARGET_DROP)
    asked = parser.parse_args()
    print("| model | device | batch | placement: ms, predicted (points lost) | taken |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(asked.models):
            data = asked.data[number] if asked.data else _random(model, Path(folder))
            for profile in asked.profiles:
                for row in rows(model, str(data), profile, asked.batches, asked.target_drop):
                    print(row, flush=True)


def rows(model: Path, data: str, profile: str, batches: Sequence[int], target: float) -> Iterator[str]:
    """One row for each batch."""
    device = load_device(profile)
    job = Job(model, LoadOptions(), "auto", None, SampleSource(data), None, Path(), Progress())
    job.load([device])
    trials = [_trials(job, device, placement, batches) for placement in candidates(job, device)]
    for batch, found in zip(batches, zip(*trials, strict=True), strict=True):
        choice = choose(found, batch, target)
        told = ", ".join(map(_told, found))
        yield f"| {model.stem} | {profile} | {batch} | {told} | {'none' if choice is None else choice.taken} |"


def _trials(job: Job, device: Device, placement: Placement, batches: Sequence[int]) -> list[Trial]:
    """The placement at each batch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_FILE
        try:
            write_graph(job.placed(placement), device, path.parent)
            predicted = predict(path, [device.name], batches=batches, inputs=usual_inputs(job))
        except GpusqError as error:
            return [Trial(placement=placement, refused=error.message) for _ in batches]
        drop = points_lost(job, path)
    return [
        Trial(placement=placement, latency_ms=one.latency_ms, low_ms=one.low_ms, high_ms=one.high_ms, drop=drop)
        for one in predicted.points
    ]


def _told(trial: Trial) -> str:
    if trial.latency_ms is None:
        return f"{trial.placement}: {trial.refused}"
    return f"{trial.placement}: {trial.latency_ms:.3f} ({trial.drop:.2f})"


def _random(model: Path, folder: Path) -> Path:
    path = folder / f"{model.stem}.npz"
    np.savez(path, **random_inputs(sample_specs(load_student(model)), _SAMPLES))  # type: ignore[arg-type]
    return path


if __name__ == "__main__":
    main()
