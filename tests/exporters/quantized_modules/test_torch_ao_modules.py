from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_qat_fx
from torch.nn.utils import prune

from exporters.fake_quantize import attach
from exporters.quantized_modules.plain import PlainModule, plain
from exporters.quantizer import Place
from profiles.errors import GpusqError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

tq: Any = importlib.import_module("torch.ao.quantization")  # its functions are untyped

# From opset 21 on, onnxruntime 1.32 cannot load DQ → Reshape: the Q that it adds fails its own type inference.
OPSET = 19


class Net(nn.Module):
    def __init__(self, *, stubs: bool) -> None:
        super().__init__()
        self.quant: nn.Module = tq.QuantStub() if stubs else nn.Identity()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.sum = torch.ao.nn.quantized.FloatFunctional()
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(8 * 16, 16)
        self.relu1 = nn.ReLU()
        self.head = nn.Linear(16, 4)
        self.dequant: nn.Module = tq.DeQuantStub() if stubs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        x = self.pool(self.sum.add(x, self.conv2(x)))
        logits: Tensor = self.dequant(self.head(self.relu1(self.fc1(x.flatten(1)))))
        return logits


def symmetric_qconfig(dtype: torch.dtype = torch.quint8) -> Any:
    activation = tq.FakeQuantize.with_args(
        observer=tq.MovingAverageMinMaxObserver, dtype=dtype, qscheme=torch.per_tensor_symmetric
    )
    return tq.QConfig(activation=activation, weight=tq.default_per_channel_weight_fake_quant)


def eager(qconfig: Any) -> nn.Module:
    module: Any = Net(stubs=True).train()
    module.qconfig = qconfig
    prepared: nn.Module = tq.prepare_qat(tq.fuse_modules_qat(module, [["conv", "bn", "relu"], ["fc1", "relu1"]]))
    return prepared


def graph(qconfig: Any) -> nn.Module:
    mapping = tq.QConfigMapping().set_global(qconfig)
    prepared: nn.Module = prepare_qat_fx(Net(stubs=False).train(), mapping, (torch.zeros(2, 1, 8, 8),))
    return prepared


def trained(build: Callable[[Any], nn.Module], qconfig: Any, task: Any, steps: int = 60) -> nn.Module:
    torch.manual_seed(0)
    module = build(qconfig)
    task.train(module, steps)
    return module.eval().apply(tq.disable_observer)


def answer(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        answered: Tensor = module(x)
    return answered


def scales(module: nn.Module) -> list[Tensor]:
    """The scale of every fake quantizer of a model in training."""
    return [fake.scale for fake in module.modules() if isinstance(fake, tq.FakeQuantizeBase)]


def converted_scales(module: nn.Module) -> list[Tensor | float]:
    """The scales that a converted model computes with."""
    found: list[Tensor | float] = [buffer for name, buffer in module.named_buffers() if "scale" in name]
    for part in module.modules():
        layer: Any = part
        if callable(getattr(part, "weight", None)):
            weight = layer.weight()
            found.append(weight.q_per_channel_scales().float())
        if isinstance(getattr(part, "scale", None), float):
            found.append(layer.scale)
    return found


def output_step(found: PlainModule) -> float:
    """One step of the logits' own quantizer: the last one of the model."""
    outputs = [quantizer for place, quantizer in found.quantizers.items() if place.tensor == "output"]
    return float(outputs[-1].scale)


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(eager, torch.quint8), (eager, torch.qint8), (graph, torch.quint8)],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_a_model_in_training_computes_as_torch_does_with_its_very_scales(
    build: Callable[[Any], nn.Module],
    dtype: torch.dtype,
    task: Any,
    compare: Callable[..., Any],
    as_bytes: Callable[..., list[bytes]],
) -> None:
    module = trained(build, symmetric_qconfig(dtype), task)
    expected, held = answer(module, task.inputs), scales(module)
    found = plain(module)
    compared = compare(expected, found, opset=OPSET)
    assert compared.furthest <= 1.001 * output_step(found)
    assert compared.agreement == 1.0
    assert compared.scales == as_bytes(*held)
    assert "conv.bn is folded into conv" in found.notes


@pytest.mark.parametrize(
    ("build", "convert"),
    [(eager, tq.convert), (graph, convert_fx), (graph, convert_to_reference_fx)],
    ids=["eager", "fx", "reference"],
)
def test_a_converted_model_computes_as_torch_does_with_its_very_scales(
    build: Callable[[Any], nn.Module],
    convert: Callable[[nn.Module], nn.Module],
    task: Any,
    compare: Callable[..., Any],
    as_bytes: Callable[..., list[bytes]],
) -> None:
    module = convert(trained(build, symmetric_qconfig(), task))
    expected, held = answer(module, task.inputs), converted_scales(module)
    found = plain(module)
    compared = compare(expected, found, opset=OPSET)
    assert compared.furthest <= 1.001 * output_step(found)
    assert compared.agreement == 1.0
    assert compared.scales == as_bytes(*held)


def test_the_weights_are_the_integers_that_torch_stores_when_it_converts(task: Any) -> None:
    module = trained(eager, symmetric_qconfig(), task)
    converted: Any = tq.convert(copy.deepcopy(module))
    found = plain(module)
    for name in ("conv2", "fc1", "head"):
        quantizer = found.quantizers[Place(name, "weight")]
        integers = quantizer.integers(found.module.get_parameter(f"{name}.weight").numpy())
        assert (integers == getattr(converted, name).weight().int_repr().numpy()).all()


class Joins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return torch.cat([torch.relu(a + b), a * b, a + b], 1)


