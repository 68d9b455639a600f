"""Compile real architectures after the surgery and print one table: `python tests/exporters/plans.py [NAME…]`.

    model · placement · kernels · INT8 share of the linears' GEMMs · INT8 convolutions · fused attentions · per block

Weights are random, ranges are made up: a plan depends on types and shapes alone. Beside each model stands what the
compiler makes of it without the surgery, in FP16, and after ModelOpt's INT8 PTQ with its defaults, where
GPUSQ_MODELOPT_PYTHON names the interpreter of an environment that has `nvidia-modelopt[onnx]`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import onnx_ir as ir

from deploy.ahead_of_time import compile_ahead
from deploy.manifest import Plan
from exporters.graph_student import read_graph
from exporters.placement import Placement
from exporters.save_onnx import save_onnx
from exporters.surgery import Target, surgery
from profiles.device import load_device
from profiles.errors import GpusqError

PLACEMENTS: tuple[Placement, ...] = ("fp16", "w8a8-linear", "w8a8-mha", "sparse-int8")
MODELOPT = "GPUSQ_MODELOPT_PYTHON"
_RANGE = 4.0
_IMAGE = (8, 3, 224, 224)
_MODELOPT_SCRIPT = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize
source, target, name, shape = sys.argv[1:]
dims = tuple(map(int, shape.split("x")))
samples = {name: np.random.default_rng(0).standard_normal(dims).astype(np.float32)}
quantize(source, quantize_mode="int8", calibration_data=samples, calibration_eps=["cpu"], output_path=target,
         calibration_shapes=f"{name}:{shape}")
"""


@dataclass(frozen=True)
class Row:
    """One line of the table; `kernels_per_block` is the largest number in one block, 0 where there are none."""

    model: str
    placement: str
    kernels: int
    linears_int8: int
    linears: int
    convolutions_int8: int
    convolutions: int
    fused: int
    attentions: int
    kernels_per_block: int

    def __str__(self) -> str:
        return (
            f"{self.model:22} {self.placement:14} {self.kernels:7} {self.linears_int8:4}/{self.linears:<4} "
            f"{self.convolutions_int8:4}/{self.convolutions:<4} {self.fused:4}/{self.attentions:<4} "
            f"{self.kernels_per_block:4}"
        )


HEADER = f"{'model':22} {'placement':14} {'kernels':>7} {'linear':>9} {'conv':>9} {'attention':>9} {'block':>5}"


def timm_model(name: str) -> Any:
    import timm

    return timm.create_model(name)


def torchvision_model(name: str) -> Any:
    import torchvision  # type: ignore[import-untyped]

    return getattr(torchvision.models, name)()


def huggingface_model(name: str, **config: Any) -> Any:
    import torch
    import transformers

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            return self.model(pixel_values).logits

    classes: Any = transformers
    return Logits(getattr(classes, f"{name}ForImageClassification")(getattr(classes, f"{name}Config")(**config)))


_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}
MODELS: Mapping[str, Callable[[], Any]] = {
    "DeiT-S (timm)": lambda: timm_model("deit_small_patch16_224"),
    "DeiT-S (HF)": lambda: huggingface_model("DeiT", **_SMALL),
    "Swin-T (timm)": lambda: timm_model("swin_tiny_patch4_window7_224"),
    "Swin-T (HF)": lambda: huggingface_model("Swin", num_labels=1000),
    "ViT-B (timm)": lambda: timm_model("vit_base_patch16_224"),
    "ViT-L (timm)": lambda: timm_model("vit_large_patch16_224"),
    "ResNet-50": lambda: torchvision_model("resnet50"),
    "MobileNetV2": lambda: torchvision_model("mobilenet_v2"),
}


def export(name: str, path: Path) -> None:
    """Write the model called `name`, with random weights and a batch that may vary, to `path`."""
    import torch

    from exporters.signature import Input
    from exporters.to_onnx import to_onnx

    torch.manual_seed(0)
    module = MODELS[name]().eval()
    wrapper = "model" if type(module).__name__ == "Logits" else ""
    inputs = (Input("pixel_values", (2, *_IMAGE[1:]), "float32", {0: "batch"}),)
    save_onnx(to_onnx(module, inputs, ("logits",), root=wrapper).model, path)


def row(name: str, path: Path, placement: Placement, profile: str = "a100") -> Row:
    """What the compiler makes of the graph in `path` for `profile` after the surgery with `placement`."""
    device = load_device(profile)
    model = read_graph(path).export().model
    surgery(model, Target(device, "float16", placement), lambda graph, names: dict.fromkeys(names, _RANGE))
    return _row(name, placement, _compiled(model, profile))


def untouched(name: str, path: Path) -> Row:
    """What it makes of the graph as it was exported, with nothing done but FP16 types."""
    from exporters.passes.type_floats import TypeFloats

    model = read_graph(path).export().model
    TypeFloats("float16")(model)
    return _row(name, "as exported", _compiled(model, "a100"))


def modelopt(name: str, path: Path) -> Iterator[Row]:
    """What it makes of ModelOpt's INT8 graph, as it is and after our repair; nothing without ModelOpt."""
    python = os.environ.get(MODELOPT)
    if not python:
        return
    quantized = path.with_suffix(".modelopt.onnx")
    shape = "x".join(map(str, _IMAGE))
    command = [python, "-c", _MODELOPT_SCRIPT, str(path), str(quantized), "pixel_values", shape]
    subprocess.run(command, check=True, capture_output=True, cwd=path.parent)
    try:
        yield _row(name, "ModelOpt", _compiled(ir.load(quantized), "a100"))
    except GpusqError as error:
        print(f"{name:22} ModelOpt       not compiled: {str(error)[:80]}")
    repaired = row(name, quantized, "as-trained")
    yield Row(**{**repaired.__dict__, "placement": "its, repaired"})


def _compiled(model: ir.Model, profile: str) -> Plan:
    ahead = load_device(profile).ahead_of_time
    assert ahead is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, path)
        return compile_ahead(path, ahead, graph=model).plan


def _row(name: str, placement: str, plan: Plan) -> Row:
    return Row(
        model=name,
        placement=placement,
        kernels=len(plan.kernels),
        linears_int8=plan.linear_gemms_int8,
        linears=plan.linear_gemms,
        convolutions_int8=plan.convolutions_int8 or 0,
        convolutions=plan.convolutions or 0,
        fused=sum(attention.fused for attention in plan.attentions),
        attentions=len(plan.attentions),
        kernels_per_block=max(plan.kernels_per_block.values(), default=0),
    )


def main(names: Sequence[str]) -> None:
    """Print the table of the models `names`, or of all."""
    import tests.conftest  # noqa: F401  # lets torchvision import

    warnings.simplefilter("ignore")
    print(HEADER)
    for name in names or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export(name, path)
            print(untouched(name, path), flush=True)
            for placement in PLACEMENTS:
                print(row(name, path, placement), flush=True)
            for line in modelopt(name, path):
                print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
