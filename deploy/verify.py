"""Is `model.onnx` still the student? Both answer the same samples; top-1, agreement and logits are compared.

The reference is the PyTorch student in float32, its linear inputs fake-quantized where it was trained so. The ONNX
model runs on onnxruntime's CPU provider, whatever device it is made for: this proves the numbers of the graph, not
those of a GPU's kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from calibration.samples import Samples
from deploy.manifest import Verification
from deploy.onnxruntime_api import open_session, runtime_version
from deploy.progress import Advance

BATCH = 100
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
        agreement=float(np.mean(reference.argmax(1) == logits.argmax(1))),
        max_abs_difference=float(np.abs(reference - logits).max()),
    )


def summary(found: Verification) -> str:
    """One line for the terminal."""
    text = f"{found.agreement:.2%} agreement on {found.count} samples, logits within {found.max_abs_difference:.2g}"
    if found.onnx_top1 is None or found.student_top1 is None:
        return f"{text}; no labels"
    return f"{text}; top-1 {found.onnx_top1:.1%} (student {found.student_top1:.1%})"


def _accuracy(logits: Array, samples: Samples) -> float | None:
    return None if samples.labels is None else float(np.mean(logits.argmax(1) == samples.labels))


def _batches(samples: Samples) -> Iterator[dict[str, Array]]:
    for start in range(0, len(samples), BATCH):
        yield {name: array[start : start + BATCH] for name, array in samples.inputs.items()}
