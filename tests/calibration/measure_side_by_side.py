"""Every method and improvement beside onnxruntime's and Model Optimizer's, in one run on the same samples.

    python tests/calibration/measure_side_by_side.py [--rows minilm smollm-w4 …] [--columns max mse+equalize …]

A row is a model with real weights and real inputs and a placement; a column is one way to quantize it:

| column | |
|---|---|
| max, mse, …, least-loss | ours by `--method` |
| mse+smooth-quant,error-feedback | the same with `--improve` |
| max+error-feedback, float head | with `lm_head` left in float, as the others leave it |
| ort-minmax, ort-entropy, ort-percentile | our placement with the ranges of onnxruntime's calibrator |
| modelopt, modelopt-max | Model Optimizer whole, with its own placement: entropy, its default, or max (rows w8a8) |
| modelopt-rtn, modelopt-awq | its INT4 by rounding to nearest, or its activation-aware clipping (row w4) |
| ort-rtn | onnxruntime's INT4 MatMulNBits, rounded to nearest in blocks of 64 (row w4) |

GPUSQ_MODELOPT_PYTHON names an interpreter with nvidia-modelopt; where it is unset those columns are left out. Intervals
are of 95 %, by 2,000 draws of the judged inputs with replacement; behind `Δ` that of the difference to the better of
the others on the same inputs, which is what tells whether a column is worse.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[2]))
import tests.conftest  # noqa: F401  lets torchvision import
from calibration.probes import Feed
from exporters.improvement import IMPROVEMENTS
from exporters.placement import KEPT_FLOAT, Placement
from exporters.surgery import Target, surgery
from profiles.device import load_device
from tests.calibration import measure_methods, photos
from tests.calibration.measure_ranges import METHODS
from tests.exporters.accuracy_subjects import BATCH, SUBJECTS, UNKNOWN, Array, Subject, answers

MODELOPT = "GPUSQ_MODELOPT_PYTHON"
_DRAWS = 2000
_ABOUT_ONE = 2
_FLOAT_HEAD = ", float head"
_COLUMNS = {
    "w8a8-linear": ["modelopt", "modelopt-max", "ort-minmax", "ort-entropy", "ort-percentile", "max",
                    "percentile 99.99", "percentile 99.999", "entropy", "mse", "least-loss", "least-loss+auto"],
    "w4": ["modelopt-rtn", "modelopt-awq", "ort-rtn", "max, float head", "max+error-feedback, float head",
           "max+auto"],
}  # fmt: skip
_logger = logging.getLogger(__name__)
Scores = Mapping[str, Array]
"""What is said of each judged input, [M], by its name: more is better, but for the −log p behind `perplexity`."""
Of = Callable[[Array], Array]


@dataclass(frozen=True)
class Row:
    """A model, its placement, and what its answers are worth."""

    name: str
    placement: Placement
    model: ir.Model
    calibration: Mapping[str, Array]
    scores: Callable[[Path], Scores]


def subject_row(subject: Subject) -> Row:
    """By top-1, agreement with float32 and cosine to it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        ir.save(subject.model, path)
        reference = subject.features(answers(path, subject.inputs), subject.inputs)

    def scores(path: Path) -> Scores:
        features = subject.features(answers(path, subject.inputs), subject.inputs)
        found: dict[str, Array] = {}
        if subject.scores is not None:
            classes, expected = (subject.scores(x).argmax(axis=1) for x in (features, reference))
            if subject.labels is not None:
                known = subject.labels != UNKNOWN
                found["top-1, %"] = 100.0 * (classes == subject.labels)[known]
            found["same class, %"] = 100.0 * (classes == expected)
        x, y = features.astype(np.float64), reference.astype(np.float64)
        found["cosine"] = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        return found

    return Row(subject.name, "w8a8-linear", subject.model, subject.calibration, scores)


def language_row(placement: Placement) -> Row:
    """SmolLM2-135M by its perplexity: windows of text that it was not calibrated on."""
    language = measure_methods.smollm()
    name = f"{language.name}, {placement}"
    return Row(name, placement, language.model, language.calibration, partial(_nll, inputs=language.inputs))


