"""Do the samples have the range that the model was trained on? Its first batch normalization remembers.

The first convolution's outputs y had variance v_c in channel c during training. With samples x of the right range,
y = W · patch(x) has about the same, and with samples of another range it has not:

    r = median over c of  var(y_c) / v_c           about 1; 65,025 for levels 0–255 in place of 0–1

Patches are drawn at random places, so that no convolution is run. Where r is far from 1, the usual mistakes are undone
one by one, and the one that brings r back is named. Means are no help: small values lie as near to them as real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.rows import Array, Rows

Floats = npt.NDArray[np.float32]
_SAMPLES = 32
_PATCHES = 4096
_LEAST = 1e-12
# MobileNetV2 and EfficientNet-Lite0: 0.9 to 1.0 on photos, 0.38 to 0.94 on objects before white; 0.04 to 0.05 for
# values 0–1 in place of normalised ones, 2,700 and more for levels 0–255.
_FAR = 5.0
_MEAN: Floats = np.array((0.485, 0.456, 0.406), np.float32).reshape(3, 1, 1)  # ImageNet's
_STD: Floats = np.array((0.229, 0.224, 0.225), np.float32).reshape(3, 1, 1)

_MISTAKES: Mapping[str, Callable[[Floats], Array]] = {
    "divide the samples by 255": lambda x: x / np.float32(255),
    "divide the samples by 255, then take away the mean and divide by the deviation": lambda x: (
        (x / np.float32(255) - _MEAN) / _STD
    ),
    "divide the samples by 127.5 and take away 1": lambda x: x / np.float32(127.5) - np.float32(1),
    "take away the mean and divide by the deviation": lambda x: (x - _MEAN) / _STD,
    "multiply the samples by 2 and take away 1": lambda x: 2 * x - 1,
    "multiply the samples by 255": lambda x: x * 255,
    "do not normalise the samples, leave them between 0 and 1": lambda x: x * _STD + _MEAN,
    "do not normalise the samples, leave them between 0 and 255": lambda x: (x * _STD + _MEAN) * 255,
}


@dataclass(frozen=True)
class FirstLayer:
    """A convolution on an input, and the statistics of the batch normalization behind it.

    Attributes:
        input: the name of the input [N, C, H, W].
        weight: [O, C, h, w].
        variance: [O].
    """

    input: str
    weight: Floats
    variance: Floats


def spread(layer: FirstLayer, x: Floats) -> float:
    """The median r over the channels, for samples x [N, C, H, W]."""
    _, _, height, width = layer.weight.shape
    random = np.random.default_rng(0)
    of = random.integers(0, len(x), _PATCHES)
    top, left = (random.integers(0, x.shape[axis] - size + 1, _PATCHES) for axis, size in ((2, height), (3, width)))
    patches = np.lib.stride_tricks.sliding_window_view(x, (height, width), (2, 3))[of, :, top, left]
    y = patches.reshape(_PATCHES, -1) @ layer.weight.reshape(len(layer.weight), -1).T
    return float(np.median(y.var(axis=0) / (layer.variance + np.float32(_LEAST))))


def doubts(layer: FirstLayer, samples: Mapping[str, Rows]) -> tuple[str, ...]:
    """What speaks against the range of the samples, in one sentence with the cure; nothing where all is well."""
    rows = samples.get(layer.input)
    if rows is None or len(rows.shape) != 4 or any(map(np.less, rows.shape[2:], layer.weight.shape[2:])):
        return ()
    x = _some(rows)
    found = spread(layer, x)
    if _off(found) <= np.log(_FAR):
        return ()
    cures = {cure: _off(spread(layer, undo(x))) for cure, undo in _MISTAKES.items() if _applies(cure, x)}
    cure = min(cures, key=lambda text: cures[text])
    times = f"{found:,.0f} times" if found > 1 else f"1/{1 / max(found, _LEAST):,.0f} of"
    told = f"before the first batch normalization the variance is {times} what it was in training"
    return (f"{told}: {cure if cures[cure] <= np.log(_FAR) else 'check the preprocessing of the samples'}",)


def _some(rows: Rows) -> Floats:
    """At most 32 samples, evenly over all of them."""
    index = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLES)).astype(np.intp))
    some: Array = rows[index]
    return some.astype(np.float32)


def _applies(cure: str, x: Floats) -> bool:
    """Means and deviations are known for three channels alone."""
    return x.shape[1] == 3 or not ("mean" in cure or "normalise" in cure)


def _off(found: float) -> float:
    return abs(float(np.log(max(found, _LEAST))))
