from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporters.fake_quantize import attach
from exporters.quantized_modules.plain import plain
from exporters.quantizer import Place
from profiles.errors import GpusqError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

# Brevitas divides, as ONNX does: the attached module is within rounding of float32.
SAME = 1e-5


@pytest.fixture
def brevitas() -> Any:
    import brevitas.nn
    import brevitas.quant

    return brevitas


class Mlp(nn.Module):
    def __init__(self, qnn: Any, act: Any, returns: bool = False, **layer: Any) -> None:
        super().__init__()
        self.fc1 = qnn.QuantLinear(64, 32, input_quant=act, **layer)
        self.act = qnn.QuantReLU(act_quant=act, return_quant_tensor=returns)
        self.fc2 = qnn.QuantLinear(32, 4, output_quant=act, **layer)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc2(self.act(self.fc1(x.flatten(1))))
        return logits


class ConvNet(nn.Module):
    def __init__(self, brevitas: Any) -> None:
        super().__init__()
        qnn, quant = brevitas.nn, brevitas.quant
        self.inp = qnn.QuantIdentity(return_quant_tensor=True)
        self.conv = qnn.QuantConv2d(1, 8, 3, padding=1, weight_quant=quant.Int8WeightPerChannelFloat)
        self.bn = nn.BatchNorm2d(8)
        self.relu = qnn.QuantReLU(act_quant=quant.Int8ActPerTensorFloat)
        self.depthwise = qnn.QuantConv2d(8, 8, 3, padding=1, groups=8, weight_bit_width=4)
        self.add = qnn.QuantEltwiseAdd()
        self.fc = qnn.QuantLinear(8 * 64, 4, weight_quant=quant.Int8WeightPerChannelFloat)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.inp(x))))
        logits: Tensor = self.fc(self.add(x, self.depthwise(x)).flatten(1))
        return logits


def answer(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        answered: Tensor = module.eval()(x)
    return answered


def scales(module: nn.Module) -> list[Tensor]:
    """Every scale that a Brevitas model computes with, by asking its quantizers."""
    found: list[Tensor] = []
    for part in module.modules():
        kinds: Any = part
        if hasattr(part, "quant_weight"):
            found.append(kinds.quant_weight().scale)
        for name in ("input_quant", "act_quant", "output_quant"):
            proxy = part._modules.get(name)
            if proxy is not None and kinds._modules[name].is_quant_enabled:
                found.append(kinds._modules[name].scale())
    return found


@pytest.mark.parametrize(
    ("weight", "options", "range_"),
    [
        ("Int8WeightPerTensorFloat", {}, (-128, 127)),
        ("Int8WeightPerChannelFloat", {}, (-128, 127)),
        ("Int8WeightPerTensorFloat", {"weight_bit_width": 4}, (-8, 7)),
        ("Int8WeightPerTensorFloat", {"weight_bit_width": 2}, (-2, 1)),
        ("Int4WeightPerTensorFloatDecoupled", {}, (-8, 7)),
        ("SignedTernaryWeightPerTensorConst", {}, (-2, 1)),
    ],
)
def test_an_mlp_computes_as_brevitas_does_with_its_very_scales(
    brevitas: Any,
    task: Any,
    compare: Callable[..., Any],
    as_bytes: Callable[..., list[bytes]],
    weight: str,
    options: dict[str, Any],
    range_: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    quant = brevitas.quant
    module = Mlp(brevitas.nn, quant.Int8ActPerTensorFloat, weight_quant=getattr(quant, weight), **options)
    task.train(module)
    expected, trained = answer(module, task.inputs), scales(module)
    found = plain(module)
    compared = compare(expected, found)
    (step,) = (float(found.quantizers[Place("fc2", "output")].scale),)
    assert abs(compared.attached - compared.expected).max() <= SAME
    assert compared.furthest <= step * 1.001
    assert compared.agreement == 1.0
    assert compared.scales == as_bytes(*trained)
    quantizer = found.quantizers[Place("fc1", "weight")]
    assert (quantizer.low, quantizer.high) == range_


def test_a_conv_net_with_a_shared_scale_at_its_sum_computes_as_brevitas_does(
    brevitas: Any, task: Any, compare: Callable[..., Any], as_bytes: Callable[..., list[bytes]]
) -> None:
    torch.manual_seed(0)
    module = ConvNet(brevitas)
    task.train(module)
    expected, trained = answer(module, task.inputs), scales(module)
    found = plain(module)
    head = found.module.get_parameter("fc.weight")
    # From opset 21 on, onnxruntime 1.32 cannot load DQ → Reshape: the Q that it adds fails its own type inference.
    compared = compare(expected, found, opset=19)
    # A sum may land on the other side of a tie: one step of one of the head's inputs, for a handful of its 512.
    one_flip = float(found.quantizers[Place("add", "output")].scale) * float(head.abs().max())
    assert abs(compared.attached - compared.expected).max() <= SAME
    assert compared.furthest <= 8 * one_flip
    assert compared.agreement == 1.0
    assert compared.scales == as_bytes(*trained)


def test_a_quantized_bias_that_needs_the_input_scale_stays_float_and_is_noted(brevitas: Any, task: Any) -> None:
    torch.manual_seed(0)
    quant = brevitas.quant
    module = Mlp(brevitas.nn, quant.Int8ActPerTensorFloat, returns=True, bias_quant=quant.Int32Bias)
    module.fc2.return_quant_tensor = False
    task.train(module, steps=5)
    bias = module.fc1.bias.detach().clone()
    found = plain(module)
    assert torch.equal(found.module.get_parameter("fc1.bias"), bias)
    assert "fc1.bias stays float: its scale is the input's times the weight's" in found.notes


def test_a_bias_with_a_scale_of_its_own_keeps_the_values_it_was_quantized_to(brevitas: Any, task: Any) -> None:
    torch.manual_seed(0)
    quant = brevitas.quant
    bias_quant = quant.Int8BiasPerTensorFloatInternalScaling
    module = Mlp(brevitas.nn, quant.Int8ActPerTensorFloat, bias_quant=bias_quant)
    task.train(module, steps=5)
    quantized = module.eval().fc1.bias_quant(module.fc1.bias).value
    assert not torch.equal(quantized, module.fc1.bias)
    assert torch.equal(plain(module).module.get_parameter("fc1.bias"), quantized)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("Uint8ActPerTensorFloat", "'fc1.input' is quantized asymmetrically: zero-point 0 with integers 0 to 255"),
        ("ShiftedUint8ActPerTensorFloat", "'fc1.input' is quantized asymmetrically: zero-point"),
        ("Fp8e4m3ActPerTensorFloat", "'fc1.input' is quantized by"),
    ],
)
def test_refuses_an_activation_that_is_no_int8_around_0(brevitas: Any, task: Any, act: str, message: str) -> None:
    torch.manual_seed(0)
    quantizer = getattr(brevitas.quant, act)
    module = Mlp(brevitas.nn, quantizer)
    task.train(module, steps=3)
    with pytest.raises(GpusqError) as caught:
        plain(module)
    assert caught.value.message.startswith(message)
    assert "Int8ActPerTensorFloat" in caught.value.hint