def _nll(path: Path, inputs: Mapping[str, Array]) -> Scores:
    return {"perplexity": measure_methods.losses(path, inputs).mean(axis=1, dtype=np.float64)}


ROWS: Mapping[str, Callable[[], Row]] = {
    **{name: (lambda make=make: subject_row(make())) for name, make in SUBJECTS.items()},  # type: ignore[misc]
    "mobilenet-photos": lambda: subject_row(photos.agreement("mobilenet", photos_folder())),
    "efficientnet-photos": lambda: subject_row(photos.agreement("efficientnet", photos_folder())),
    "smollm-w8a8": lambda: language_row("w8a8-linear"),
    "smollm-w4": lambda: language_row("w4"),
}


def photos_folder() -> Path:
    """Where Debian's gcompris-qt-data lies."""
    return Path(os.environ.get("GPUSQ_PHOTOS", photos.RESOURCES))


def ours(row: Row, path: Path, method: str, improve: Sequence[str], *, float_head: bool = False) -> None:
    """By the product's surgery."""
    model = row.model.clone()
    for node in model.graph:
        if float_head and (node.name or "").startswith("lm_head"):
            node.metadata_props[KEPT_FLOAT] = "float: asked for"

    def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        return METHODS[method](model, names, row.calibration)

    target = Target(load_device("cpu"), "float32", row.placement, improve=tuple(improve))  # type: ignore[arg-type]
    surgery(model, target, measure, feed=Feed(row.calibration, BATCH, tell=_logger.info))
    _save(model, path)


def _save(model: ir.Model, path: Path) -> None:
    ir.save(model, path, external_data=f"{path.name}.data")


def column(name: str) -> Callable[[Row, Path], None]:
    """What makes the graph of a column."""
    shown, (name, float_head) = name, (name.removesuffix(_FLOAT_HEAD), name.endswith(_FLOAT_HEAD))
    method, _, improve = name.partition("+")
    if method not in METHODS or (improve and not set(improve.split(",")) <= set(IMPROVEMENTS)):
        raise argparse.ArgumentTypeError(f"no column {shown!r}")
    return partial(ours, method=method, improve=tuple(filter(None, improve.split(","))), float_head=float_head)


def interval(values: Array, of: Of) -> tuple[float, float, float]:
    """`of` the mean of values [M], and its 95 % interval."""
    low, high = np.quantile(of(values[_drawn(len(values))].mean(axis=1)), (0.025, 0.975))
    return float(of(values.mean())), float(low), float(high)


def difference(values: Array, other: Array, of: Of) -> tuple[float, float, float]:
    """How much more `of` the mean of values [M] is than that of others of the same inputs, and its 95 % interval."""
    drawn = _drawn(len(values))
    low, high = np.quantile(of(values[drawn].mean(axis=1)) - of(other[drawn].mean(axis=1)), (0.025, 0.975))
    return float(of(values.mean()) - of(other.mean())), float(low), float(high)


def _drawn(count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (_DRAWS, count))


_INT8 = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize
source, samples, target, batch, method = sys.argv[1:]
with np.load(samples) as archive:
    data = {name: archive[name] for name in archive.files}
shapes = ",".join(f"{name}:" + "x".join(map(str, (batch, *array.shape[1:]))) for name, array in data.items())
quantize(source, quantize_mode="int8", calibration_method=method, calibration_data=data, calibration_shapes=shapes,
         calibration_eps=["cpu"], output_path=target, use_external_data_format=True, high_precision_dtype="fp32")
"""
_INT4 = """
import sys
import numpy as np
import onnx
from modelopt.onnx.quantization.int4 import quantize
source, samples, target, batch, method = sys.argv[1:]
with np.load(samples) as archive:
    data = {name: archive[name] for name in archive.files}
count = len(next(iter(data.values())))
feeds = [{name: array[i : i + int(batch)] for name, array in data.items()} for i in range(0, count, int(batch))]
made = quantize(source, calibration_method=method, calibration_data_reader=feeds, calibration_eps=["cpu"],
                block_size=64)
