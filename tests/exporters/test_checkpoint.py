from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from exporters.checkpoint import LoadOptions, load_student
from exporters.signature import Input
from exporters.student_file import StudentFile, write_student
from profiles.errors import GpusqError


class RunsCode:
    """A pickle of this touches a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


def with_header_length_0x80(path: Path, student: StudentFile) -> None:
    """Write `student` so that the file starts with 0x80, as a pickle does: it starts with the length of its header."""
    for padding in range(0, 256, 8):
        write_student(path, StudentFile(**{**vars(student), "card": {"padding": "x" * padding}}))
        if path.read_bytes()[0] == 0x80:
            return


def test_opens_a_student_whatever_the_file_is_called(student_file: StudentFile, tmp_path: Path) -> None:
    write_student(tmp_path / "student.pt", student_file)
    loaded = load_student(tmp_path / "student.pt")
    assert (loaded.model, loaded.kind) == (student_file.model, "gpusq student file")
    assert loaded.quantized == len(student_file.weight_scales)


def test_a_safetensors_file_may_begin_as_a_pickle_does(student_file: StudentFile, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    with_header_length_0x80(path, student_file)
    assert path.read_bytes()[0] == 0x80
    assert load_student(path).model == student_file.model


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, protocol: int) -> None:
    path, proof = tmp_path / "student.safetensors", tmp_path / "it ran"
    path.write_bytes(pickle.dumps(RunsCode(proof), protocol=protocol))
    with pytest.raises(GpusqError, match="nothing was run") as caught:
        load_student(path)
    assert caught.value.hint
    assert not proof.exists()


def test_a_whole_module_is_opened_only_where_its_code_is_trusted(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "net.pt")
    with pytest.raises(GpusqError, match=r"Net'.*; nothing was run") as caught:
        load_student(tmp_path / "net.pt")
    assert "--trust-code" in caught.value.hint
    options = LoadOptions(trust_code=True, inputs=(Input("x", (1, 8)),))
    student = load_student(tmp_path / "net.pt", options)
    assert student.model.endswith(".Net")
    assert student.parameters == 8 * 4 + 4


def test_a_trusted_module_must_be_told_its_inputs(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "net.pt")
    with pytest.raises(GpusqError, match=r"nothing tells what .*Net takes") as caught:
        load_student(tmp_path / "net.pt", LoadOptions(trust_code=True))
    assert "--input" in caught.value.hint


def test_an_onnx_file_is_itself(tmp_path: Path) -> None:
    text = """
        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x, int64[2,N] ids) => (float[N,4] y) { y = Relu(x) i = Cast<to=1>(ids) }
    """
    ir.save(ir.from_onnx_text(text), tmp_path / "net.bin")
    student = load_student(tmp_path / "net.bin")
    assert student.inputs == (Input("x", (1, 4), "float32", {0: "N"}), Input("ids", (2, 1), "int64", {1: "N"}))
    assert student.export().model.opset_imports[""] == 21


@pytest.mark.parametrize("options", [LoadOptions(model="timm:x"), LoadOptions(dynamic=("x:0",))])
def test_a_whole_model_takes_no_architecture_and_no_axes(tmp_path: Path, options: LoadOptions) -> None:
    text = '<ir_version: 10, opset_import: ["": 21]> g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }'
    ir.save(ir.from_onnx_text(text), tmp_path / "net.onnx")
    with pytest.raises(GpusqError, match="is a whole model"):
        load_student(tmp_path / "net.onnx", options)


def test_weights_need_an_architecture(tmp_path: Path) -> None:
    save_file({"fc.weight": np.zeros((2, 4), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(GpusqError, match="nothing says of which architecture") as caught:
        load_student(tmp_path / "other.safetensors")
    assert "--model" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a checkpoint", b"\x08\x00\x00\x00\x00\x00\x00\x00{"])
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "student.safetensors").write_bytes(content)
    with pytest.raises(GpusqError) as caught:
        load_student(tmp_path / "student.safetensors")
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match=r"no such file: .*nothing\.pt"):
        load_student(tmp_path / "nothing.pt")