def test_quantized_operators_of_an_fx_graph_compute_as_torch_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    mapping = tq.QConfigMapping().set_global(symmetric_qconfig())
    prepared = prepare_qat_fx(Joins().train(), mapping, (x,))
    prepared(x)
    module = convert_fx(prepared.eval().apply(tq.disable_observer))
    operators = {str(node.target) for node in module.graph.nodes}
    assert {"quantized.add", "quantized.mul", "quantized.add_relu"} <= operators
    expected = answer(module, x)
    found = plain(module)
    attach(found.module, found.quantizers)
    step = max(float(quantizer.scale) for place, quantizer in found.quantizers.items() if place.tensor == "output")
    assert (answer(found.module, x) - expected).abs().max() <= 1.001 * step


def test_the_affine_default_of_fbgemm_folds_because_it_takes_half_the_range(
    task: Any, compare: Callable[..., Any], as_bytes: Callable[..., list[bytes]]
) -> None:
    """0 to 127 around any zero-point is within int8 around 0: the same function, with a Clip."""
    default = tq.get_default_qat_qconfig("fbgemm")
    qconfig = tq.QConfig(activation=default.activation, weight=tq.default_per_channel_weight_fake_quant)
    module: Any = trained(graph, qconfig, task)
    assert 0 < int(module.activation_post_process_0.zero_point) < 127
    expected, held = answer(module, task.inputs), scales(module)
    found = plain(module)
    zero_point = -found.quantizers[Place("activation_post_process_0", "output")].low
    assert found.quantizers[Place("activation_post_process_0", "output")].high == 127 - zero_point
    compared = compare(expected, found, opset=OPSET)
    assert compared.furthest <= 1.001 * output_step(found)
    assert compared.agreement == 1.0
    assert compared.scales == as_bytes(*held)


@pytest.mark.parametrize("build", [eager, graph])
def test_refuses_affine_activations_and_names_a_qconfig_that_is_taken(
    build: Callable[[Any], nn.Module], task: Any
) -> None:
    default = tq.get_default_qat_qconfig("qnnpack")
    qconfig = tq.QConfig(activation=default.activation, weight=tq.default_per_channel_weight_fake_quant)
    module = trained(build, qconfig, task, steps=3)
    with pytest.raises(
        GpusqError, match=r"is quantized asymmetrically: zero-point \d+ with integers 0 to 255"
    ) as caught:
        plain(module)
    assert "qscheme=torch.per_tensor_symmetric" in caught.value.hint


def test_refuses_a_channel_that_the_fused_quantizer_made_affine() -> None:
    layer: Any = nn.Linear(4, 2)
    nn.init.uniform_(layer.weight[0].data, 0.1, 1.0)
    layer.qconfig = tq.QConfig(activation=tq.NoopObserver, weight=tq.default_fused_per_channel_wt_fake_quant)
    module = torch.ao.nn.qat.Linear.from_float(layer)  # type: ignore[no-untyped-call]
    module(torch.randn(3, 4))
    with pytest.raises(GpusqError, match=r"'fc\.weight' is quantized asymmetrically") as caught:
        plain(nn.ModuleDict({"fc": module}))
    assert "default_per_channel_weight_fake_quant" in caught.value.hint


def test_a_disabled_fake_quantizer_leaves_its_tensor_float_and_is_noted(task: Any) -> None:
    module = trained(eager, symmetric_qconfig(), task, steps=2).apply(tq.disable_fake_quant)
    found = plain(module)
    assert not found.quantizers
    assert "quant.output stays float: its fake quantizer is disabled" in found.notes


def test_a_dynamically_quantized_linear_is_refused_or_kept_as_weights() -> None:
    float_module = nn.Sequential(nn.Linear(8, 4))
    quantized = tq.quantize_dynamic(float_module, {nn.Linear}, torch.qint8)
    with pytest.raises(GpusqError, match=r"'0\.input' is quantized dynamically"):
        plain(copy.deepcopy(quantized))
    found = plain(quantized, drop_dynamic=True)
    assert list(found.quantizers) == [Place("0", "weight")]
    assert any(note.startswith("0.input stays float") for note in found.notes)


def test_names_the_layer_whose_scale_is_negative(task: Any) -> None:
    module: Any = trained(eager, symmetric_qconfig(), task, steps=2)
    module.head.weight_fake_quant.scale[1] = -0.5
    with pytest.raises(GpusqError, match=r"the scale of 'head\.weight' is -0\.5 in channel 1"):
        plain(module)


def test_refuses_by_name_a_module_that_it_does_not_know() -> None:
    module = nn.Sequential(torch.ao.nn.quantizable.LSTM(4, 4))
    with pytest.raises(GpusqError, match=r"'0' is a torch\.ao\.nn\.quantizable\.modules\.rnn\.LSTM"):
        plain(module)


def test_folds_a_pruning_mask_that_was_loaded_after_the_last_forward(task: Any) -> None:
    module: Any = trained(eager, symmetric_qconfig(), task, steps=2)
    mask = torch.ones_like(module.head.weight)
    prune.custom_from_mask(module.head, "weight", mask)  # type: ignore[no-untyped-call]
    module.head.weight_mask[:, :2] = 0
    found = plain(module)
    assert not found.module.get_parameter("head.weight")[:, :2].any()
    assert found.module.get_parameter("head.weight")[:, 2:].any()
    assert "the pruning mask of head.weight is folded into it" in found.notes


def test_refuses_to_lose_a_hook(task: Any) -> None:
    module: Any = trained(eager, symmetric_qconfig(), task, steps=2)
    module.conv2.register_forward_hook(lambda _module, _inputs, output: output * 2)
    with pytest.raises(GpusqError, match="'conv2' has a hook of its own"):
        plain(module)


def test_a_float_module_passes_unchanged() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    found = plain(module)
    assert found.module is module
    assert (found.quantizers, found.notes) == ({}, ())
