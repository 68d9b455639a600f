"""Is `model.onnx` still the student? Both answer the same samples, and their first outputs are compared.

An output [N, classes] is taken for logits: top-1 and agreement are told as well.

The reference is the PyTorch student in float32, its linear inputs fake-quantized where it was trained so. The ONNX
model runs on onnxruntime's CPU provider, whatever device it is made for: this proves the numbers of the graph, not
those of a GPU's kernels. That provider has no bfloat16 kernels: such a graph is computed in float32, and what every
operator gives is rounded (`deploy.emulate_bfloat16`). NVFP4 is emulated too (`deploy.emulate_nvfp4`). It computes
float16 operators in float32; a float16 graph is evaluated a second time, on fewer samples, with every operator rounded
to float16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from calibration.feed import fit
from calibration.samples import Samples
from deploy.emulate_bfloat16 import emulate_bfloat16, holds_bfloat16
from deploy.emulate_nvfp4 import emulate_nvfp4, holds_nvfp4
from deploy.manifest import Float16Check, Interval, Verification
from deploy.onnxruntime_api import open_session, runtime_version
from deploy.progress import Advance

BATCH = 100
CLASSES = 2  # axes of logits: samples and classes
FLOAT16_SAMPLES = 64
Array = npt.NDArray[np.float32]
Predict = Callable[[Mapping[str, npt.NDArray[np.generic]]], tuple[npt.NDArray[np.generic], ...]]


def outputs(predict: Predict, samples: Samples, batch: int, progress: Advance = lambda share: None) -> Array:
    """The first output [N, …] of `predict`, told of in batches; `progress` is told the share that is done."""
    parts: list[Array] = []
    for start in range(0, len(samples), batch):
        count = min(batch, len(samples) - start)
        parts.append(np.asarray(predict(_batch(samples, start, batch))[0], np.float32)[:count])
        progress((start + count) / len(samples))
    return np.concatenate(parts)


def session_of(model: Path) -> Predict:
    """What an ONNX file answers on onnxruntime's CPU provider."""
    graph = ir.load(model)
    session = _emulated(model) if holds_bfloat16(graph) or holds_nvfp4(graph) else open_session(model)
    return lambda batch: tuple(session.run(None, fit(session.get_inputs(), batch)))


def _emulated(path: Path) -> Any:
    """A session for a graph whose types the provider lacks: it computes in float32 and rounds."""
    with tempfile.TemporaryDirectory() as folder:
        model = ir.load(path)
        if holds_nvfp4(model):
            emulate_nvfp4(model)
        if holds_bfloat16(model):
            emulate_bfloat16(model)
        ir.save(model, Path(folder) / "model.onnx", external_data="model.data")
        return open_session(Path(folder) / "model.onnx")


def verify(
    model: Path, reference: Array, samples: Samples, *, batch: int = BATCH, progress: Advance = lambda share: None
) -> Verification:
    """Compare `model` with the `reference` outputs [N, …] of the same samples, `batch` samples at a time."""
    logits = outputs(session_of(model), samples, batch, progress)
    return Verification(
        samples=samples.source,
        samples_sha256=samples.sha256,
        count=len(samples),
        labelled=samples.labels is not None,
        runtime=f"onnxruntime {runtime_version()}, CPU",
        student_top1=_accuracy(reference, samples),
        onnx_top1=_accuracy(logits, samples),
        agreement=_agreement(reference, logits),
        max_abs_difference=(difference := float(np.abs(reference - logits).max())),
        relative_difference=difference / (float(np.abs(reference).max()) or 1.0),
        drop=None if _unlabelled(reference, samples) else _drop(reference, logits, samples),
        float16=_check_float16(model, reference, samples, batch),
    )


def summary(found: Verification) -> str:
    """One line for the terminal."""
    if found.agreement is None:
        return f"outputs within {found.max_abs_difference:.2g} on {found.count} samples"
    same = round(found.agreement * found.count)
    text = f"same class on {same} of {found.count} samples, logits within {found.max_abs_difference:.2g}"
    if found.onnx_top1 is None or found.student_top1 is None:
        return f"{text}; no labels"
    return f"{text}; top-1 {100 * found.onnx_top1:.1f} % (student {100 * found.student_top1:.1f} %)"


def _unlabelled(logits: Array, samples: Samples) -> bool:
    return samples.labels is None or logits.ndim != CLASSES


def _drop(reference: Array, logits: Array, samples: Samples) -> Interval:
    """How much top-1 falls, with its exact 95 % interval.

    Only samples on which one of the two is right say anything. Given their number, those that the model lost are
    binomial (McNemar); their share has the Clopper-Pearson interval.
    """
    from scipy.stats import binomtest

    labels = samples.labels
    assert labels is not None
    right, found = reference.argmax(1) == labels, logits.argmax(1) == labels
    lost, gained = int(np.sum(right & ~found)), int(np.sum(found & ~right))
    if lost + gained == 0:
        return Interval(value=0.0, low=0.0, high=0.0)
    share = binomtest(lost, lost + gained).proportion_ci(0.95, method="exact")
    low, high = ((lost + gained) * (2 * edge - 1) / len(labels) for edge in (share.low, share.high))
    return Interval(value=(lost - gained) / len(labels), low=low, high=high)


def _check_float16(model: Path, reference: Array, samples: Samples, batch: int) -> Float16Check | None:
    """Evaluate a float16 graph operator by operator in float16, on some of the samples."""
    graph = _as_onnx(model)
    if all(value.data_type != onnx.TensorProto.FLOAT16 for value in graph.graph.initializer):
        return None
    some = _batch(samples, 0, batch if batch < BATCH else min(FLOAT16_SAMPLES, len(samples)))
    float16 = [
        value.name for value in graph.graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    ]
    some |= {name: some[name].astype(np.float16) for name in float16}
    with np.errstate(all="ignore"):
        found: Any = ReferenceEvaluator(graph).run(None, some)
    logits = np.asarray(found[0], np.float32)[: len(reference)]
    expected = reference[: len(logits)]
    finite = bool(np.isfinite(logits).all())
    return Float16Check(
        count=len(logits),
        finite=finite,
        agreement=_agreement(expected, logits),
        max_abs_difference=float(np.abs(expected - logits).max()) if finite else None,
    )


def _as_onnx(path: Path) -> onnx.ModelProto:
    model = ir.load(path)
    if holds_nvfp4(model):
        emulate_nvfp4(model)
        return ir.to_proto(model)
    return onnx.load(path)


def _agreement(reference: Array, logits: Array) -> float | None:
    return float(np.mean(reference.argmax(1) == logits.argmax(1))) if logits.ndim == CLASSES else None


def _accuracy(logits: Array, samples: Samples) -> float | None:
    return None if _unlabelled(logits, samples) else float(np.mean(logits.argmax(1) == samples.labels))


def _batch(samples: Samples, start: int, size: int) -> dict[str, npt.NDArray[np.generic]]:
    """`size` samples from `start` on; the last one is repeated where there are not so many."""
    rows = np.minimum(np.arange(start, start + size), len(samples) - 1)
    return {name: array[rows] for name, array in samples.inputs.items()}
