"""The demonstration: the shipped student on the shipped images, for three device profiles."""

from __future__ import annotations

from pathlib import Path

from deploy.conversion import Conversion, convert
from deploy.progress import Progress
from students.fashion_vit.sample import labelled_images, student_path, teacher_path

PROFILES = ("a100", "agx-orin", "cpu")


def demo(out: Path, progress: Progress | None = None) -> Conversion:
    """Convert the shipped 2:4 INT8 student, measured against its dense FP32 teacher, into bundles in `out`."""
    return convert(
        student_path(), profiles=PROFILES, out=out, data=labelled_images(), baseline=teacher_path(), progress=progress
    )
