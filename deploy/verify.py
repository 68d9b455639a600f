"""Is `model.onnx` still the student? Both answer the same samples; top-1, agreement and logits are compared.

The reference is the PyTorch student in float32, its linear inputs fake-quantized where it was trained so. The ONNX
model runs on onnxruntime's CPU provider, whatever device it is made for: this proves the numbers of the graph, not
those of a GPU's kernels. That provider computes float16 operators in float32; a float16 graph is evaluated a second
time, on fewer samples, with every operator rounded to float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator

from calibration.samples import Samples
from deploy.manifest import Float16Check, Interval, Verification
from deploy.onnxruntime_api import open_session, runtime_version
from deploy.progress import Advance

BATCH = 100
FLOAT16_SAMPLES = 64
Array = npt.NDArray[np.float32]


def reference_logits(module: object, samples: Samples) -> Array:
    """Logits [N, classes] of a torch module."""
    import torch

    assert isinstance(module, torch.nn.Module)
    with torch.inference_mode():
        parts = [module(*(torch.from_numpy(array) for array in batch.values())) for batch in _batches(samples)]
    return np.asarray(torch.cat(parts).numpy())


def onnx_logits(model: Path, samples: Samples, progress: Advance = lambda share: None) -> Array:
    """Logits [N, classes] of an ONNX file on onnxruntime's CPU provider; `progress` is told the share that is done."""
    session = open_session(model)
    parts: list[Array] = []
    for batch in _batches(samples):
        parts.append(session.run(None, batch)[0])
        progress(min(1.0, len(parts) * BATCH / len(samples)))
    return np.concatenate(parts)


def verify(model: Path, reference: Array, samples: Samples, *, progress: Advance = lambda share: None) -> Verification:
    """Compare `model` with the `reference` logits [N, classes] of the same samples."""
    logits = onnx_logits(model, samples, progress)
    return Verification(
        samples=samples.source,
        samples_sha256=samples.sha256,
        count=len(samples),
        labelled=samples.labels is not None,
        runtime=f"onnxruntime {runtime_version()}, CPU",
        student_top1=_accuracy(reference, samples),
        onnx_top1=_accuracy(logits, samples),
        agreement=_agreement(reference, logits),
        max_abs_difference=float(np.abs(reference - logits).max()),
        drop=None if samples.labels is None else _drop(reference, logits, samples.labels),
        float16=_check_float16(model, reference, samples),
    )


def summary(found: Verification) -> str:
    """One line for the terminal."""
    same = round(found.agreement * found.count)
    text = f"same class on {same} of {found.count} samples, logits within {found.max_abs_difference:.2g}"
    if found.onnx_top1 is None or found.student_top1 is None:
        return f"{text}; no labels"
    return f"{text}; top-1 {100 * found.onnx_top1:.1f} % (student {100 * found.student_top1:.1f} %)"


def _drop(reference: Array, logits: Array, labels: npt.NDArray[np.int64]) -> Interval:
    """How much top-1 falls, with its exact 95 % interval.

    Only samples on which one of the two is right say anything. Given their number, those that the model lost are
    binomial (McNemar); their share has the Clopper-Pearson interval.
    """
    from scipy.stats import binomtest

    right, found = reference.argmax(1) == labels, logits.argmax(1) == labels
    lost, gained = int(np.sum(right & ~found)), int(np.sum(found & ~right))
    if lost + gained == 0:
        return Interval(value=0.0, low=0.0, high=0.0)
    share = binomtest(lost, lost + gained).proportion_ci(0.95, method="exact")
    low, high = ((lost + gained) * (2 * edge - 1) / len(labels) for edge in (share.low, share.high))
    return Interval(value=(lost - gained) / len(labels), low=low, high=high)


def _check_float16(model: Path, reference: Array, samples: Samples) -> Float16Check | None:
    """Evaluate a float16 graph operator by operator in float16, on some of the samples."""
    graph = onnx.load(model)
    if all(value.data_type != onnx.TensorProto.FLOAT16 for value in graph.graph.initializer):
        return None
    some = {name: array[:FLOAT16_SAMPLES] for name, array in samples.inputs.items()}
    with np.errstate(all="ignore"):
        found: Any = ReferenceEvaluator(graph).run(None, some)
    logits = np.asarray(found[0], np.float32)
    expected = reference[: len(logits)]
    finite = bool(np.isfinite(logits).all())
    return Float16Check(
        count=len(logits),
        finite=finite,
        agreement=_agreement(expected, logits),
        max_abs_difference=float(np.abs(expected - logits).max()) if finite else None,
    )


def _agreement(reference: Array, logits: Array) -> float:
    return float(np.mean(reference.argmax(1) == logits.argmax(1)))


def _accuracy(logits: Array, samples: Samples) -> float | None:
    return None if samples.labels is None else float(np.mean(logits.argmax(1) == samples.labels))


def _batches(samples: Samples) -> Iterator[dict[str, Array]]:
    for start in range(0, len(samples), BATCH):
        yield {name: array[start : start + BATCH] for name, array in samples.inputs.items()}
