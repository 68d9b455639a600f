"""The whole surgery a second time changes not a byte of the model, whoever wrote the graph."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from exporters.placement import PLACEMENTS, Placement
from exporters.signature import Input
from exporters.surgery import Target, surgery
from exporters.to_onnx import to_onnx
from profiles.device import load_device
from tests.exporters import plans, qdq_students
from tests.exporters.llama_decoder import Decoder

pytestmark = pytest.mark.filterwarnings("ignore")

TIMM = ("DeiT-S", "Swin-T", "MobileNetV2")
HUGGING_FACE: dict[str, tuple[int, Callable[[], Any]]] = {
    "Swin (HF)": (
        56,
        lambda: plans.huggingface_model("Swin", depths=[2, 2], num_heads=[1, 2], embed_dim=32, image_size=56),
    ),
}


@cache
def exported(name: str) -> ir.Model:
    torch.manual_seed(0)
    if name in TIMM:
        return qdq_students.small_graph(name)
    if name == "decoder":
        with tempfile.TemporaryDirectory() as folder:
            decoder = Decoder(layers=2, width=64, heads=2, hidden=128, vocabulary=64)
            model = ir.load(decoder.save(Path(folder)))
            ir.external_data.load_to_model(model)
            return model
    side, make = HUGGING_FACE[name]
    inputs = (Input("pixel_values", (2, 3, side, side), "float32", {0: "batch"}),)
    return to_onnx(make().eval(), inputs, ("logits",), root="model").model


# Every network for a target with each form of attention, and every placement at least once. The decoder is written with
# RMSNormalization, which the opset of agx-orin does not have.
CASES: list[tuple[str, str, Placement]] = [
    *((name, "a100", "w8a8-mha") for name in (*TIMM, *HUGGING_FACE)),
    *((name, "agx-orin", "w8a8-linear") for name in (*TIMM, *HUGGING_FACE)),
    ("DeiT-S", "a100", "sparse-int8"),
    ("DeiT-S", "a100", "w4"),
    ("DeiT-S", "rtx-5090", "fp8-mha"),
    ("DeiT-S", "rtx-5090", "nvfp4"),
    ("MobileNetV2", "rtx-4090", "fp8"),
    ("Swin-T", "a100", "fp16"),
    ("MobileNetV2", "a100", "as-trained"),
    ("decoder", "a100", "w8a8-linear"),
    ("decoder", "a100", "w4"),
]


def test_every_placement_is_among_the_cases() -> None:
    assert {placement for _, _, placement in CASES} == set(PLACEMENTS)


@pytest.mark.parametrize(("name", "profile", "placement"), CASES)
def test_a_second_surgery_changes_no_byte(name: str, profile: str, placement: Placement) -> None:
    model, target = exported(name).clone(), Target(load_device(profile), "float16", placement)
    surgery(model, target, lambda _, names: dict.fromkeys(names, 4.0))
    once = ir.to_proto(model)
    surgery(model, target, lambda _, names: dict.fromkeys(names, 4.0))
    assert ir.to_proto(model) == once
