from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from exporters.checkpoint import load_checkpoint, quantized_linears
from exporters.student_file import StudentFile, write_student
from profiles.errors import GpusqError


class RunsCode:
    """A pickle of this touches a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def with_header_length_0x80(path: Path, student: StudentFile) -> None:
    """Write `student` so that the file starts with 0x80, as a pickle does: it starts with the length of its header."""
    for padding in range(0, 256, 8):
        write_student(path, StudentFile(**{**vars(student), "card": {"padding": "x" * padding}}))
        if path.read_bytes()[0] == 0x80:
            return


def test_opens_a_student_whatever_the_file_is_called(student_file: StudentFile, tmp_path: Path) -> None:
    write_student(tmp_path / "student.pt", student_file)
    loaded = load_checkpoint(tmp_path / "student.pt")
    assert loaded.model == student_file.model
    assert loaded.tensors.keys() == student_file.tensors.keys()


def test_a_safetensors_file_may_begin_as_a_pickle_does(student_file: StudentFile, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    with_header_length_0x80(path, student_file)
    assert path.read_bytes()[0] == 0x80
    assert load_checkpoint(path).model == student_file.model


def test_quantized_linears_are_the_arrays_of_the_file(student_file: StudentFile) -> None:
    layers = quantized_linears(student_file)
    assert layers.keys() == student_file.weight_scales.keys()
    for module, layer in layers.items():
        assert layer.weight is student_file.tensors[f"{module}.weight"]
        assert layer.weight_scale is student_file.weight_scales[module]
        assert layer.input_scale is student_file.input_scales[module]


def test_a_float_student_has_no_quantized_linears(student_file: StudentFile) -> None:
    floats = {name: array for name, array in student_file.tensors.items() if array.dtype == np.float32}
    plain = StudentFile(student_file.model, {}, student_file.inputs, student_file.outputs, floats)
    assert quantized_linears(plain) == {}


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, protocol: int) -> None:
    path, proof = tmp_path / "student.safetensors", tmp_path / "it ran"
    path.write_bytes(pickle.dumps(RunsCode(proof), protocol=protocol))
    with pytest.raises(GpusqError, match="is a Python pickle: opening it can run any code") as caught:
        load_checkpoint(path)
    assert "write_student" in caught.value.hint
    assert not proof.exists()


def test_a_pickle_of_an_old_protocol_is_refused_as_no_safetensors_file(tmp_path: Path) -> None:
    path, proof = tmp_path / "student.pkl", tmp_path / "it ran"
    path.write_bytes(pickle.dumps(RunsCode(proof), protocol=0))
    with pytest.raises(GpusqError, match="not a whole safetensors file") as caught:
        load_checkpoint(path)
    assert caught.value.hint
    assert not proof.exists()


@pytest.mark.parametrize(("zipped", "words"), [(True, "a pickle inside a zip"), (False, "is a Python pickle")])
def test_a_torch_save_file_is_refused(tmp_path: Path, zipped: bool, words: str) -> None:
    path = tmp_path / "student.pth"
    torch.save({"fc.weight": torch.zeros(2, 4)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(GpusqError, match=words) as caught:
        load_checkpoint(path)
    assert "write_student" in caught.value.hint


def test_a_zip_without_a_pickle_is_refused_as_no_safetensors_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", image=np.zeros(3))
    with pytest.raises(GpusqError, match="not a whole safetensors file") as caught:
        load_checkpoint(tmp_path / "samples.npz")
    assert caught.value.hint


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match=r"is a folder$") as caught:
        load_checkpoint(tmp_path)
    assert caught.value.hint == "give the checkpoint file itself"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match=r"^no such file: .*nowhere\.safetensors$") as caught:
        load_checkpoint(tmp_path / "nowhere.safetensors")
    assert ".safetensors" in caught.value.hint


@pytest.mark.parametrize("keep", [0, 5, 9, 200, -1])
def test_a_truncated_file_is_damaged_and_not_a_pickle(student_file: StudentFile, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "student.safetensors"
    write_student(path, student_file)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(GpusqError, match=r"student\.safetensors.*not a whole safetensors file") as caught:
        load_checkpoint(path)
    assert caught.value.hint


def test_a_safetensors_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_file({"fc.weight": np.zeros((2, 4), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(GpusqError, match="expected 'gpusq-student'") as caught:
        load_checkpoint(tmp_path / "other.safetensors")
    assert "write_student" in caught.value.hint
