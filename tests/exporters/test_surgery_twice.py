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
from tests.exporters import plans
from tests.exporters.llama_decoder import Decoder

pytestmark = pytest.mark.filterwarnings("ignore")

_SMALL = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 2}
IMAGES: dict[str, tuple[int, Callable[[], Any]]] = {
    "DeiT (timm)": (32, lambda: _timm("deit_small_patch16_224", depth=2, img_size=32, patch_size=8)),
    "DeiT (HF)": (32, lambda: plans.huggingface_model("DeiT", **_SMALL, image_size=32, patch_size=8)),
    "Swin (timm)": (56, lambda: _timm("swin_tiny_patch4_window7_224", depths=(2, 2), img_size=56)),
    "Swin (HF)": (
        56,
        lambda: plans.huggingface_model("Swin", depths=[2, 2], num_heads=[1, 2], embed_dim=32, image_size=56),
    ),
    "ResNet (timm)": (32, lambda: _timm("resnet10t")),
    "MobileNet (timm)": (32, lambda: _timm("mobilenetv2_035")),
}


def _timm(name: str, **options: Any) -> Any:
    import timm

    return timm.create_model(name, num_classes=16, **options)


@cache
def exported(name: str) -> ir.Model:
    torch.manual_seed(0)
    if name not in IMAGES:
        with tempfile.TemporaryDirectory() as folder:
            decoder = Decoder(layers=2, width=64, heads=2, hidden=128, vocabulary=64)
            model = ir.load(decoder.save(Path(folder)))
            ir.external_data.load_to_model(model)
            return model
    side, make = IMAGES[name]
    inputs = (Input("pixel_values", (2, 3, side, side), "float32", {0: "batch"}),)
    root = "model" if name.endswith("(HF)") else ""
    return to_onnx(make().eval(), inputs, ("logits",), root=root).model


# The decoder is written with RMSNormalization, which the opset of agx-orin does not have.
CASES = [(name, profile) for name in IMAGES for profile in ("a100", "agx-orin")] + [("decoder", "a100")]


@pytest.mark.parametrize(("name", "profile"), CASES)
def test_a_second_surgery_changes_no_byte(name: str, profile: str) -> None:
    device = load_device(profile)
    placements: list[Placement] = [one for one in PLACEMENTS if one != "w4" or device.onnx.opset >= 21]  # blocks
    for placement in placements:
        model = exported(name).clone()
        target = Target(device, "float16", placement)
        surgery(model, target, lambda _, names: dict.fromkeys(names, 4.0))
        once = ir.to_proto(model)
        surgery(model, target, lambda _, names: dict.fromkeys(names, 4.0))
        assert ir.to_proto(model) == once, placement