class BehindReLU(nn.Module):
    def __init__(self, brevitas: Any, **relu: Any) -> None:
        super().__init__()
        self.fc1 = brevitas.nn.QuantLinear(64, 32, input_quant=brevitas.quant.Int8ActPerTensorFloat)
        self.act = brevitas.nn.QuantReLU(**relu)
        self.fc2 = brevitas.nn.QuantLinear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc2(self.act(self.fc1(x.flatten(1))))
        return logits


def test_refuses_the_unsigned_8_bits_of_a_plain_quant_relu_by_its_name(brevitas: Any, task: Any) -> None:
    torch.manual_seed(0)
    module = BehindReLU(brevitas)
    task.train(module, steps=3)
    with pytest.raises(GpusqError, match=r"^'act\.output' is quantized asymmetrically: .* integers 0 to 255") as caught:
        plain(module)
    assert "act_quant=brevitas.quant.Int8ActPerTensorFloat" in caught.value.hint
    assert "bit_width=7" in caught.value.hint


@pytest.mark.parametrize("cure", ["signed", "seven bits"])
def test_each_cure_that_the_refusal_names_works_with_the_librarys_numbers(
    brevitas: Any, task: Any, compare: Any, as_bytes: Any, cure: str
) -> None:
    torch.manual_seed(0)
    signed = {"act_quant": brevitas.quant.Int8ActPerTensorFloat}
    module = BehindReLU(brevitas, **(signed if cure == "signed" else {"bit_width": 7}))
    task.train(module)
    expected, trained = answer(module, task.inputs), scales(module)
    found = plain(module)
    compared = compare(expected, found)
    relu = found.quantizers[Place("act", "output")]
    assert (relu.low, relu.high) == ((-128, 127) if cure == "signed" else (0, 127))
    assert abs(compared.attached - compared.expected).max() <= SAME
    assert compared.agreement == 1.0
    assert compared.scales == as_bytes(*trained)


