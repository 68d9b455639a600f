"""The figures of `plans.py` that must not get worse; the whole table is its own command."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from exporters.placement import Placement

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None, reason="compiling ahead of time needs tensorrt-rtx"
    ),
]

# kernels, INT8 linears, INT8 convolutions, attentions: what was reached, by model and placement
REACHED: dict[tuple[str, Placement], tuple[int, int, int, int]] = {
    ("DeiT-S (timm)", "fp16"): (101, 0, 0, 12),
    ("DeiT-S (timm)", "w8a8-linear"): (122, 49, 1, 12),
    ("DeiT-S (timm)", "w8a8-mha"): (112, 49, 1, 12),
    ("DeiT-S (HF)", "w8a8-mha"): (112, 49, 1, 12),
    ("Swin-T (timm)", "w8a8-mha"): (131, 52, 1, 12),
    ("Swin-T (HF)", "w8a8-linear"): (142, 52, 1, 12),
    ("Swin-T (HF)", "w8a8-mha"): (130, 52, 1, 12),
    ("ResNet-50", "w8a8-linear"): (106, 1, 53, 0),
    ("MobileNetV2", "w8a8-linear"): (107, 1, 52, 0),
    ("DINOv2 ViT-S/14 (file)", "w8a8-linear"): (130, 48, 2, 12),  # three of its convolutions are transposed
    ("YOLOv8n (file)", "w8a8-linear"): (131, 0, 64, 0),
    ("MiniLM-L6 (HF)", "w8a8-linear"): (62, 24, 0, 6),
    ("SmolLM2, 4 blocks", "w8a8-linear"): (44, 21, 0, 4),
}


def _plans() -> ModuleType:
    """The script beside this file."""
    spec = importlib.util.spec_from_file_location("plans", Path(__file__).with_name("plans.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["plans"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plans() -> ModuleType:
    return _plans()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(dict.fromkeys(model for model, _ in REACHED)))
def test_compiles_to_no_more_kernels_than_were_reached(plans: ModuleType, tmp_path: Path, name: str) -> None:
    try:
        plans.export(name, tmp_path / "model.onnx")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for (model, placement), (kernels, linears, convolutions, attentions) in REACHED.items():
        if model != name:
            continue
        row = plans.row(name, tmp_path / "model.onnx", placement)
        assert row.kernels <= kernels
        assert (row.linears_int8, row.convolutions_int8) == (linears, convolutions)
        assert row.linears_int8 in (0, row.linears)
        assert row.fused == row.attentions == attentions
