"""Small students of every source of trained scales, as the graphs with Q/DQ that the exporters make of them.

Each library trains its own student for a few steps, with scales of its own kind, and saves or hands over what it
usually does. Beside them stand small models that onnxruntime's and ModelOpt's post-training tools quantized.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from exporters.fake_quantize import attach
from exporters.program import load_program
from exporters.quantized_modules.plain import PlainModule, plain
from exporters.quantized_modules.plain_program import plain_program
from exporters.scales import TakenScales, take_scales
from exporters.scales.factors import multiply_inputs
from exporters.signature import Input
from exporters.to_onnx import to_onnx

CLASSES, SIDE = 10, 32
MODELOPT = "GPUSQ_MODELOPT_PYTHON"
_WIDTH = 64


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """[count, 3, 32, 32] images of ten patterns in noise, and their classes."""
    patterns = torch.randn(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return patterns[labels] + 0.5 * torch.randn(count, 3, SIDE, SIDE, generator=generator), labels


def train(module: nn.Module, steps: int) -> None:
    optimizer = torch.optim.Adam([one for one in module.parameters() if one.requires_grad], 2e-3)
    for step in range(steps):
        x, labels = images(32, 100 + step)
        optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(module(x), labels)
        loss.backward()
        optimizer.step()


def transformer() -> nn.Module:
    """A ViT of two blocks, trained."""
    import timm

    torch.manual_seed(0)
    module: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=SIDE, patch_size=8, embed_dim=_WIDTH, num_heads=2, num_classes=CLASSES
    )
    train(module, 30)
    return module.eval()


class Residual(nn.Module):
    """Convolutions with a residual sum, pooled."""

    def __init__(self, **of: Callable[..., nn.Module]) -> None:
        super().__init__()
        conv, linear, add = of.get("conv", nn.Conv2d), of.get("linear", nn.Linear), of.get("add", nn.Identity)
        self.given, self.act = of.get("given", nn.Identity)(), of.get("act", nn.ReLU)()
        self.stem, self.bn = conv(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.conv, self.add = conv(16, 16, 3, padding=1), add()
        self.pool, self.head = nn.MaxPool2d(4), linear(16 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(self.given(x))))
        branch = self.conv(x)
        x = x + branch if isinstance(self.add, nn.Identity) else self.add(x, branch)
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


def of_modelopt() -> ir.Model:
    return _of_state(*_modelopt_state())


def of_pytorch_quantization() -> ir.Model:
    """The names of ModelOpt's predecessor; the values are ModelOpt's."""
    state, _ = _modelopt_state()
    for kind in ("input", "weight"):
        state = {name.replace(f"{kind}_quantizer", f"_{kind}_quantizer"): tensor for name, tensor in state.items()}
    return _of_state(state)


def of_compressed_tensors() -> ir.Model:
    """Calibrated by the library's own arithmetic, W8A8; its fake quantizers take part in training."""
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    qparams: Any = importlib.import_module("compressed_tensors.quantization.utils").calculate_qparams
    weights = quantization.QuantizationArgs(num_bits=8, strategy="channel")
    inputs = quantization.QuantizationArgs(num_bits=8, strategy="tensor")
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    module = transformer()
    seen = _inputs_of_linears(module)
    quantization.apply_quantization_config(module, quantization.QuantizationConfig(config_groups={"all": scheme}))
    for name, x in seen.items():
        layer: Any = module.get_submodule(name)
        _set(layer, "input", qparams(x.amin(), x.amax(), inputs))
        _set(layer, "weight", qparams(layer.weight.detach().amin(-1), layer.weight.detach().amax(-1), weights))
        layer.quantization_status = quantization.QuantizationStatus.FROZEN
    with tempfile.TemporaryDirectory() as folder:
        compressor = importlib.import_module("compressed_tensors.compressors").ModelCompressor
        found = compressor.from_pretrained_model(module)
        found.update_config(folder)
        config = (Path(folder) / "config.json").read_text()
    return _of_state(module.state_dict(), json.loads(config))


def of_torchao() -> ir.Model:
    """Weights quantized in training, activations with static scales when it is converted."""
    ao: Any = importlib.import_module("torchao.quantization")
    qat: Any = importlib.import_module("torchao.quantization.qat")
    module = transformer()
    weights = qat.IntxFakeQuantizeConfig(torch.int8, ao.PerAxis(0), is_symmetric=True)
    ao.quantize_(module, qat.QATConfig(step="prepare", weight_config=weights))
    train(module, 3)
    ao.quantize_(module, qat.QATConfig(step="convert"))
    static = ao.Int8StaticActivationInt8WeightConfig(
        act_quant_scale=torch.tensor([[0.03]]), granularity=[ao.PerTensor(), ao.PerRow()]
    )
    ao.quantize_(module, static)
    return _exported(plain(module))


