from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.image_input import ModelFacts, SampleSource
from calibration.preprocessing import Preprocessing
from calibration.rows import all_of
from calibration.samples import InputSpec, Samples, SampleSpec, load_samples
from profiles.errors import GpusqError
from tests.calibration.test_preprocessing import photo_paths

SPECS = {"image": InputSpec((3, 8, 8), "float32")}
HOW = Preprocessing(resize=8, crop=8, mean=(0.5,), std=(0.25,))
FACTS = ModelFacts(HOW, "the model's config")
SIZE = (12, 9)


def painted(path: Path, mode: str = "RGB", colour: Any = (200, 100, 50), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    importlib.import_module("PIL.Image").new(mode, SIZE, colour).save(path, **options)
    return path


def loaded(folder: Path, **given: Any) -> Samples:
    return load_samples(SampleSource(str(folder), **given), SPECS, FACTS)


def test_images_below_the_folder_are_taken_by_name(tmp_path: Path) -> None:
    painted(tmp_path / "b" / "1.jpg")
    painted(tmp_path / "a" / "2.png", colour=(255, 255, 255))
    painted(tmp_path / ".hidden" / "3.png")
    (tmp_path / "notes.txt").write_text("no image")
    samples = loaded(tmp_path)
    assert [member.name for member in samples.members] == ["a/2.png", "b/1.jpg"]
    assert samples.inputs["image"].shape == (2, 3, 8, 8)
    assert np.all(all_of(samples.inputs["image"])[0] == np.float32(2))
    assert samples.preprocessing == HOW
    assert samples.labels is None
    assert any("sub-folders are not taken for labels" in note for note in samples.notes)


def test_the_content_counts_and_not_the_ending(tmp_path: Path) -> None:
    painted(tmp_path / "image.png").rename(tmp_path / "image.dat")
    assert len(loaded(tmp_path)) == 1


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_every_usual_form_is_read(tmp_path: Path, form: str) -> None:
    painted(tmp_path / "image", format=form)
    found = all_of(loaded(tmp_path).inputs["image"])[0, :, 4, 4]
    assert np.abs(found - (np.array([200, 100, 50]) / 255 - 0.5) / 0.25).max() <= 8 / 255 / 0.25  # JPEG loses some


def test_one_image_is_a_source_too(tmp_path: Path) -> None:
    samples = loaded(painted(tmp_path / "image.png"))
    assert len(samples) == 1
    assert "one sample is few to measure ranges on: give 128 to 512" in samples.notes


def test_photos_are_decoded_again_whenever_they_are_asked_for(tmp_path: Path) -> None:
    for number, path in enumerate(photo_paths()):
        (tmp_path / f"{number}.jpg").symlink_to(path)
    rows = loaded(tmp_path).inputs["image"]
    assert np.array_equal(rows[np.array([2, 0])], all_of(rows)[[2, 0]])


def test_a_choice_is_kept_by_its_hashes(tmp_path: Path) -> None:
    for level in range(10):
        painted(tmp_path / f"{level}.png", colour=(level, 0, 0))
    first, again, other = (loaded(tmp_path, count=4, seed=seed) for seed in (0, 0, 1))
    assert (len(first), first.available) == (4, 10)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.listing.count("\n") == 4


@pytest.mark.parametrize(
    ("mode", "colour", "words"),
    [
        ("L", 7, "1 of 1 images are grey: made RGB"),
        ("RGBA", (1, 2, 3, 4), "1 of 1 images are with an alpha channel: made RGB"),
        ("P", 3, "1 of 1 images are of mode P: made RGB"),
    ],
)
def test_other_modes_are_converted_and_told(tmp_path: Path, mode: str, colour: Any, words: str) -> None:
    painted(tmp_path / "image.png", mode, colour)
    samples = loaded(tmp_path)
    assert words in samples.notes
    assert all_of(samples.inputs["image"]).shape == (1, 3, 8, 8)


def test_colour_images_become_grey_for_a_grey_model(tmp_path: Path) -> None:
    painted(tmp_path / "image.png")
    specs = {"image": InputSpec((1, 8, 8), "float32", 1 / 255, 0.5, 0.5)}
    samples = load_samples(tmp_path, specs)
    grey = (200 * 299 + 100 * 587 + 50 * 114) / 1000
    assert np.abs(all_of(samples.inputs["image"]) - (grey / 255 - 0.5) / 0.5).max() <= 2 / 255
    assert "images become inputs by the student's file" in samples.notes


def test_channels_come_last_where_the_model_wants_it(tmp_path: Path) -> None:
    painted(tmp_path / "image.png")
    samples = load_samples(tmp_path, {"image": InputSpec((8, 8, 3), "float32")}, FACTS)
    assert all_of(samples.inputs["image"]).shape == (1, 8, 8, 3)


def test_a_size_that_varies_is_that_of_the_preprocessing(tmp_path: Path) -> None:
    painted(tmp_path / "image.png")
    samples = load_samples(tmp_path, {"image": SampleSpec((3, 1, 1), "float16", dynamic=(1, 2))}, FACTS)
    assert all_of(samples.inputs["image"]).shape == (1, 3, 8, 8)
    assert samples.inputs["image"].dtype == np.float16


def test_labels_come_from_a_list(tmp_path: Path) -> None:
    painted(tmp_path / "cat" / "1.png")
    painted(tmp_path / "dog" / "1.png")
    (tmp_path / "labels.csv").write_text("file,label\ndog/1.png,7\ncat/1.png,3\n")
    labels = loaded(tmp_path).labels
    assert labels is not None
    assert labels.tolist() == [3, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [("1.png,cat\n1.png,cat\n", "line 2: '1.png,cat' is no label"), ("2.png,1\n", "has no label for 1.png")],
)
def test_a_list_of_labels_that_does_not_do_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    painted(tmp_path / "1.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(GpusqError, match=message):
        loaded(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "a web page"])
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_damaged_image_is_an_error_that_names_it(tmp_path: Path, damage: str, ending: str) -> None:
    painted(tmp_path / f"1.{ending}")
    path = painted(tmp_path / f"2.{ending}")
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) * 2 // 3], "empty": b"", "a web page": b"<html>not found"}[damage])
    with pytest.raises(GpusqError, match=rf"2\.{ending} is no whole image") as caught:
        loaded(tmp_path)
    assert caught.value.hint


