"""What synthetic samples are worth: w8a8-linear with ranges from real samples, synthetic ones, random numbers.

    python tests/calibration/measure_synthetic.py [--subjects mobilenet …] [--samples 32] [--seeds 0]
                                                  [--json FILE]

The rows are those of tests/exporters/accuracy_subjects.py and a detector that is trained here for some minutes
(tiny_detector.py); every graph is placed and judged as tests/exporters/measure_accuracy.py does. `random` are standard
normal numbers, what `gpusq` takes where there is no data. All three columns calibrate on the same number of samples.
With `--seeds 0 1 2` the rows come once for each of these seeds of the synthetic and the random samples.

| line | what |
|---|---|
| top-1, same class as fp32, cosine to fp32 | as in measure_accuracy.py |
| same class as real | the same for the class of the model that was calibrated on real samples |
| cosine to real | the same for its scores or features |
| ranges | median over tensors of how many times too wide or too narrow against real samples; (median ratio) |
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[2]))
import tests.conftest  # noqa: F401  lets torchvision import
from calibration.compare_ranges import compare_ranges
from calibration.ranges import measure_amax
from calibration.samples import random_inputs
from exporters.checkpoint import load_student
from exporters.signature import Input
from exporters.student import ModuleStudent, Student, sample_specs
from exporters.surgery import Target, surgery
from profiles.device import load_device
from students.fashion_vit.sample import teacher_path
from tests.exporters import accuracy_subjects, survey_pairs
from tests.exporters.accuracy_subjects import BATCH, SUBJECTS, Array, Feeds, Subject, answers, missing
from tests.exporters.measure_accuracy import header, judge, lines

COLUMNS = ("real", "synthetic", "random")
_TRAINING_STEPS = 400
_TESTED = 256
_CALIBRATED = 64
_TEST_SEED, _CALIBRATION_SEED = 10**6, 2 * 10**6
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """One column of a row: what the quantized graph answers, and the ranges that it was given."""

    features: Array
    ranges: Mapping[str, float]


def student_of(name: str, detector: Path | None) -> Student:
    """The torch module of a row, from which its samples are made."""
    if name == "student":
        return load_student(teacher_path())
    if name == "detector":
        return _detector(detector)
    pair = accuracy_subjects.dino_pair() if name == "dinov2" else _mobilenet_pair()
    with tempfile.TemporaryDirectory() as folder:
        pair.save(Path(folder))
        return load_student(*pair.given(Path(folder)))


def _mobilenet_pair() -> survey_pairs.Pair:
    return next(pair for pair in survey_pairs.PAIRS if pair.name == "MobileNetV2, real weights (torchvision)")


def detector_row(student: Student) -> Subject:
    """Is each garment seen where it lies, and as what it is? Features are all scores and boxes."""
    import torch

    from tests.calibration import tiny_detector

    garments = tiny_detector.read_garments("t10k")
    tested = tiny_detector.scenes(garments, _TESTED, seed=_TEST_SEED)
    real = tiny_detector.scenes(garments, _CALIBRATED, seed=_CALIBRATION_SEED)

    def seen(features: Array) -> Array:
        output = torch.from_numpy(features).reshape(len(features), 4 + tiny_detector.CLASSES, -1)
        return np.asarray(tiny_detector.seen_classes(output, tested.boxes[:, -1]).numpy())

    return Subject(
        "tiny detector",
        student.export().model,
        {"images": real.images.numpy()},
        {"images": tested.images.numpy()},
        lambda output, _: output.reshape(len(output), -1),
        seen,
        tested.labels[:, -1].numpy(),
    )


def measure(subject: Subject, student: Student, count: int, seed: int) -> dict[str, Column]:
    """Quantize with each column's samples and answer the row's inputs."""
    found = {}
    for name, samples in _samples(subject, student, count, seed).items():
        start = time.perf_counter()
        found[name] = quantized(subject, samples)
        _logger.info("%s, %s: %.1f s", subject.name, name, time.perf_counter() - start)
    return found


def quantized(subject: Subject, samples: Feeds) -> Column:
    """The graph with w8a8-linear, its ranges measured on `samples`."""
    model, ranges = subject.model.clone(), dict[str, float]()

    def measured(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        ranges.update(measure_amax(model, names, samples, BATCH))
        return ranges

    surgery(model, Target(load_device("cpu"), "float32", "w8a8-linear"), measured)
    return Column(_answered(subject, model), ranges)


def table(subject: Subject, columns: Mapping[str, Column], count: int) -> str:
    """All lines of a row, in Markdown."""
    reference, real = _answered(subject, subject.model), columns["real"]
    counted = replace(subject, calibration={name: array[:count] for name, array in subject.calibration.items()})
    to_float = {"fp32": judge(subject, reference, reference)}
    to_float |= {name: judge(subject, column.features, reference) for name, column in columns.items()}
    to_real = {"fp32": judge(subject, reference, real.features)}
    to_real |= {name: judge(subject, column.features, real.features) for name, column in columns.items()}
    without_labels = replace(counted, labels=None)
    return "\n".join(
        [
            lines(counted, to_float),
            lines(without_labels, {name: replace(one, top1=None) for name, one in to_real.items()})
            .replace("to fp32", "to real")
            .replace("as fp32", "as real"),
            f"| {subject.name} | {count} | ranges | {len(real.ranges)} | | "
            + " | ".join(_ranges(column, real) for column in columns.values())
            + " |",
        ]
    )


def _ranges(column: Column, real: Column) -> str:
    compared = compare_ranges(column.ranges, real.ranges)
    return f"× {compared.median_factor:.3f} ({compared.median_ratio:.3f})"


def _answered(subject: Subject, model: ir.Model) -> Array:
    with tempfile.TemporaryDirectory() as folder:
        ir.save(model, Path(folder) / "model.onnx")
        return subject.features(answers(Path(folder) / "model.onnx", subject.inputs), subject.inputs)


def _samples(subject: Subject, student: Student, count: int, seed: int) -> dict[str, Feeds]:
    """Each column's samples, under the name of the graph's input."""
    from calibration.synthetic.synthesize import synthesize

    assert isinstance(student, ModuleStudent)
    specs = sample_specs(student)
    start = time.perf_counter()
    made = synthesize(student.module, specs, count, seed=seed)
    _logger.info("%s: %s, in %.0f s", subject.name, made.source, time.perf_counter() - start)
    ((name, real),) = subject.calibration.items()
    by_column = {
        "real": real[:count],
        "synthetic": next(iter(made.inputs.values()))[np.arange(len(made))],
        "random": next(iter(random_inputs(specs, count, seed=seed).values())),
    }
    return {column: {name: array} for column, array in by_column.items()}


def _detector(path: Path | None) -> ModuleStudent:
    """The detector at `path`, or one that is trained now and kept there."""
    import torch

    from tests.calibration import tiny_detector

    if path is not None and path.is_file():
        network = tiny_detector.TinyDetector()
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        network = tiny_detector.train(_TRAINING_STEPS)
        if path is not None:
            torch.save(network.state_dict(), path)
    shape = (2, 1, tiny_detector.SIDE, tiny_detector.SIDE)
    inputs = (Input("images", shape, dynamic={0: "batch"}),)
    return ModuleStudent(network.eval(), inputs, preprocessing={"images": tiny_detector.SPEC})


def main() -> None:
    """Measure and print."""
    names = ("mobilenet", "dinov2", "student", "detector")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=names, default=list(names))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--detector", type=Path, help="a file that keeps the trained detector")
    parser.add_argument("--json", type=Path, help="a file for the ratio of each tensor's range")
    asked = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    _logger.setLevel(logging.INFO)
    print(header(["fp32", *COLUMNS]))
    compared: dict[str, Any] = {}
    for name in asked.subjects:
        if why := missing("dinov2" if name == "detector" else name):
            print(f"{name} is left out: {why}", file=sys.stderr)
            continue
        student = student_of(name, asked.detector)
        subject = detector_row(student) if name == "detector" else SUBJECTS[name]()
        for seed in asked.seeds:
            columns = measure(subject, student, asked.samples, seed)
            row = replace(subject, name=f"{subject.name}, seed {seed}")
            print(table(row, columns, asked.samples), flush=True)
            compared[row.name] = {
                column: compare_ranges(columns[column].ranges, columns["real"].ranges, of=column).to_json()
                for column in ("synthetic", "random")
            }
    if asked.json is not None:
        asked.json.write_text(json.dumps(compared, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