onnx.save_model(made, target, save_as_external_data=True, location=target.rpartition("/")[2] + ".data")
"""


def by_modelopt(row: Row, path: Path, script: str, method: str) -> None:
    """Model Optimizer whole: our float32 file and the calibration samples go in, its graph comes out."""
    source, samples = path.with_suffix(".float.onnx"), path.with_suffix(".npz")
    _save(row.model, source)
    np.savez(samples, allow_pickle=False, **row.calibration)
    command = [os.environ[MODELOPT], "-c", script, str(source), str(samples), str(path), str(BATCH), method]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=path.parent)
    if done.returncode:
        raise RuntimeError(done.stderr)


def by_matmul_nbits(row: Row, path: Path) -> None:
    """onnxruntime's weights of 4 bits: MatMulNBits, symmetric, blocks of 64."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    source = path.with_suffix(".float.onnx")
    _save(row.model, source)
    quantizer: Any = MatMulNBitsQuantizer(onnx.load(source), block_size=64, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)


OTHERS: Mapping[str, Callable[[Row, Path], None]] = {
    "modelopt": partial(by_modelopt, script=_INT8, method="entropy"),
    "modelopt-max": partial(by_modelopt, script=_INT8, method="max"),
    "modelopt-rtn": partial(by_modelopt, script=_INT4, method="rtn_dq"),
    "modelopt-awq": partial(by_modelopt, script=_INT4, method="awq_clip"),
    "ort-rtn": by_matmul_nbits,
}


def measured(row: Row, names: Sequence[str]) -> Iterator[tuple[str, Scores, float]]:
    """Each column's name, its scores, and the seconds that it took to make."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder) / f"{len(list(Path(folder).iterdir()))}.onnx"
            start = time.perf_counter()
            try:
                (OTHERS[name] if name in OTHERS else column(name))(row, path)
            except RuntimeError as error:
                _logger.warning("%s, %s: %s", row.name, name, str(error)[-2000:])
                continue
            seconds = time.perf_counter() - start
            yield name, row.scores(path), seconds
            for made in Path(folder).iterdir():
                made.unlink()


@dataclass
class Told:
    """Writes a row's lines, and remembers the others' scores."""

    row: str
    others: list[Scores] = field(default_factory=list)

    def line(self, name: str, scores: Scores, seconds: float) -> str:
        """One line of the table, in Markdown."""
        said = []
        for kind, values in scores.items():
            of: Of = np.exp if kind == "perplexity" else np.asarray
            text = f"{kind} {_told(interval(values, of), signed=False)}"
            if self.others and name not in OTHERS:
                better = (min if kind == "perplexity" else max)((other[kind] for other in self.others), key=np.mean)
                text += f", Δ {_told(difference(values, better, of), signed=True)}"
            said.append(text)
        if name in OTHERS or name.startswith("ort-"):
            self.others.append(scores)
        return f"| {self.row} | {name} | {'; '.join(said)} | {seconds:.0f} s |"


def _told(found: tuple[float, float, float], *, signed: bool) -> str:
    digits = 4 if abs(found[0]) < _ABOUT_ONE else 2
    mean, low, high = (f"{value:{'+' if signed else ''}.{digits}f}" for value in found)
    return f"{mean} [{low}, {high}]"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--columns", nargs="+", help="the others first: they are what ours are compared with")
    asked = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    _logger.setLevel(logging.INFO)
    print("| row | column | what its answers are worth | made in |\n|---|---|---|---|")
    for name in asked.rows:
        row = ROWS[name]()
        columns = asked.columns or _COLUMNS["w4" if row.placement == "w4" else "w8a8-linear"]
        if MODELOPT not in os.environ:
            columns = [column for column in columns if not column.startswith("modelopt")]
        told = Told(row.name)
        for column_name, scores, seconds in measured(row, columns):
            print(told.line(column_name, scores, seconds), flush=True)


if __name__ == "__main__":
    main()
