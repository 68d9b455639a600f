"""Against the libraries that the models were trained with, on real photos."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from calibration.preprocessing import Preprocessing
from calibration.preprocessor_config import from_timm, read_preprocessing
from profiles.errors import GpusqError

# float32 arithmetic in another order; one grey level is 0.017 after normalization
ROUNDING = 1e-5
# torchvision's own resize of uint8 tensors, which transformers' default processors use, rounds otherwise than Pillow
LEVELS = 2


def photo_paths() -> list[Path]:
    """Three photos that come with packages under test: portrait, landscape, and one of 512 × 600."""
    places = (("ultralytics", "assets/bus.jpg"), ("ultralytics", "assets/zidane.jpg"))
    found = []
    for package, file in (*places, ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg")):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        found.append(Path(spec.origin).parent / file)
    return found


def photos() -> list[Any]:
    images = importlib.import_module("PIL.Image")
    found = []
    for path in photo_paths():
        with images.open(path) as image:
            found.append(image.convert("RGB"))
    return found


def ours(how: Preprocessing, image: Any) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = how(how.pixels(image)[None])[0]
    return found


@pytest.mark.parametrize(
    "config",
    [
        {"crop_pct": 0.9, "interpolation": "bicubic"},
        {"crop_pct": 0.875, "interpolation": "bilinear", "crop_mode": "center"},
        {"crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"},
        {"crop_pct": 0.95, "interpolation": "bilinear", "crop_mode": "border"},
        {"crop_pct": 0.9, "interpolation": "bicubic", "size": (192, 256)},
    ],
    ids=["deit", "resnet", "squash", "border", "not square"],
)
def test_timm(config: dict[str, Any]) -> None:
    data = importlib.import_module("timm.data")
    size = config.pop("size", (224, 224))
    stored = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "input_size": (3, *size), **config}
    theirs = data.create_transform(**stored)
    for image in photos():
        found = ours(from_timm(stored, size), image)
        assert found.shape == (3, *size)
        assert np.abs(found - theirs(image.convert("RGB")).numpy()).max() <= ROUNDING


def test_torchvision() -> None:
    models = importlib.import_module("torchvision.models")
    theirs = models.ResNet50_Weights.IMAGENET1K_V2.transforms()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    how = Preprocessing(resize=232, crop=224, interpolation="bilinear", mean=mean, std=std)
    for image in photos():
        assert np.abs(ours(how, image) - theirs(image.convert("RGB")).numpy()).max() <= ROUNDING


PROCESSORS = ("ViT", "CLIP", "ConvNext", "MobileViT", "EfficientNet", "Siglip", "Beit", "Bit")


@pytest.mark.parametrize("name", PROCESSORS)
def test_transformers(name: str, tmp_path: Path) -> None:
    transformers = importlib.import_module("transformers")
    processor = getattr(transformers, f"{name}ImageProcessorPil")()
    processor.save_pretrained(tmp_path)
    how = read_preprocessing(tmp_path / "preprocessor_config.json", (224, 224))
    for image in photos():
        theirs = processor(image.convert("RGB"), return_tensors="np")["pixel_values"][0]
        assert np.abs(ours(how, image) - theirs).max() <= ROUNDING


@pytest.mark.parametrize("keywords", [{"size": {"shortest_edge": 224}}, {"size": {"shortest_edge": 384}}])
def test_convnext_crops_small_and_stretches_large_images(keywords: dict[str, Any], tmp_path: Path) -> None:
    transformers = importlib.import_module("transformers")
    processor = transformers.ConvNextImageProcessorPil(**keywords)
    processor.save_pretrained(tmp_path)
    how = read_preprocessing(tmp_path / "preprocessor_config.json", (224, 224))
    theirs = processor(photos()[0].convert("RGB"), return_tensors="np")["pixel_values"][0]
    assert np.abs(ours(how, photos()[0]) - theirs).max() <= ROUNDING


def test_torchvision_processors_of_transformers_round_otherwise(tmp_path: Path) -> None:
    transformers = importlib.import_module("transformers")
    processor = transformers.CLIPImageProcessor()
    processor.save_pretrained(tmp_path)
    how = read_preprocessing(tmp_path / "preprocessor_config.json", (224, 224))
    level = max(how.scale / deviation for deviation in how.std)
    for image in photos():
        theirs = processor(image.convert("RGB"), return_tensors="np")["pixel_values"][0]
        assert np.abs(ours(how, image) - theirs).max() <= LEVELS * level


@pytest.mark.parametrize(
    ("stored", "resize", "crop"),
    [
        ({"do_resize": True, "size": 224}, (224, 224), None),
        ({"do_resize": True, "size": 256, "do_center_crop": True, "crop_size": 224}, 256, (224, 224)),
        ({"do_resize": False, "size": 224, "do_center_crop": True, "crop_size": 224}, None, (224, 224)),
    ],
    ids=["a square", "the shorter side", "no resizing"],
)
def test_bare_numbers_of_older_versions(stored: dict[str, Any], resize: Any, crop: Any, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(stored))
    how = read_preprocessing(tmp_path / "p.json", None)
    assert (how.resize, how.crop) == (resize, crop)


def test_a_step_that_is_not_known_is_refused(tmp_path: Path) -> None:
    transformers = importlib.import_module("transformers")
    transformers.DetrImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(GpusqError, match="asks for do_pad, which is not done here") as caught:
        read_preprocessing(tmp_path / "preprocessor_config.json", None)
    assert "--preprocessing" in caught.value.hint


TOML = """
resize = [4, 4]
fit = "inside"
crop = 4
interpolation = "nearest"
scale = 1.0
layout = "NHWC"
colours = "BGR"
fill = [1, 2, 3]
"""


def test_a_file_of_the_user(tmp_path: Path) -> None:
    """A red bar of 2 × 4 in a square of 4 × 4, with a border above and below, channels last and blue first."""
    images = importlib.import_module("PIL.Image")
    (tmp_path / "own.toml").write_text(TOML)
    how = read_preprocessing(tmp_path / "own.toml", None)
    found = ours(how, images.new("RGB", (8, 4), (200, 10, 20)))
    assert found.shape == (4, 4, 3)
    assert found[0, 0].tolist() == [3, 2, 1]
    assert found[1, 0].tolist() == found[2, 3].tolist() == [20, 10, 200]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sharpen = true", "sharpen: extra inputs are not permitted"),
        ("mean = [0.5, 0.5]", "mean has 2 numbers for 3 channels"),
        ("resize = 0", "resize"),
        ("resize =", "cannot be read as TOML or JSON"),
        ('{"do_resize": ', "cannot be read as TOML or JSON"),
    ],
)
def test_a_file_that_does_not_do_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(GpusqError) as caught:
        read_preprocessing(tmp_path / "own.toml", None)
    assert message in caught.value.message
    assert "own.toml" in caught.value.message
    assert caught.value.hint


def test_bounds_are_those_of_black_and_white() -> None:
    how = Preprocessing(mean=(0.5, 0.4, 0.5), std=(0.5, 0.2, 0.5))
    assert how.bounds() == pytest.approx((-2.0, 3.0))
