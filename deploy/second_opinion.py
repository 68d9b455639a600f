"""A second opinion on a bundle: its model and its engines answer the same inputs, and Polygraphy compares the answers.

The reference is `model.onnx` on onnxruntime, node by node, unoptimized. Each engine that this host can load is held
against it by Polygraphy's Comparator, element by element: |a − b| ≤ atol or |a − b| ≤ rtol·|b|, as in its
`SimpleCompareFunc`. Every comparison that fails leaves, in Polygraphy's own format,

    OUT/ENGINE.0/inputs.json     the inputs of that batch
    OUT/ENGINE.0/outputs.json    what the engine answered

and the command that shows it again, on any host with Polygraphy and onnxruntime:

    polygraphy run model.onnx --onnxrt --load-inputs inputs.json --load-outputs outputs.json --atol … --rtol …

Polygraphy opens its own session of onnxruntime, with that one's optimizations and, on a CPU without VNNI, its inexact
INT8 kernels; what fails there may differ a little from what failed here.
"""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from calibration.samples import Samples, SampleSource, load_samples, random_samples
from deploy.engine import Engine, OnnxRuntimeEngine, open_engine
from deploy.manifest import MODEL_FILE, Manifest, read_manifest
from deploy.progress import Progress
from deploy.text_table import text_table
from exporters.checkpoint import load_student
from exporters.student import sample_specs
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1
SAMPLES = 16
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Tolerance:
    """The largest difference between two elements, absolute or relative to the reference; one of the two is enough."""

    absolute: float = 1e-2
    relative: float = 1e-2


class Compared(Record):
    """One engine against the reference."""

    engine: str
    passed: int = Field(description="Batches without an element that differs too much.")
    batches: int
    max_abs_difference: float = Field(description="Over all outputs of all batches.")
    again: tuple[str, ...] = Field(description="The command for each batch that failed.")


class SecondOpinion(Record):
    """What `gpusq verify --polygraphy` found."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    bundle: str
    polygraphy: str
    samples: str
    atol: float
    rtol: float
    compared: tuple[Compared, ...]
    not_compared: dict[str, str] = Field(description="Engines that this host cannot load, and why.")

    @property
    def failed(self) -> bool:
        """Whether an engine differs too much."""
        return any(each.passed < each.batches for each in self.compared)

    def to_text(self) -> str:
        """For the terminal."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.bundle}: Polygraphy {self.polygraphy}, {self.samples}; atol {self.atol:g} or rtol {self.rtol:g}"
        rows = [
            (each.engine, f"{each.passed} of {each.batches}", f"{each.max_abs_difference:.3g}")
            for each in self.compared
        ]
        yield text_table([("engine", "batches that agree", "largest difference"), *rows])
        for name, why in self.not_compared.items():
            yield f"not compared: {name}: {why}"
        for each in self.compared:
            yield from (f"again: {command}" for command in each.again)


