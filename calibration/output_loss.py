"""How much of what a model answers is lost: one number, in points, whether there are labels or not.

| the samples, the first output | points lost |
|---|---|
| labels, logits [N, classes] | 100 · (top-1 of the float model − top-1) |
| anything else | 100 · (1 − cosine) |

The cosine is that of a sample's whole output with the float model's, the mean over samples; where the model takes an
`attention_mask` [N, T] and answers [N, T, …], what stands at padding is left out. So half a point is a cosine of 0.995.
Without labels, classes that change do not count: of 64 samples each is 1.6 points, and it may be a near tie.

`error` is the power of the difference as a share of the output's power: it has no steps, and for errors that are
independent of each other it adds up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_CLASSES = 2  # axes of logits: samples and classes


@dataclass(frozen=True)
class Loss:
    """What is lost: `drop` in points, and `error`, a share of the output's power."""

    drop: float
    error: float


@dataclass
class Tally:
    """Adds up, batch by batch."""

    count: int = 0
    labelled: bool = False
    lost: int = 0
    cosines: float = 0.0
    difference: float = 0.0
    power: float = 0.0

    def add(self, expected: Array, found: Array, labels: Array | None = None) -> None:
        """Compare outputs [n, …] with those of the float model; `labels` int [n]."""
        self.count += len(expected)
        if expected.ndim == _CLASSES and labels is not None:
            self.labelled = True
            right = [int((logits.argmax(axis=1) == labels).sum()) for logits in (expected, found)]
            self.lost += right[0] - right[1]
        x, y = (part.reshape(len(part), -1).astype(np.float64) for part in (expected, found))
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        same = (x == y).all(axis=1)
        cosines = np.divide((x * y).sum(axis=1), norms, out=np.zeros(len(x)), where=norms > 0)
        self.cosines += float(np.where(same, 1.0, np.minimum(cosines, 1.0)).sum())
        self.difference += float(np.square(y - x).sum())
        self.power += float(np.square(x).sum())

    @property
    def loss(self) -> Loss:
        """What was lost on all of them; infinite where an output is not finite."""
        error = self.difference / self.power if self.power else self.difference
        if not np.isfinite(error):
            return Loss(float("inf"), float("inf"))
        if self.labelled:
            return Loss(100 * self.lost / self.count, error)
        return Loss(100 * (1 - self.cosines / self.count), error)


def without_padding(output: Array, feed: Mapping[str, Array]) -> Array:
    """The output [N, T, …] with zeros where `attention_mask` [N, T] is 0; any other output as it is."""
    mask = feed.get("attention_mask")
    if mask is None or output.ndim <= mask.ndim or output.shape[: mask.ndim] != mask.shape:
        return output
    return np.asarray(output * (mask != 0).reshape(*mask.shape, *[1] * (output.ndim - mask.ndim)))
