from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.rows import all_of
from calibration.samples import InputSpec, load_samples, random_samples
from profiles.errors import GpusqError

SPEC = InputSpec(shape=(1, 2, 2), dtype="float32", scale=1 / 255, mean=0.286, std=0.353)
IMAGE = {"image": SPEC}
TWO = {"left": SPEC, "right": SPEC}
FLOATS = np.arange(12, dtype=np.float32).reshape(3, 1, 2, 2)
PIXELS = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 1, 2, 2)


def saved(path: Path, **arrays: npt.ArrayLike) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_uint8_becomes_scaled_and_normalised(tmp_path: Path) -> None:
    samples = load_samples(saved(tmp_path / "s.npz", image=PIXELS), IMAGE)
    expected = (PIXELS / 255 - 0.286) / 0.353
    assert samples.inputs["image"].dtype == np.float32
    assert np.abs(all_of(samples.inputs["image"]) - expected).max() <= 1e-6


@given(
    pixels=hnp.arrays(np.uint8, (2, 1, 2, 2)),
    scale=st.floats(2.0**-10, 1, width=32),
    mean=st.floats(-1, 1, width=32),
    std=st.floats(0.125, 2, width=32),
)
def test_uint8_preprocessing_is_the_formula_in_float32(
    tmp_path_factory: pytest.TempPathFactory,
    pixels: npt.NDArray[np.uint8],
    scale: float,
    mean: float,
    std: float,
) -> None:
    path = saved(tmp_path_factory.getbasetemp() / "formula.npz", image=pixels)
    found = all_of(load_samples(path, {"image": InputSpec((1, 2, 2), "float32", scale, mean, std)}).inputs["image"])
    f32 = np.float32
    expected = [((f32(x) * f32(scale)) - f32(mean)) / f32(std) for x in pixels.ravel()]
    assert found.ravel().tolist() == [float(x) for x in expected]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_inputs_are_taken_as_they_are(tmp_path: Path, dtype: npt.DTypeLike) -> None:
    samples = load_samples(saved(tmp_path / "s.npz", image=FLOATS.astype(dtype)), IMAGE)
    assert samples.inputs["image"].dtype == np.float32
    assert np.array_equal(all_of(samples.inputs["image"]), FLOATS)


def test_labels_come_along(tmp_path: Path) -> None:
    samples = load_samples(saved(tmp_path / "s.npz", image=FLOATS, label=np.array([7, 8, 9], np.uint8)), IMAGE)
    assert samples.labels is not None
    assert samples.labels.dtype == np.int64
    assert samples.labels.tolist() == [7, 8, 9]
    assert (len(samples), samples.source) == (3, "s.npz")


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    saved(tmp_path / "b.npz", image=FLOATS + 1, label=[1, 1, 1])
    saved(tmp_path / "a.npz", image=FLOATS, label=[0, 0, 0])
    (tmp_path / "notes.txt").write_text("not read")
    samples = load_samples(tmp_path, IMAGE)
    assert np.array_equal(all_of(samples.inputs["image"]), np.concatenate([FLOATS, FLOATS + 1]))
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert samples.source == tmp_path.name


def test_labels_that_not_every_file_has_are_an_error(tmp_path: Path) -> None:
    saved(tmp_path / "a.npz", image=FLOATS, label=[0, 0, 0])
    saved(tmp_path / "b.npz", image=FLOATS)
    with pytest.raises(GpusqError, match=r"b\.npz has no labels, other files do") as caught:
        load_samples(tmp_path, IMAGE)
    assert caught.value.hint


def test_other_arrays_are_ignored(tmp_path: Path) -> None:
    assert load_samples(saved(tmp_path / "s.npz", image=FLOATS, names=["a"]), IMAGE).inputs.keys() == {"image"}


