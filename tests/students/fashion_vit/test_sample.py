from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from exporters.student_file import read_student
from exporters.torch_student import fake_quant_module
from students.fashion_vit.data import Images
from students.fashion_vit.prune import DENSE
from students.fashion_vit.recipe import accuracy
from students.fashion_vit.sample import calibration_images, labelled_images, student_path, teacher_path

# Another CPU adds up in another order, and a value next to a tie may round the other way: two images at most.
TOLERANCE = 0.0021
# pytest collects functions that are called test_…; this one only says where a file lies.


def shipped() -> Images:
    with np.load(labelled_images()) as file:
        return Images(torch.from_numpy(file["image"]), torch.from_numpy(file["label"]))


def test_student_is_as_accurate_as_its_card_says() -> None:
    student = read_student(student_path())
    found = accuracy(fake_quant_module(student), shipped())
    assert found == pytest.approx(student.card["test_1000_accuracy"], abs=TOLERANCE)


def test_teacher_is_as_accurate_as_its_card_says() -> None:
    teacher = read_student(teacher_path())
    found = accuracy(fake_quant_module(teacher), shipped())
    assert found == pytest.approx(teacher.card["test_1000_accuracy"], abs=TOLERANCE)


def test_student_reaches_the_goals() -> None:
    dense = read_student(teacher_path()).card["test_accuracy"]
    assert dense >= 0.90
    assert read_student(student_path()).card["test_accuracy"] >= dense - 0.005


def test_student_is_two_four_sparse_in_every_pruned_linear() -> None:
    student = read_student(student_path())
    assert len(student.weight_scales) == 26
    for name in student.weight_scales.keys() - set(DENSE):
        weight = student.tensors[f"{name}.weight"]
        assert (weight.reshape(len(weight), -1, 4) != 0).sum(-1).max() <= 2


def test_shipped_files_are_small() -> None:
    assert teacher_path().stat().st_size + student_path().stat().st_size <= 4_000_000
    assert labelled_images().stat().st_size + calibration_images().stat().st_size <= 1_000_000


def test_images_have_the_documented_shapes() -> None:
    for path, count in ((labelled_images(), 1000), (calibration_images(), 256)):
        with np.load(path) as file:
            assert (file["image"].shape, file["image"].dtype) == ((count, 1, 28, 28), np.uint8)
            assert (file["label"].shape, file["label"].dtype) == ((count,), np.int64)


def test_paths_are_found_without_torch() -> None:
    code = "import sys, students, students.fashion_vit.sample as s; s.student_path(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