def second_opinion(
    bundle: Path,
    out: Path,
    *,
    data: SampleSource | None = None,
    tolerance: Tolerance | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> SecondOpinion:
    """Compare the engines of `bundle` with its model, and leave in `out` what shows each failure again.

    Args:
        bundle: the folder.
        out: the folder for inputs and outputs of what fails; made where something does.
        data: the samples; random inputs without it.
        tolerance: what is taken for the same.
        batch: how many samples an answer is for, where the model leaves that open.
        progress: is told what goes on.

    Raises:
        GpusqError: Polygraphy is not installed, or this host can load no engine of the bundle.
    """
    polygraphy, progress, tolerance = _polygraphy(), progress or Progress(), tolerance or Tolerance()
    manifest = read_manifest(bundle)
    engines, not_compared = _engines(bundle, manifest)
    if not engines:
        why = "; ".join(f"{name}: {reason}" for name, reason in not_compared.items())
        raise GpusqError(f"this host can load no engine of {bundle}: {why}", hint="run this on the device")
    samples, fixed = _samples(bundle / MODEL_FILE, data)
    feeds = list(_feeds(samples, fixed or batch))
    with progress.working("comparing"):
        reference = _Answers(MODEL_FILE, OnnxRuntimeEngine(bundle / MODEL_FILE, optimized=False), feeds)
        compared = tuple(
            _compare(reference, _Answers(name, engine, feeds), bundle, out, tolerance)
            for name, engine in engines.items()
        )
    return SecondOpinion(
        bundle=str(bundle),
        polygraphy=str(polygraphy.__version__),
        samples=samples.source,
        atol=tolerance.absolute,
        rtol=tolerance.relative,
        compared=compared,
        not_compared=not_compared,
    )


class _Answers:
    """An engine's answers to all batches."""

    def __init__(self, name: str, engine: Engine, feeds: Sequence[Arrays]) -> None:
        self.name, self.feeds = name, feeds
        self.outputs = [engine.infer(feed) for feed in feeds]
        engine.close()

    def as_results(self, index: int) -> Any:
        """The answer to one batch as Polygraphy keeps it."""
        results = importlib.import_module("polygraphy.comparator").RunResults()
        results.add([self.outputs[index]], runner_name=self.name)
        return results


def _compare(reference: _Answers, engine: _Answers, bundle: Path, out: Path, tolerance: Tolerance) -> Compared:
    failed = [index for index in range(len(engine.feeds)) if not _same(reference, engine, index, tolerance)]
    return Compared(
        engine=engine.name,
        passed=len(engine.feeds) - len(failed),
        batches=len(engine.feeds),
        max_abs_difference=max(
            _difference(one, two) for one, two in zip(reference.outputs, engine.outputs, strict=True)
        ),
        again=tuple(_keep(engine, index, bundle, out, tolerance) for index in failed),
    )


def _same(reference: _Answers, engine: _Answers, index: int, tolerance: Tolerance) -> bool:
    comparator = importlib.import_module("polygraphy.comparator")
    logger = importlib.import_module("polygraphy.logger").G_LOGGER
    results = reference.as_results(index)
    results.add([engine.outputs[index]], runner_name=engine.name)
    asked = {"atol": tolerance.absolute, "rtol": tolerance.relative}
    function = getattr(comparator, "SimpleCompareFunc", None) or comparator.CompareFunc.simple
    with logger.verbosity(logger.CRITICAL):
        return bool(comparator.Comparator.compare_accuracy(results, compare_func=function(**asked)))


def _keep(engine: _Answers, index: int, bundle: Path, out: Path, tolerance: Tolerance) -> str:
    """Write the inputs and outputs of a batch, and return the command that compares them again."""
    folder = out / f"{engine.name}.{index}"
    folder.mkdir(parents=True, exist_ok=True)
    save = importlib.import_module("polygraphy.json").save_json
    save([engine.feeds[index]], str(folder / "inputs.json"))
    engine.as_results(index).save(str(folder / "outputs.json"))
    return shlex.join(
        [
            *("polygraphy", "run", str(bundle / MODEL_FILE), "--onnxrt"),
            *("--load-inputs", str(folder / "inputs.json"), "--load-outputs", str(folder / "outputs.json")),
            *("--atol", f"{tolerance.absolute:g}", "--rtol", f"{tolerance.relative:g}"),
        ]
    )


def _difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> float:
    return max(float(np.abs(np.asarray(one[name], np.float64) - two[name]).max(initial=0)) for name in one)


def _engines(bundle: Path, manifest: Manifest) -> tuple[dict[str, Engine], dict[str, str]]:
    """The engines by file that this host can load, and why it cannot load the others."""
    opened = {entry.file: _opened(bundle, entry.runtime) for entry in manifest.engines}
    loaded = {file: engine for file, engine in opened.items() if not isinstance(engine, str)}
    return loaded, {file: why for file, why in opened.items() if isinstance(why, str)}


def _opened(bundle: Path, runtime: str) -> Engine | str:
    try:
        return open_engine(bundle, runtime)
    except GpusqError as error:
        return error.message


def _samples(model: Path, data: SampleSource | None) -> tuple[Samples, int | None]:
    """The samples, and the batch that the model asks for, where it is fixed."""
    student = load_student(model)
    specs = sample_specs(student)
    fixed = next((spec.shape[0] for spec in student.inputs if 0 not in spec.dynamic), None)
    return (random_samples(specs, SAMPLES) if data is None else load_samples(data, specs)), fixed


def _feeds(samples: Samples, batch: int) -> Iterator[Arrays]:
    """Whole batches; the last sample is repeated where there are not so many."""
    for start in range(0, len(samples), batch):
        rows = np.minimum(np.arange(start, start + batch), len(samples) - 1)
        yield {name: np.asarray(array[rows]) for name, array in samples.inputs.items()}


def _polygraphy() -> Any:
    try:
        return importlib.import_module("polygraphy")
    except ImportError:
        raise GpusqError(
            "the second opinion is Polygraphy's, which is not installed", hint="pip install polygraphy"
        ) from None