def test_a_damaged_image_is_an_error_where_ultralytics_looks_for_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = pytest.importorskip("ultralytics.utils.patches")
    monkeypatch.setattr("PIL.Image.open", patches.image_open)
    (tmp_path / "1.png").write_bytes(b"<html>not found")
    with pytest.raises(GpusqError, match=r"1\.png is no whole image: cannot identify image file"):
        loaded(tmp_path)


def test_more_than_eight_bits_are_refused(tmp_path: Path) -> None:
    painted(tmp_path / "depth.png", "I;16", 1000)
    with pytest.raises(GpusqError, match="more than 8 bits a pixel"):
        loaded(tmp_path)


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(GpusqError, match="no samples in"):
        loaded(tmp_path)


def test_images_and_arrays_in_one_folder_are_an_error(tmp_path: Path) -> None:
    painted(tmp_path / "1.png")
    np.savez(tmp_path / "2.npz", image=np.zeros((1, 3, 8, 8)))
    with pytest.raises(GpusqError, match=r"holds images \(1\.png\) and arrays \(2\.npz\)"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("specs", "facts", "message"),
    [
        (SPECS, ModelFacts(), "nothing tells how the images in"),
        (SPECS, ModelFacts(refused="the config asks for do_pad"), "the config asks for do_pad"),
        ({"a": InputSpec((4,), "float32")}, FACTS, "holds images, and the model takes a"),
        (SPECS, ModelFacts(Preprocessing(resize=8)), "gives every image another size"),
        (SPECS, ModelFacts(Preprocessing(resize=(9, 9))), "makes 3×9×9 of an image, and 'image' takes 3×8×8"),
    ],
)
def test_what_images_need_is_said(tmp_path: Path, specs: dict[str, InputSpec], facts: ModelFacts, message: str) -> None:
    painted(tmp_path / "1.png")
    with pytest.raises(GpusqError, match=message) as caught:
        load_samples(tmp_path, specs, facts)
    assert caught.value.hint
