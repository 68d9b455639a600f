"""What the placements cost on real weights and real inputs, beside Model Optimizer's default on the same samples.

    python tests/exporters/measure_accuracy.py [--subjects mobilenet …] [--columns w8a8-linear …]

The rows are in accuracy_subjects.py. Each graph is placed by `exporters.surgery` for the profile `cpu` with the ranges
of `calibration.ranges`, as `gpusq convert --data` does, and runs on onnxruntime node by node, unoptimized. `fp16` is a
float16 graph that onnxruntime's CPU provider, having no float16 kernels, computes in float32 between casts: what is
seen is the rounding of weights and of activations at those casts, not float16 accumulation.

GPUSQ_MODELOPT_PYTHON names an interpreter with nvidia-modelopt; where it is unset that column is left out. It is given
the same float32 ONNX file, the same calibration samples and nothing else: entropy calibration, the rest in float16.

| line | what |
|---|---|
| top-1 | % of the labelled inputs, [Wilson's 95 % interval], difference to fp32 in points |
| same class as fp32 | % of all inputs, [Wilson's 95 % interval] |
| cosine to fp32 | of scores, features or embeddings: mean over the inputs, (the smallest) |
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[2]))
import tests.conftest  # noqa: F401  lets torchvision import
from calibration.ranges import measure_amax
from exporters.placement import Placement
from exporters.surgery import Target, surgery
from profiles.device import FloatType, load_device
from tests.exporters.accuracy_subjects import BATCH, SUBJECTS, UNKNOWN, Array, Subject, answers, missing

MODELOPT = "GPUSQ_MODELOPT_PYTHON"
Make = Callable[[Subject, Path], None]
_logger = logging.getLogger(__name__)
_Z = NormalDist().inv_cdf(0.975)
_QUANTIZE = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize
source, samples, target, batch = sys.argv[1:]
with np.load(samples) as archive:
    data = {name: archive[name] for name in archive.files}
shapes = ",".join(f"{name}:" + "x".join(map(str, (batch, *array.shape[1:]))) for name, array in data.items())
quantize(source, quantize_mode="int8", calibration_data=data, calibration_shapes=shapes, calibration_eps=["cpu"],
         output_path=target)
"""


@dataclass(frozen=True)
class Share:
    """How many of how many."""

    hits: int
    count: int

    @property
    def percent(self) -> float:
        """100 · hits / count."""
        return 100 * self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval in % (J. Am. Stat. Assoc. 22, 1927, 209)."""
        p, n = self.hits / self.count, self.count
        centre, spread = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        low, high = ((100 * (centre + sign * spread) / (1 + _Z**2 / n)) for sign in (-1, 1))
        return max(low, 0.0), min(high, 100.0)


@dataclass(frozen=True)
class Judged:
    """One column of one row; `top1` is None without labels, `same` without classes.

    `cosine` is the mean over the inputs, `worst_cosine` the smallest.
    """

    top1: Share | None
    same: Share | None
    cosine: float
    worst_cosine: float


def placed(placement: Placement, float_type: FloatType = "float32") -> Make:
    """A graph with `placement` for the profile `cpu`, ranges measured on the row's calibration samples."""

    def make(subject: Subject, path: Path) -> None:
        model = subject.model.clone()

        def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
            return measure_amax(model, names, subject.calibration, BATCH)

        surgery(model, Target(load_device("cpu"), float_type, placement), measure)
        ir.save(model, path)

    return make


def float_graph(subject: Subject, path: Path) -> None:
    """The exporter's graph as it is: what everything is compared with."""
    ir.save(subject.model, path)


def by_modelopt(subject: Subject, path: Path) -> None:
    """Model Optimizer's INT8 PTQ with its defaults, in the environment that GPUSQ_MODELOPT_PYTHON names."""
    samples, source = path.with_suffix(".npz"), path.with_suffix(".float.onnx")
    np.savez(samples, allow_pickle=False, **subject.calibration)
    ir.save(subject.model, source)
    command = [os.environ[MODELOPT], "-c", _QUANTIZE, str(source), str(samples), str(path), str(BATCH)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=path.parent)
    if done.returncode:
        raise RuntimeError(done.stderr)