def test_refuses_a_float8_weight(brevitas: Any) -> None:
    layer = brevitas.nn.QuantLinear(8, 4, weight_quant=brevitas.quant.Fp8e4m3WeightPerTensorFloat)
    with pytest.raises(GpusqError, match=r"'fc\.weight' is quantized to a FloatQuantTensor, not to integers"):
        plain(nn.ModuleDict({"fc": layer}))


def test_refuses_by_name_a_layer_that_it_does_not_know(brevitas: Any) -> None:
    module = nn.Sequential(nn.Identity(), brevitas.nn.TruncAvgPool2d(2))
    with pytest.raises(GpusqError, match=r"'1' is a brevitas\.nn\.quant_avg_pool\.TruncAvgPool2d"):
        plain(module)


class Others(nn.Module):
    def __init__(self, brevitas: Any) -> None:
        super().__init__()
        qnn, quant = brevitas.nn, brevitas.quant
        per_channel = {"weight_quant": quant.Int8WeightPerChannelFloat}
        self.up = qnn.QuantConvTranspose2d(1, 3, 2, stride=2, **per_channel)
        self.line = qnn.QuantConv1d(3, 4, 3, padding=1, **per_channel)
        self.volume = qnn.QuantConv3d(1, 2, (1, 3, 3), dilation=(1, 2, 2), bias=False, **per_channel)
        self.table = qnn.QuantEmbedding(4, 5)
        self.tanh = qnn.QuantTanh()

    def forward(self, x: Tensor) -> Tensor:
        up = self.line(self.up(x).flatten(2)).flatten(1)
        volume = self.volume(x.unsqueeze(1)).flatten(1)
        table = self.table(torch.arange(4)).reshape(1, -1).expand(len(x), -1)
        joined: Tensor = self.tanh(torch.cat([up, volume, table], dim=1))
        return joined


def test_the_other_layers_compute_as_brevitas_does(brevitas: Any, task: Any) -> None:
    torch.manual_seed(0)
    module = Others(brevitas)
    module.train()(task.inputs[:32])
    expected = answer(module, task.inputs[:32])
    found = plain(module)
    assert {str(place) for place in found.quantizers} == {
        *(f"{name}.weight" for name in ("up", "line", "volume", "table")),
        "tanh.output",
    }
    assert found.quantizers[Place("up", "weight")].axis == 1
    attach(found.module, found.quantizers)
    assert torch.allclose(answer(found.module, task.inputs[:32]), expected, atol=SAME, rtol=0)


def test_a_weight_with_a_scale_for_each_group_keeps_its_values(brevitas: Any) -> None:
    from brevitas.inject.enum import ScalingPerOutputType
    from brevitas.proxy.groupwise_int_parameter_quant import GroupwiseWeightQuantProxyFromInjector

    groups: Any = type(
        "Groups",
        (brevitas.quant.Int8WeightPerTensorFloat,),
        {
            "proxy_class": GroupwiseWeightQuantProxyFromInjector,
            "scaling_per_output_type": ScalingPerOutputType.GROUP,
            "group_size": 8,
            "bit_width": 4,
        },
    )
    layer = brevitas.nn.QuantLinear(32, 4, weight_quant=groups).eval()
    quantized = layer.quant_weight()
    found = plain(nn.ModuleDict({"fc": layer}))
    quantizer = found.quantizers[Place("fc", "weight")]
    assert (quantizer.scale.shape, quantizer.axis, quantizer.block) == ((4, 4), 1, 8)
    assert quantizer.scale.tobytes() == quantized.scale_.detach().numpy().tobytes()
    assert torch.equal(found.module.get_parameter("fc.weight"), quantized.value)


def test_takes_a_ternary_activation_as_three_levels(brevitas: Any, task: Any) -> None:
    module = Mlp(brevitas.nn, brevitas.quant.SignedTernaryActPerTensorConst)
    task.train(module, steps=2)
    scale = float(module.eval().fc1.input_quant.scale())
    quantizer = plain(module).quantizers[Place("fc1", "input")]
    assert (quantizer.low, quantizer.high, float(quantizer.scale)) == (-1, 1, scale)


def test_names_the_layer_whose_scale_is_not_a_number(brevitas: Any, task: Any) -> None:
    """Brevitas takes the absolute value of a learned scale, so that none can be negative."""
    module = Mlp(brevitas.nn, brevitas.quant.Int8ActPerTensorFloat)
    task.train(module, steps=2)
    scaling = module.act.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl
    for held in (scaling.value.data, scaling.buffer):  # the running statistics, and the parameter that they become
        held.fill_(float("nan"))
    with pytest.raises(GpusqError, match=r"the scale of 'act\.output' is nan"):
        plain(module)
