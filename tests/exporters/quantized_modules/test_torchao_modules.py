from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporters.quantized_modules.plain import plain
from exporters.quantizer import Place
from exporters.tensors import read_tensors
from profiles.errors import GpusqError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchao.quantization as ao
    from torchao.quantization import qat

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

# Weights alone are quantized: float32 rounding is all that is left.
SAME = 1e-5
INT2, INT4 = (getattr(torch, name) for name in ("int2", "int4"))  # torch's stubs lack them


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))
        return logits


def weights(dtype: torch.dtype, granularity: Any, *, symmetric: bool = True) -> Any:
    return qat.IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=symmetric)


def per_token() -> Any:
    return qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)


def trained(task: Any, **configs: Any) -> nn.Module:
    torch.manual_seed(0)
    module = Mlp()
    ao.quantize_(module, qat.QATConfig(step="prepare", **configs))
    task.train(module)
    return module.eval()


def converted(task: Any, config: Any) -> nn.Module:
    module = trained(task, weight_config=weights(INT4, ao.PerGroup(16)))
    ao.quantize_(module, qat.QATConfig(step="convert"))
    ao.quantize_(module, config)
    return module


def answer(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        answered: Tensor = module(x)
    return answered


@pytest.mark.parametrize(
    ("dtype", "granularity", "shape"),
    [
        (INT4, ao.PerGroup(16), (32, 4)),
        (torch.int8, ao.PerAxis(0), (32,)),
        (INT2, ao.PerGroup(32), (32, 2)),
    ],
    ids=["int4 groups", "int8 channels", "int2 groups"],
)
def test_a_model_in_training_computes_as_torchao_does_with_its_very_scales(
    task: Any,
    compare: Callable[..., Any],
    as_bytes: Callable[..., list[bytes]],
    dtype: torch.dtype,
    granularity: Any,
    shape: tuple[int, ...],
) -> None:
    module: Any = trained(task, weight_config=weights(dtype, granularity))
    expected = answer(module, task.inputs)
    held = [layer.weight_fake_quantizer.scale.T.contiguous() for layer in (module.fc1, module.fc2, module.head)]
    found = plain(module)
    compared = compare(expected, found)
    assert found.quantizers[Place("fc1", "weight")].scale.shape == shape
    assert compared.furthest <= SAME
    assert compared.agreement == 1.0
    stored = compared.scales
    either = {*as_bytes(*held), *as_bytes(*(scale.T.contiguous() for scale in held))}
    assert len(stored) == 3
    assert set(stored) <= either


@pytest.mark.parametrize(
    "config",
    [
        ao.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=ao.PerGroup(16)),
        ao.IntxWeightOnlyConfig(weight_dtype=INT2, granularity=ao.PerAxis(0)),
        ao.Int8WeightOnlyConfig(version=2),
    ],
    ids=["int4 groups", "int2 channels", "int8 channels"],
)
def test_converted_weights_keep_their_integers_and_scales(task: Any, compare: Callable[..., Any], config: Any) -> None:
    module: Any = converted(task, config)
    expected, tensor = answer(module, task.inputs), copy.deepcopy(module.fc2.weight)
    found = plain(module)
    quantizer = found.quantizers[Place("fc2", "weight")]
    assert quantizer.scale.tobytes() == tensor.scale.contiguous().numpy().tobytes()
    assert (quantizer.integers(found.module.get_parameter("fc2.weight").numpy()) == tensor.qdata.numpy()).all()
    compared = compare(expected, found)
    assert compared.furthest <= SAME
    assert compared.agreement == 1.0


def test_static_activation_scales_become_input_quantizers(task: Any, compare: Callable[..., Any]) -> None:
    config = ao.Int8StaticActivationInt8WeightConfig(
        act_quant_scale=torch.tensor([[0.03]]), granularity=[ao.PerTensor(), ao.PerRow()]
    )
    module = converted(task, config)
    expected = answer(module, task.inputs)
    found = plain(module)
    assert found.quantizers[Place("fc2", "input")].scale.tobytes() == torch.tensor(0.03).numpy().tobytes()
    head = found.module.get_parameter("head.weight")
    compared = compare(expected, found)
    assert compared.furthest <= 2 * 0.03 * float(head.abs().max())
    assert compared.agreement == 1.0


