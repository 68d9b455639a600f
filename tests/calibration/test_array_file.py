from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from calibration.image_input import ModelFacts
from calibration.preprocessing import Preprocessing
from calibration.rows import all_of, batches
from calibration.samples import InputSpec, SampleSource, SampleSpec, load_samples
from profiles.errors import GpusqError

SPECS = {"x": InputSpec((2, 3), "float32")}
X = np.arange(24, dtype=np.float32).reshape(4, 2, 3)


def mapped_mib() -> float:
    """What of files is mapped into this process's memory and was read."""
    found = re.search(r"RssFile:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 1024


def test_a_single_array_is_that_of_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    assert np.array_equal(all_of(load_samples(tmp_path / "x.npy", SPECS).inputs["x"]), X)


def test_a_single_array_does_not_do_for_two_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(GpusqError, match="holds one array, and the model has 2 inputs"):
        load_samples(tmp_path / "x.npy", {**SPECS, "y": SPECS["x"]})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_safetensors(tmp_path: Path, dtype: npt.DTypeLike) -> None:
    save_file({"x": X.astype(dtype), "label": np.arange(4, dtype=np.int32)}, tmp_path / "calib")
    samples = load_samples(tmp_path / "calib", SPECS)
    assert samples.inputs["x"].dtype == np.float32
    assert np.array_equal(all_of(samples.inputs["x"]), X)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 3]


def test_a_damaged_safetensors_file_is_an_error(tmp_path: Path) -> None:
    save_file({"x": X}, tmp_path / "calib")
    content = (tmp_path / "calib").read_bytes()
    (tmp_path / "calib").write_bytes(content[:-8])
    with pytest.raises(GpusqError, match="cannot be read as safetensors"):
        load_samples(tmp_path / "calib", SPECS)


@pytest.mark.parametrize("form", ["npz", "npy", "safetensors"])
def test_arrays_stay_in_their_file_and_what_was_read_leaves_memory_again(tmp_path: Path, form: str) -> None:
    path, x = tmp_path / f"x.{form}", np.ones((1024, 4096), np.float32)
    if form == "safetensors":
        save_file({"x": x}, path)
    else:
        np.save(path, x) if form == "npy" else np.savez(path, x=x)
    before = mapped_mib()
    rows = load_samples(path, {"x": InputSpec((4096,), "float32")}).inputs["x"]
    assert all(np.array_equal(rows[index], x[index]) for index in batches(len(rows)))
    assert mapped_mib() - before < 4  # of 16


def test_fortran_order_and_compression_change_nothing(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(X))
    np.savez_compressed(tmp_path / "b.npz", x=X)
    first, second = (load_samples(tmp_path / name, SPECS) for name in ("a.npz", "b.npz"))
    assert np.array_equal(all_of(first.inputs["x"]), all_of(second.inputs["x"]))
    assert first.sha256 == second.sha256


def test_kinds_may_be_mixed_in_a_folder(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X)
    save_file({"x": X + 1}, tmp_path / "b.safetensors")
    samples = load_samples(SampleSource(str(tmp_path), count=5), SPECS)
    index = [int(name.partition("[")[2][:-1]) + 4 * name.startswith("b") for name in (m.name for m in samples.members)]
    assert np.array_equal(all_of(samples.inputs["x"]), np.concatenate([X, X + 1])[index])


def test_labels_go_with_the_chosen_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, label=np.arange(4))
    samples = load_samples(SampleSource(str(tmp_path / "a.npz"), count=2, seed=3), SPECS)
    assert samples.labels is not None
    assert np.array_equal(all_of(samples.inputs["x"]), X[samples.labels])


def test_an_axis_that_varies_takes_any_length(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X)
    assert len(load_samples(tmp_path / "a.npz", {"x": SampleSpec((2, 1), "float32", dynamic=(1,))})) == 4
    with pytest.raises(GpusqError, match="'x' is 4×2×3, the model takes N×3×\\?"):
        load_samples(tmp_path / "a.npz", {"x": SampleSpec((3, 1), "float32", dynamic=(1,))})


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_stored_pixels_become_what_the_models_config_says(tmp_path: Path, last: bool) -> None:
    how = Preprocessing(resize=4, crop=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    stored, shape = (pixels, (4, 4, 3)) if last else (pixels.transpose(0, 3, 1, 2), (3, 4, 4))
    np.savez(tmp_path / "a.npz", image=stored)
    found = load_samples(tmp_path / "a.npz", {"image": InputSpec(shape, "float32")}, ModelFacts(how, "its config"))
    expected = (pixels / 255 - np.array(how.mean)) / np.array(how.std)
    assert np.abs(all_of(found.inputs["image"]) - (expected if last else expected.transpose(0, 3, 1, 2))).max() <= 1e-6


@pytest.mark.parametrize(
    ("shape", "hint"),
    [((2, 4, 5, 3), "transpose them"), ((2, 1, 4, 5), "repeat the grey channel"), ((2, 3, 8, 8), "resize or reorder")],
)
def test_the_hint_says_how_the_shape_can_be_mended(tmp_path: Path, shape: tuple[int, ...], hint: str) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros(shape, np.float32))
    with pytest.raises(GpusqError) as caught:
        load_samples(tmp_path / "a.npz", {"image": InputSpec((3, 4, 5), "float32")})
    assert hint in caught.value.hint


@pytest.mark.parametrize("count", [0, -1])
def test_no_samples_are_none(tmp_path: Path, count: int) -> None:
    with pytest.raises(GpusqError, match="samples are none"):
        load_samples(SampleSource(str(tmp_path), count=count), SPECS)


def test_a_file_may_say_that_its_samples_are_synthetic(tmp_path: Path) -> None:
    specs = {"x": InputSpec((2,), "float32")}
    np.savez(tmp_path / "made.npz", x=np.zeros((40, 2), np.float32), synthetic=np.array(True))
    np.savez(tmp_path / "real.npz", x=np.zeros((40, 2), np.float32))
    said = [load_samples(tmp_path / name, specs).notes for name in ("made.npz", "real.npz")]
    assert ["the file says that its samples are synthetic" in notes for notes in said] == [True, False]
