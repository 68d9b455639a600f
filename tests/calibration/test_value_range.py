from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from calibration.preprocessing import Preprocessing
from calibration.value_range import doubtful_range

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8)).astype(np.float32)
NORMALISED = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("image", "how", "words"),
    [
        (PIXELS, None, "whole numbers up to 255, like pixels that were not scaled"),
        (PIXELS, NORMALISED, "look like pixels that were not scaled: store them as uint8"),
        (PIXELS / 255, NORMALISED, "look like pixels without mean and deviation"),
        (PIXELS / 50, NORMALISED, "the model's preprocessing gives -2.12 to 2.64; check how they were made"),
    ],
)
def test_a_doubtful_range_is_told(image: npt.NDArray[np.float32], how: Preprocessing | None, words: str) -> None:
    (told,) = doubtful_range({"image": image}, how)
    assert words in told


@pytest.mark.parametrize(
    ("image", "how"),
    [
        (PIXELS / 255, None),
        (PIXELS / 255, Preprocessing()),
        ((PIXELS / 255 - 0.45) / 0.225, NORMALISED),
        (PIXELS, Preprocessing(scale=1.0)),
        (PIXELS.astype(np.int64), NORMALISED),
        (PIXELS[:, :1, :1, 0], None),
        (np.zeros((2, 3, 0, 8), np.float32), None),
        (np.arange(64, dtype=np.float32).reshape(1, 4, 4, 4), None),
    ],
    ids=["scaled", "as the config says", "normalised", "a model of pixels", "integers", "no image", "empty", "a cache"],
)
def test_a_usual_range_is_not(image: npt.NDArray[np.generic], how: Preprocessing | None) -> None:
    assert list(doubtful_range({"image": image}, how)) == []