COLUMNS: Mapping[str, Make] = {
    "fp32": float_graph,
    "fp16": placed("fp16", "float16"),
    "w8a8-linear": placed("w8a8-linear"),
    "w8a8-mha": placed("w8a8-mha"),
    "sparse-int8": placed("sparse-int8"),
    "w4": placed("w4"),
    "modelopt": by_modelopt,
}


def measure(subject: Subject, columns: Sequence[str]) -> dict[str, Judged]:
    """Judge each of `columns` on one row; fp32 is always computed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        float_graph(subject, path)
        reference = subject.features(answers(path, subject.inputs), subject.inputs)
        found = {}
        for column in columns:
            start = time.perf_counter()
            COLUMNS[column](subject, path)
            features = subject.features(answers(path, subject.inputs), subject.inputs)
            found[column] = judge(subject, features, reference)
            _logger.info("%s, %s: %.1f s", subject.name, column, time.perf_counter() - start)
    return found


def judge(subject: Subject, features: Array, reference: Array) -> Judged:
    """Compare features [M, D] with those of the float graph, and their classes with labels where there are any."""
    cosines = _cosines(features, reference)
    top1 = same = None
    if subject.scores is not None:
        classes, expected = (subject.scores(x).argmax(axis=1) for x in (features, reference))
        same = Share(int((classes == expected).sum()), len(classes))
        if subject.labels is not None:
            known = subject.labels != UNKNOWN
            top1 = Share(int((classes == subject.labels)[known].sum()), int(known.sum()))
    return Judged(top1, same, float(cosines.mean()), float(cosines.min()))


def _cosines(a: Array, b: Array) -> Array:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


def header(columns: Sequence[str]) -> str:
    """The first two lines of the table, in Markdown."""
    return "| model | calibrated on | | of | " + " | ".join(columns) + " |\n" + "|---" * (4 + len(columns)) + "|"


def lines(subject: Subject, found: Mapping[str, Judged]) -> str:
    """One row of the table: up to three lines."""
    samples, inputs = (len(next(iter(feeds.values()))) for feeds in (subject.calibration, subject.inputs))
    return "\n".join(
        f"| {subject.name} | {samples} | {kind} | {count} | " + " | ".join(cells) + " |"
        for kind, count, cells in _lines(found, inputs)
    )


def _lines(found: Mapping[str, Judged], inputs: int) -> Iterator[tuple[str, int, list[str]]]:
    judged = list(found.values())
    top1 = [one.top1 for one in judged if one.top1 is not None]
    same = [one.same for one in judged if one.same is not None]
    if top1:
        base = found["fp32"].top1
        assert base is not None
        yield "top-1", base.count, [f"{_share(one)} {one.percent - base.percent:+.2f}" for one in top1]
    if same:
        yield "same class as fp32", inputs, [_share(one) for one in same]
    yield "cosine to fp32", inputs, [f"{one.cosine:.5f} ({one.worst_cosine:.4f})" for one in judged]


def _share(share: Share) -> str:
    low, high = share.interval
    return f"{share.percent:.2f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    asked = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    _logger.setLevel(logging.INFO)
    columns = ["fp32", *(column for column in asked.columns if column != "fp32")]
    if MODELOPT not in os.environ and "modelopt" in columns:
        print(f"{MODELOPT} is unset: no column for modelopt", file=sys.stderr)
        columns.remove("modelopt")
    print(header(columns))
    for name in asked.subjects:
        if why := missing(name):
            print(f"{name} is left out: {why}", file=sys.stderr)
            continue
        subject = SUBJECTS[name]()
        print(lines(subject, measure(subject, columns)), flush=True)


if __name__ == "__main__":
    main()