def test_asymmetric_four_bit_weights_fold_into_int8(task: Any, compare: Callable[..., Any]) -> None:
    config = ao.IntxWeightOnlyConfig(
        weight_dtype=INT4, granularity=ao.PerGroup(16), mapping_type=ao.MappingType.ASYMMETRIC
    )
    module: Any = converted(task, config)
    assert module.fc1.weight.zero_point.any()
    expected = answer(module, task.inputs)
    compared = compare(expected, plain(module))
    assert compared.furthest <= SAME
    assert compared.agreement == 1.0


def test_refuses_asymmetric_eight_bit_weights(task: Any) -> None:
    config = ao.IntxWeightOnlyConfig(weight_dtype=torch.int8, mapping_type=ao.MappingType.ASYMMETRIC)
    module: Any = converted(task, config)
    with torch.no_grad():
        module.fc1.weight.zero_point.fill_(100)
    with pytest.raises(GpusqError, match=r"'fc1\.weight' is quantized asymmetrically"):
        plain(module)


@pytest.mark.parametrize("state", ["training", "int8", "intx"])
def test_refuses_dynamic_activations_unless_they_may_be_dropped(task: Any, state: str) -> None:
    module = {
        "training": lambda: trained(task, weight_config=weights(INT4, ao.PerGroup(16)), activation_config=per_token()),
        "int8": lambda: converted(task, ao.Int8DynamicActivationInt8WeightConfig(version=2)),
        "intx": lambda: converted(
            task,
            ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=INT4, weight_granularity=ao.PerGroup(16)),
        ),
    }[state]()
    with pytest.raises(GpusqError, match=r"'fc1\.input' is quantized dynamically .*computed anew") as caught:
        plain(copy.deepcopy(module))
    assert "no dynamic INT8" in caught.value.hint
    found = plain(module, drop_dynamic=True)
    assert set(found.quantizers) == {Place(name, "weight") for name in ("fc1", "fc2", "head")}
    assert len([note for note in found.notes if "dynamic" in note]) == 3


def test_the_older_quantizer_gives_its_weights(task: Any) -> None:
    torch.manual_seed(0)
    quantizer: Any = pytest.importorskip("torchao.quantization.qat.linear").Int8DynActInt4WeightQATQuantizer(
        groupsize=16
    )
    prepared = quantizer.prepare(Mlp())
    task.train(prepared, steps=5)
    in_training = plain(copy.deepcopy(prepared), drop_dynamic=True)
    after = plain(quantizer.convert(prepared), drop_dynamic=True)
    for place, kept in in_training.quantizers.items():
        assert kept.scale.tobytes() == after.quantizers[place].scale.tobytes()
        assert torch.equal(in_training.module.get_parameter(str(place)), after.module.get_parameter(str(place)))


def test_refuses_by_name_a_tensor_that_it_does_not_know() -> None:
    from torchao.quantization import Float8Tensor

    module: Any = nn.Sequential(nn.Linear(16, 16))
    tensor = Float8Tensor.from_hp(module[0].weight.detach(), granularity=ao.PerTensor())
    module[0].weight = nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(GpusqError, match=r"'0\.weight' is a torchao\..*Float8Tensor"):
        plain(module)


def test_its_tensors_are_read_though_torch_alone_refuses_them(task: Any, tmp_path: Path) -> None:
    module = converted(task, ao.Int8WeightOnlyConfig(version=2))
    torch.save(module.state_dict(), tmp_path / "student.pt")
    state = read_tensors(tmp_path / "student.pt").state
    assert type(state["fc1.weight"]).__qualname__ == "Int8Tensor"
    code = "import sys, torch; torch.load(sys.argv[1], weights_only=True)"
    alone = subprocess.run([sys.executable, "-c", code, tmp_path / "student.pt"], capture_output=True, text=True)
    assert "Unsupported" in alone.stderr or "not an allowed global" in alone.stderr