def of_torch_ao() -> ir.Model:
    """FX graph mode: quantizers on inputs, weights, and the result of every layer and of the sum."""
    tq: Any = importlib.import_module("torch.ao.quantization")
    fx: Any = importlib.import_module("torch.ao.quantization.quantize_fx")
    activation = tq.FakeQuantize.with_args(
        observer=tq.MovingAverageMinMaxObserver, dtype=torch.quint8, qscheme=torch.per_tensor_symmetric
    )
    qconfig = tq.QConfig(activation=activation, weight=tq.default_per_channel_weight_fake_quant)
    torch.manual_seed(0)
    mapping = tq.QConfigMapping().set_global(qconfig)
    module = fx.prepare_qat_fx(Residual().train(), mapping, (torch.zeros(2, 3, SIDE, SIDE),))
    train(module, 30)
    return _exported(plain(module.eval().apply(tq.disable_observer)))


def of_pt2e() -> ir.Model:
    """A converted program of torch.export, from a .pt2 file; calibrated: preparing training takes half a minute."""
    steps: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    torch.manual_seed(0)
    trained = Residual()
    train(trained, 30)
    example, batch = (torch.zeros(4, 3, SIDE, SIDE),), ({0: torch.export.Dim.DYNAMIC},)
    module = torch.export.export(trained.eval(), example, dynamic_shapes=batch).module()
    prepared = steps.prepare_pt2e(module, _annotator())
    prepared(images(64, 3)[0])
    converted = steps.convert_pt2e(prepared)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.pt2"
        torch.export.save(torch.export.export(converted, example, dynamic_shapes=batch), path)
        return _exported(plain_program(load_program(path).program))


def of_brevitas() -> ir.Model:
    qnn: Any = importlib.import_module("brevitas.nn")
    quant: Any = importlib.import_module("brevitas.quant")
    torch.manual_seed(0)
    weight = {"weight_quant": quant.Int8WeightPerChannelFloat}
    module = Residual(
        given=lambda: qnn.QuantIdentity(return_quant_tensor=True),
        act=lambda: qnn.QuantReLU(act_quant=quant.Int8ActPerTensorFloat, return_quant_tensor=True),
        conv=lambda *sizes, **more: qnn.QuantConv2d(*sizes, **more, **weight),
        linear=lambda *sizes: qnn.QuantLinear(*sizes, **weight),
        add=lambda: qnn.QuantEltwiseAdd(return_quant_tensor=True),
    )
    train(module, 30)
    return _exported(plain(module.eval()))


def of_gpusq() -> ir.Model:
    """The project's own format."""
    from exporters.torch_student import to_student
    from students.fashion_vit.model import fashion_vit
    from students.fashion_vit.pack import pack
    from students.fashion_vit.prune import prune
    from students.fashion_vit.quant import quantize

    config = {"width": _WIDTH, "depth": 2, "heads": 2}
    torch.manual_seed(0)
    module = fashion_vit(**config)
    prune(module)
    quantize(module.eval(), [torch.randn(32, 1, 28, 28)])
    return to_student(pack(module, config, card={"seed": 0})).export().model


TRAINED: Mapping[str, Callable[[], ir.Model]] = {
    "ModelOpt": of_modelopt,
    "pytorch-quantization": of_pytorch_quantization,
    "compressed-tensors": of_compressed_tensors,
    "torchao": of_torchao,
    "PT2E": of_pt2e,
    "torch.ao FX": of_torch_ao,
    "Brevitas": of_brevitas,
    "gpusq": of_gpusq,
}


def small(name: str) -> nn.Module:
    """A short model of the family, with random weights."""
    import timm
    from torchvision.models import MobileNetV2  # type: ignore[import-untyped]

    torch.manual_seed(0)
    make: dict[str, Callable[[], Any]] = {
        "DeiT-S": lambda: timm.create_model("deit_small_patch16_224", depth=2, img_size=32, patch_size=8),
        "Swin-T": lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 2), img_size=56),
        "MobileNetV2": lambda: MobileNetV2(inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]),
    }
    module: nn.Module = make[name]()
    return module.eval()


@cache
def small_graph(name: str) -> ir.Model:
    """Its graph; clone it before editing."""
    inputs = (Input("x", (2, 3, *side(name)), dynamic={0: "batch"}),)
    return to_onnx(small(name), inputs, ("logits",)).model


def side(name: str) -> tuple[int, int]:
    """Height and width of the images that the model takes."""
    sides = {"DeiT-S": 32, "Swin-T": 56, "MobileNetV2": 64}
    return sides[name], sides[name]


