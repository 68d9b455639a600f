from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from calibration.first_layer import FirstLayer, doubts, spread
from calibration.preprocessing import Preprocessing
from tests.calibration.test_preprocessing import ours, photos

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAINED_ON = {
    "normalised": Preprocessing(resize=(96, 96), mean=MEAN, std=STD),
    "0–1": Preprocessing(resize=(96, 96)),
    "0–255": Preprocessing(resize=(96, 96), scale=1.0),
    "−1–1": Preprocessing(resize=(96, 96), mean=(0.5,), std=(0.5,)),
}


def images(how: Preprocessing) -> npt.NDArray[np.float32]:
    return np.stack([ours(how, photo) for photo in photos()])


def trained(how: Preprocessing, channels: int = 3) -> FirstLayer:
    """What a batch normalization would have learned on the photos, behind random filters."""
    weight = np.random.default_rng(0).standard_normal((16, channels, 3, 3), np.float32)
    patches = np.lib.stride_tricks.sliding_window_view(images(how)[:, :channels], (3, 3), (2, 3)).transpose(
        0, 2, 3, 1, 4, 5
    )
    outputs = patches.reshape(-1, 9 * channels) @ weight.reshape(16, -1).T
    return FirstLayer("image", weight, outputs.var(axis=0))


@pytest.mark.parametrize("how", TRAINED_ON)
def test_the_variance_is_kept_on_what_was_trained_on(how: str) -> None:
    layer = trained(TRAINED_ON[how])
    assert spread(layer, images(TRAINED_ON[how])) == pytest.approx(1, abs=0.1)  # 4096 of 26,508 patches
    assert doubts(layer, {"image": images(TRAINED_ON[how])}) == ()


@pytest.mark.parametrize(
    ("was", "given", "cure"),
    [
        ("0–1", "0–255", "divide the samples by 255"),
        ("normalised", "0–255", "divide the samples by 255, then take away the mean and divide by the deviation"),
        ("−1–1", "0–255", "divide the samples by 127.5 and take away 1"),
        ("normalised", "0–1", "take away the mean and divide by the deviation"),
        ("0–255", "0–1", "multiply the samples by 255"),
        ("0–255", "normalised", "do not normalise the samples, leave them between 0 and 255"),
    ],
)
def test_the_cure_is_named(was: str, given: str, cure: str) -> None:
    (told,) = doubts(trained(TRAINED_ON[was]), {"image": images(TRAINED_ON[given])})
    assert told.endswith(f": {cure}")


def test_what_no_usual_mistake_explains_is_told_all_the_same() -> None:
    layer = trained(TRAINED_ON["normalised"])
    (told,) = doubts(layer, {"image": images(TRAINED_ON["normalised"]) * np.float32(1e6)})
    assert told.endswith("check the preprocessing of the samples")


def test_other_inputs_and_small_images_are_left_alone() -> None:
    layer = trained(TRAINED_ON["0–1"])
    assert doubts(layer, {"other": images(TRAINED_ON["0–255"])}) == ()
    assert doubts(layer, {"image": np.zeros((1, 3, 2, 2), np.float32)}) == ()


def test_a_grey_model_knows_no_means() -> None:
    grey = images(TRAINED_ON["0–1"])[:, :1]
    layer = trained(TRAINED_ON["0–1"], channels=1)
    (told,) = doubts(layer, {"image": grey * 255})
    assert told.endswith("divide the samples by 255")
