from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from deploy.onnxruntime_api import open_session
from exporters.student_file import StudentFile

os.environ["GPUSQ_CACHE"] = "off"  # a test must not pass because an earlier run did


def _declare_detection_operators() -> object:
    """Let torchvision import beside a torch that was built without its operators; nothing under test calls them.

    timm, transformers and ultralytics import torchvision.
    """
    import torch

    if torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")  # type: ignore[no-untyped-call]
    return library


_operators = _declare_detection_operators()  # they are gone when the library is


@pytest.fixture(scope="session")
def student_file() -> StudentFile:
    """A small student with random weights, 2:4 and INT8, its scales taken from random images."""
    import torch

    from students.fashion_vit.model import fashion_vit
    from students.fashion_vit.pack import pack
    from students.fashion_vit.prune import prune
    from students.fashion_vit.quant import quantize

    config = {"width": 64, "depth": 2, "heads": 2}
    torch.manual_seed(0)
    model = fashion_vit(**config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases of nothing but zeros would be merged by the exporter
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    prune(model)
    quantize(model.eval(), [torch.randn(4, 1, 28, 28)])
    return pack(model, config, card={"seed": 0})


@pytest.fixture(scope="session")
def exported_student(student_file: StudentFile) -> ir.Model:
    """The float graph of `student_file`; clone it before editing."""
    from exporters.torch_student import to_student

    return to_student(student_file).export(scales=False).model


@pytest.fixture(scope="session")
def quantized_student(student_file: StudentFile) -> ir.Model:
    """The graph of `student_file` with its scales as Q/DQ; clone it before editing."""
    from exporters.torch_student import to_student

    return to_student(student_file).export().model


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., npt.NDArray[np.float32]]:
    """`run(model, x=…)`: the first output on onnxruntime, in sessions as the bundles have them."""

    def run(model: ir.Model, **inputs: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        ir.save(model, tmp_path / "run.onnx")
        output: npt.NDArray[np.float32] = open_session(tmp_path / "run.onnx").run(None, inputs)[0]
        return output

    return run