def test_the_hash_depends_on_the_content_and_not_on_the_name(tmp_path: Path) -> None:
    first = saved(tmp_path / "a.npz", image=FLOATS)
    (tmp_path / "b.npz").write_bytes(first.read_bytes())
    other = saved(tmp_path / "c.npz", image=FLOATS + 1)
    hashes = [load_samples(path, IMAGE).sha256 for path in (first, tmp_path / "b.npz", other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert len(hashes[0]) == 64


def test_random_samples_repeat_with_their_seed() -> None:
    first, again, other = random_samples(TWO, 4), random_samples(TWO, 4), random_samples(TWO, 4, seed=1)
    assert first.sha256 == again.sha256 != other.sha256
    assert {name: array.shape for name, array in first.inputs.items()} == {"left": (4, 1, 2, 2), "right": (4, 1, 2, 2)}
    assert first.inputs["left"].dtype == np.float32
    assert first.source == "4 random inputs (standard normal, seed 0)"
    assert (first.labels, len(first)) == (None, 4)


def test_inputs_of_random_samples_differ() -> None:
    samples = random_samples(TWO, 4)
    assert not np.array_equal(all_of(samples.inputs["left"]), all_of(samples.inputs["right"]))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"picture": FLOATS}, "has no array 'image' (it has picture)"),
        ({}, "has no array 'image' (it has nothing)"),
        ({"image": FLOATS[:, 0]}, "'image' is 3×2×2, the model takes N×1×2×2"),
        ({"image": FLOATS[0]}, "'image' is 1×2×2, the model takes N×1×2×2"),
        ({"image": FLOATS[:0]}, "'image' is 0×1×2×2, the model takes N×1×2×2"),
        ({"image": 1.0}, "'image' is a scalar, the model takes N×1×2×2"),
        ({"image": FLOATS.astype(np.int64)}, "'image' is int64"),
        ({"image": FLOATS * np.nan}, "'image' holds NaN or infinity"),
        ({"image": np.full_like(FLOATS, np.inf)}, "'image' holds NaN or infinity"),
        ({"image": np.full(3, None)}, "cannot be read as .npz"),
        ({"image": FLOATS, "label": [1, 2]}, "has 2 labels for 3 samples"),
        ({"image": FLOATS, "label": 1}, "has 1 labels for 3 samples"),
        ({"image": FLOATS, "label": [0.5, 1.0, 2.0]}, "'label' is float64"),
    ],
)
def test_an_array_that_does_not_fit_is_an_error(tmp_path: Path, arrays: dict[str, npt.ArrayLike], message: str) -> None:
    path = saved(tmp_path / "s.npz", **arrays)
    with pytest.raises(GpusqError) as caught:
        load_samples(path, IMAGE)
    assert caught.value.message.startswith(str(path))
    assert message in caught.value.message
    assert caught.value.hint


def test_inputs_of_different_length_are_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "s.npz", left=FLOATS, right=FLOATS[:2])
    with pytest.raises(GpusqError, match="its inputs differ in the number of samples") as caught:
        load_samples(path, TWO)
    assert caught.value.hint


@pytest.mark.parametrize("folder", [True, False], ids=["empty folder", "missing file"])
def test_nothing_there_is_an_error(tmp_path: Path, folder: bool) -> None:
    path = tmp_path if folder else tmp_path / "none.npz"
    with pytest.raises(GpusqError) as caught:
        load_samples(path, IMAGE)
    assert caught.value.message == f"no samples in {path}"
    assert "folder" in caught.value.hint


@pytest.mark.parametrize("name", ["text", "truncated"])
def test_a_file_that_is_no_npz_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    np.savez(tmp_path / "whole.npz", image=FLOATS)
    content = {
        "text": b"image",
        "truncated": (tmp_path / "whole.npz").read_bytes()[:-40],
    }
    path.write_bytes(content[name])
    with pytest.raises(GpusqError) as caught:
        load_samples(path, IMAGE)
    assert caught.value.message == f"{path} is no .npz file"
    assert "numpy.savez" in caught.value.hint


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_an_error(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "s.npz"
    save(path, image=np.random.default_rng(0).standard_normal((64, 1, 2, 2)))
    content = path.read_bytes()
    path.write_bytes(content[:300] + bytes(60) + content[360:])
    with pytest.raises(GpusqError, match=r"cannot be read as \.npz") as caught:
        load_samples(path, IMAGE)
    assert "numpy.savez" in caught.value.hint
