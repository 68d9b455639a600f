"""Do the samples have the range that the model was trained on? Its first batch normalization remembers.

The first convolution's outputs y had mean μ_c and variance v_c in channel c during training. With samples x of the
right range, y = W · patch(x) + b has about the same, and with samples of another range it has not:

    d = median over c of  E[(y_c − μ_c)²] / v_c           about 1; 65,025 for levels 0–255 in place of 0–1

Patches are drawn at random places, so that no convolution is run. Where d is far from 1, the usual mistakes are undone
one by one, and the one that brings d back is named.
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
# MobileNetV2 and EfficientNet-Lite0: 1.1 to 1.2 on photos, 0.4 to 3.9 on objects before white; 8,000 and more for
# levels 0–255. Values 0–1 that were not normalised give 0.14 to 0.7, which can only be told where a cure helps.
_FAR, _NEAR = 8.0, 2.5
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
        mean: [O], less the convolution's bias.
        variance: [O].
    """

    input: str
    weight: Floats
    mean: Floats
    variance: Floats


def distance(layer: FirstLayer, x: Floats) -> float:
    """The median d over the channels, for samples x [N, C, H, W]."""
    _, _, height, width = layer.weight.shape
    random = np.random.default_rng(0)
    of = random.integers(0, len(x), _PATCHES)
    top, left = (random.integers(0, x.shape[axis] - size + 1, _PATCHES) for axis, size in ((2, height), (3, width)))
    patches = np.lib.stride_tricks.sliding_window_view(x, (height, width), (2, 3))[of, :, top, left]
    y = patches.reshape(_PATCHES, -1) @ layer.weight.reshape(len(layer.weight), -1).T
    of_channels = np.square(y - layer.mean).mean(axis=0) / (layer.variance + np.float32(1e-12))
    return float(np.median(of_channels))


def doubts(layer: FirstLayer, samples: Mapping[str, Rows]) -> tuple[str, ...]:
    """What speaks against the range of the samples, in one sentence with the cure; nothing where all is well."""
    rows = samples.get(layer.input)
    if rows is None or len(rows.shape) != 4 or any(map(np.less, rows.shape[2:], layer.weight.shape[2:])):
        return ()
    x = _some(rows)
    found = distance(layer, x)
    between = float(x.min()) >= 0 and float(x.max()) <= 1
    limit = float(np.log(_NEAR if between else _FAR))
    if _off(found) <= limit:
        return ()
    cures = {cure: _off(distance(layer, undo(x))) for cure, undo in _MISTAKES.items() if _applies(cure, x)}
    cure = min(cures, key=lambda text: cures[text]) if cures else ""
    times = f"{found:,.0f} times" if found > 1 else f"1/{1 / max(found, 1e-12):,.0f} of"
    told = (
        f"the first batch normalization was trained on other values: the variance before it is now {times} what it was"
    )
    if cures and cures[cure] <= limit:
        return (f"{told}; {cure}",)
    return () if _off(found) <= np.log(_FAR) else (f"{told}; check the samples' preprocessing",)


def _some(rows: Rows) -> Floats:
    """At most 32 samples, evenly over all of them."""
    index = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLES)).astype(np.intp))
    some: Array = rows[index]
    return some.astype(np.float32)


def _applies(cure: str, x: Floats) -> bool:
    """Means and deviations are known for three channels alone."""
    return x.shape[1] == 3 or not ("mean" in cure or "normalise" in cure)


def _off(found: float) -> float:
    return abs(float(np.log(max(found, 1e-12))))
