from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from exporters.student_file import read_student
from exporters.torch_student import fake_quant_module
from students.fashion_vit import data
from students.fashion_vit.__main__ import main


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 300 training and 40 test images of noise, in Fashion-MNIST's layout."""
    monkeypatch.setattr(data, "VALIDATION_SIZE", 44)
    rng = np.random.default_rng(0)
    for part, count in (("train", 300), ("t10k", 40)):
        arrays = {"images-idx3": rng.integers(0, 256, (count, 28, 28)), "labels-idx1": np.arange(count) % 10}
        for kind, array in arrays.items():
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = gzip.compress(header + array.astype(np.uint8).tobytes())
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    return tmp_path


def test_train_writes_three_models_that_report_reads(dataset: Path) -> None:
    out = dataset / "run"
    threads = torch.get_num_threads()
    arguments = ["--seed", "3", "--threads", str(threads), "--epochs", "1", "1", "1"]
    trained = CliRunner().invoke(main, ["train", *arguments, "--out", str(out), "--dataset", str(dataset)])
    assert trained.exit_code == 0, trained.output
    assert sorted(path.stem for path in out.iterdir()) == ["sparse", "student", "teacher"]

    student = read_student(out / "student.safetensors")
    assert student.card["seed"] == 3
    assert len(student.input_scales) == len(student.weight_scales) == 26
    test = data.read_split("t10k", dataset)
    with torch.inference_mode():
        hits = fake_quant_module(student)(data.normalise(test.pixels)).argmax(1) == test.labels
    assert student.card["test_accuracy"] == int(hits.sum()) / 40
    assert not read_student(out / "sparse.safetensors").input_scales

    table = CliRunner().invoke(main, ["report", str(out)])
    assert table.exit_code == 0, table.output
    assert "| 3 |" in table.output


def test_sample_writes_the_first_images_of_each_set(dataset: Path) -> None:
    result = CliRunner().invoke(main, ["sample", "--out", str(dataset / "npz"), "--dataset", str(dataset)])
    assert result.exit_code == 0, result.output
    with np.load(dataset / "npz" / "train-256.npz") as file:
        assert (file["image"].shape, file["image"].dtype) == ((256, 1, 28, 28), np.uint8)
        assert file["label"].dtype == np.int64
        assert np.array_equal(file["image"], data.read_split("train", dataset).pixels[:256].numpy())