def by_onnxruntime(source: Path, target: Path) -> None:
    """Quantize `source` symmetrically with quantize_static, as Q/DQ."""
    logging.disable(logging.WARNING)
    try:
        quantize_static(
            source,
            target,
            _Samples(source),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
    finally:
        logging.disable(logging.NOTSET)


_MODELOPT_SCRIPT = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize
source, target, name, samples, shape = sys.argv[1:]
quantize(source, quantize_mode="int8", calibration_data={name: np.load(samples)}, calibration_eps=["cpu"],
         output_path=target, calibration_shapes=f"{name}:{shape}", high_precision_dtype="fp32")
"""


def by_modelopt(source: Path, target: Path) -> None:
    """Quantize it by ModelOpt's INT8 PTQ with its defaults, but for float32 in between, which is exact to compare."""
    name, x = next(iter(samples_of(ir.load(source), 16, 1).items()))
    shape = "x".join(map(str, x.shape))
    np.save(samples := target.with_suffix(".npy"), x)
    command = [os.environ[MODELOPT], "-c", _MODELOPT_SCRIPT, *map(str, (source, target, name, samples)), shape]
    subprocess.run(command, check=True, capture_output=True, cwd=target.parent)


TOOLS: Mapping[str, Callable[[Path, Path], None]] = {"onnxruntime": by_onnxruntime, "ModelOpt": by_modelopt}


def samples_of(model: ir.Model, count: int, seed: int = 2) -> dict[str, Any]:
    """Inputs for `model`: images of the task that the students learned, or random numbers of another shape."""
    (value,) = model.graph.inputs
    shape = tuple(int(str(size)) for size in list(value.shape or ())[1:])
    if shape == (3, SIDE, SIDE):
        return {value.name or "": images(count, seed)[0].numpy()}
    return {value.name or "": np.random.default_rng(seed).standard_normal((count, *shape), np.float32)}


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, path: Path) -> None:
        self.left: Iterator[dict[str, Any]] = iter([samples_of(ir.load(path), 16, 1)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.left, None)


def _of_state(state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> ir.Model:
    taken: TakenScales = take_scales(state, metadata)
    module = transformer()
    module.load_state_dict(taken.state)
    multiply_inputs(module, taken.factors)
    return _exported(PlainModule(module, taken.quantizers))


def _exported(found: PlainModule) -> ir.Model:
    attach(found.module, found.quantizers)
    inputs = (Input("x", (2, 3, SIDE, SIDE), "float32", {0: "batch"}),)
    return to_onnx(found.module, inputs, ["logits"]).model


@cache
def _modelopt_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    quantization: Any = importlib.import_module("modelopt.torch.quantization")
    opt: Any = importlib.import_module("modelopt.torch.opt")
    from exporters.tensors import read_tensors

    config = copy.deepcopy(quantization.INT8_DEFAULT_CFG)
    module = quantization.quantize(transformer(), config, lambda model: model(images(64, 3)[0]))
    train(module, 3)
    with tempfile.TemporaryDirectory() as folder:
        opt.save(module, Path(folder) / "student.pt")
        read = read_tensors(Path(folder) / "student.pt")
    return dict(read.state), dict(read.metadata)


def _inputs_of_linears(module: nn.Module) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    linears = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0].detach()}))
        for name, layer in linears
    ]
    module(images(64, 3)[0])
    for hook in hooks:
        hook.remove()
    return seen


def _set(layer: Any, tensor: str, found: tuple[Tensor, Tensor]) -> None:
    for name, value in zip((f"{tensor}_scale", f"{tensor}_zero_point"), found, strict=True):
        if (held := getattr(layer, name, None)) is not None:
            held.data = value.reshape(held.shape).to(held.dtype)


def _annotator() -> Any:
    """A PT2E quantizer: int8 around 0 for the inputs and the weights of every layer."""
    pt2e: Any = importlib.import_module("torchao.quantization.pt2e")
    base: Any = importlib.import_module("torchao.quantization.pt2e.quantizer")

    def spec(observer: Any, low: int, **options: Any) -> Any:
        return base.QuantizationSpec(
            dtype=torch.int8, quant_min=low, quant_max=127, observer_or_fake_quant_ctr=observer, **options
        )

    class Symmetric(base.Quantizer):  # type: ignore[misc]
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            act = spec(pt2e.MinMaxObserver, -128, qscheme=torch.per_tensor_symmetric)
            channels = {"qscheme": torch.per_channel_symmetric, "ch_axis": 0}
            weight = spec(pt2e.PerChannelMinMaxObserver, -127, **channels)
            for node in model.graph.nodes:
                if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
                    node.meta["quantization_annotation"] = base.QuantizationAnnotation(
                        {node.args[0]: act, node.args[1]: weight}, None, _annotated=True
                    )
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            pass

    return Symmetric()
