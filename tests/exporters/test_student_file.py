from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from calibration.samples import InputSpec
from exporters.student_file import StudentFile, read_student, write_student
from profiles.errors import GpusqError


@pytest.fixture
def student() -> StudentFile:
    rng = np.random.default_rng(0)
    return StudentFile(
        model="students.fashion_vit.model:fashion_vit",
        config={"width": 64},
        inputs={"image": InputSpec(shape=(1, 28, 28), dtype="float32", scale=1 / 255, mean=0.286, std=0.353)},
        outputs=("logits",),
        card={"seed": 0, "test_accuracy": 0.9123456789012345},
        tensors={
            "fc.weight": rng.integers(-127, 128, (3, 8)).astype(np.int8),
            "fc.bias": rng.standard_normal(3).astype(np.float32),
            "norm.weight": rng.standard_normal(8).astype(np.float16),
        },
        weight_scales={"fc": rng.uniform(1e-4, 1e-2, 3).astype(np.float32)},
        input_scales={"fc": np.array(0.0123, np.float32)},
    )


def test_round_trip_is_bit_exact(student: StudentFile, tmp_path: Path) -> None:
    write_student(tmp_path / "s.safetensors", student)
    back = read_student(tmp_path / "s.safetensors")
    for kind in ("tensors", "weight_scales", "input_scales"):
        written, found = getattr(student, kind), getattr(back, kind)
        assert written.keys() == found.keys()
        for name, array in written.items():
            assert (array.dtype, array.shape, array.tobytes()) == (
                found[name].dtype,
                found[name].shape,
                found[name].tobytes(),
            )
    assert (back.model, back.config, back.inputs, back.outputs, back.card) == (
        student.model,
        student.config,
        student.inputs,
        student.outputs,
        student.card,
    )


def test_writing_replaces_the_file_and_leaves_nothing_else(student: StudentFile, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"old")
    write_student(path, student)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert read_student(path).config == {"width": 64}


def test_writer_keeps_the_old_file_when_the_student_is_unsound(student: StudentFile, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(GpusqError):
        write_student(path, replace(student, input_scales={}))
    assert path.read_bytes() == b"old"


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match=r"no student file .*nowhere") as caught:
        read_student(tmp_path / "nowhere.safetensors")
    assert caught.value.hint


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file_is_refused(student: StudentFile, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "s.safetensors"
    write_student(path, student)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(GpusqError, match="not a whole safetensors file"):
        read_student(path)


def test_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    path.write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(GpusqError, match="not a whole safetensors file"):
        read_student(path)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def refusal(student: StudentFile, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> str:
    """The message for the file of `student` after `change` of its tensors and metadata; it always has a hint."""
    path = tmp_path / "s.safetensors"
    write_student(path, student)
    rewrite(path, change)
    with pytest.raises(GpusqError) as caught:
        read_student(path)
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "onnx", "format is 'onnx'"),
        ("format_version", "2", "format_version 2 is newer than 1"),
        ("format_version", "one", "format_version 'one' is no version"),
        ("config", "{", "metadata key 'config' is not JSON"),
        ("config", "[]", "metadata key 'config' is not a JSON dict"),
        ("outputs", "{}", "metadata key 'outputs' is not a JSON list"),
        ("inputs", '{"image": {"shape": [1]}}', "'inputs' does not describe its inputs"),
        ("inputs", '{"image": 3}', "'inputs' does not describe its inputs"),
    ],
)
def test_wrong_metadata_is_named(student: StudentFile, tmp_path: Path, key: str, value: str, message: str) -> None:
    assert message in refusal(student, tmp_path, lambda _, metadata: metadata.update({key: value}))


def test_missing_metadata_is_named(student: StudentFile, tmp_path: Path) -> None:
    assert "'model' is missing" in refusal(student, tmp_path, lambda _, metadata: metadata.pop("model"))


@pytest.mark.parametrize("suffix", ["weight_scale", "input_scale"])
def test_quantized_weight_without_a_scale_is_named(student: StudentFile, tmp_path: Path, suffix: str) -> None:
    message = refusal(student, tmp_path, lambda tensors, _: tensors.pop(f"fc.{suffix}"))
    assert "'fc.weight' is int8" in message
    assert f"'fc.{suffix}' is missing" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fc.weight_scale", np.ones(2, np.float32)),
        ("fc.weight_scale", np.ones((3, 1), np.float32)),
        ("fc.weight_scale", np.ones(3, np.float16)),
        ("fc.input_scale", np.ones(1, np.float32)),
    ],
)
def test_scale_of_the_wrong_shape_or_dtype_is_named(
    student: StudentFile, tmp_path: Path, name: str, value: np.ndarray[Any, Any]
) -> None:
    message = refusal(student, tmp_path, lambda tensors, _: tensors.update({name: value}))
    assert f"{name!r} is {value.dtype.name} {list(value.shape)}, expected float32" in message


@pytest.mark.parametrize("bad", [0.0, -0.1, np.nan, np.inf])
@pytest.mark.parametrize("name", ["fc.weight_scale", "fc.input_scale"])
def test_scale_that_is_not_positive_and_finite_is_named(
    student: StudentFile, tmp_path: Path, name: str, bad: float
) -> None:
    def spoil(tensors: dict[str, Any], _: dict[str, str]) -> None:
        tensors[name] = np.full_like(tensors[name], bad)

    assert f"{name!r} is not finite and strictly positive" in refusal(student, tmp_path, spoil)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["fc.bias", "norm.weight"])
def test_weights_that_are_not_finite_are_named(student: StudentFile, tmp_path: Path, name: str, bad: float) -> None:
    def spoil(tensors: dict[str, Any], _: dict[str, str]) -> None:
        tensors[name][1] = bad

    assert f"{name!r} holds NaN or infinity" in refusal(student, tmp_path, spoil)


def test_scale_without_its_weight_is_named(student: StudentFile, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Any], _: dict[str, str]) -> None:
        del tensors["fc.weight"]

    assert "'fc.weight_scale' belongs to no int8 weight 'fc.weight'" in refusal(student, tmp_path, drop)


@pytest.mark.parametrize("value", [np.full((3, 8), -128, np.int8), np.ones(8, np.int8)])
def test_int8_weight_that_is_no_symmetric_matrix_is_named(
    student: StudentFile, tmp_path: Path, value: np.ndarray[Any, Any]
) -> None:
    message = refusal(student, tmp_path, lambda tensors, _: tensors.update({"fc.weight": value}))
    assert "'fc.weight' is not a symmetric int8 matrix" in message


@pytest.mark.parametrize(("dtype", "shown"), [("float64", "F64"), ("int64", "I64")])
def test_other_dtypes_are_named(student: StudentFile, tmp_path: Path, dtype: str, shown: str) -> None:
    message = refusal(student, tmp_path, lambda tensors, _: tensors.update({"fc.bias": np.ones(3, dtype)}))
    assert f"'fc.bias' is {shown}" in message


def test_int8_that_is_no_weight_is_named(student: StudentFile, tmp_path: Path) -> None:
    message = refusal(student, tmp_path, lambda tensors, _: tensors.update({"fc.bias": np.ones(3, np.int8)}))
    assert "'fc.bias' is int8" in message


def test_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(GpusqError, match="not a whole safetensors file"):
        read_student(path)
