"""Where the shipped checkpoints and images lie; importing this needs no torch."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"


def teacher_path() -> Path:
    """The dense teacher of seed 0, a student file without scales."""
    return DATA / "teacher.safetensors"


def student_path() -> Path:
    """The 2:4 + INT8 student of seed 0."""
    return DATA / "student.safetensors"


def labelled_images() -> Path:
    """An npz with the first 1,000 test images: `image` uint8 [1000, 1, 28, 28], `label` int64 [1000]."""
    return DATA / "test-1000.npz"


def calibration_images() -> Path:
    """An npz with the first 256 training images: `image` uint8 [256, 1, 28, 28], `label` int64 [256]."""
    return DATA / "train-256.npz"
