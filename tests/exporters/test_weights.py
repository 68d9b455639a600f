"""State dicts that quantization libraries saved, through the whole loader and back out of the ONNX file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploy.onnxruntime_api import open_session
from exporters.checkpoint import LoadOptions, load_student
from exporters.save_onnx import save_onnx
from exporters.signature import Input
from profiles.errors import GpusqError

# By the libraries about each other.
pytestmark = pytest.mark.filterwarnings("ignore::Warning")
X = (Input("x", (1, 8)),)
FACTORIES = """
import torch
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def brevitas():
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    def linear(k, n):
        return qnn.QuantLinear(k, n, True, Int8WeightPerChannelFloat, input_quant=Int8ActPerTensorFloat)

    return nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 4))


def fx():
    import torch.ao.quantization as tq
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    activation = tq.FakeQuantize.with_args(
        observer=tq.MovingAverageMinMaxObserver, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric,
        quant_min=-128, quant_max=127,
    )
    config = tq.QConfig(activation=activation, weight=tq.default_per_channel_weight_fake_quant)
    return prepare_qat_fx(mlp().train(), tq.QConfigMapping().set_global(config), (torch.zeros(1, 8),))
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "users_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.reload(importlib.import_module("users_factories"))


def trained(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(32, 8)).pow(2).mean().backward()
        optimizer.step()
    return module.eval()


def brevitas(factories: Any, path: Path) -> nn.Module:
    module = trained(factories.brevitas())
    torch.save(module.state_dict(), path)
    return module


def fx(factories: Any, path: Path) -> nn.Module:
    module = trained(factories.fx())
    torch.save({"state_dict": module.state_dict()}, path)
    return module


def torchao(factories: Any, path: Path) -> nn.Module:
    library: Any = importlib.import_module("torchao.quantization")
    module: nn.Module = factories.mlp().eval()
    library.quantize_(module, library.Int8WeightOnlyConfig())
    torch.save(module.state_dict(), path)
    return module


def modelopt(factories: Any, path: Path) -> nn.Module:
    quantization: Any = importlib.import_module("modelopt.torch.quantization")
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    module = trained(quantization.quantize(factories.mlp(), quantization.INT8_DEFAULT_CFG, lambda m: m(x)))
    importlib.import_module("modelopt.torch.opt").save(module, path)
    return module


@pytest.mark.parametrize(("make", "factory"), [(brevitas, "brevitas"), (fx, "fx"), (torchao, "mlp"), (modelopt, "mlp")])
def test_a_librarys_state_dict_answers_as_its_own_module(
    make: Callable[[Any, Path], nn.Module], factory: str, factories: Any, tmp_path: Path
) -> None:
    module = make(factories, tmp_path / "student.bin")
    student = load_student(tmp_path / "student.bin", LoadOptions(f"users_factories:{factory}", X, ("x:0",)))
    assert student.quantized == 2
    save_onnx(student.export().model, tmp_path / "student.onnx")
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(x).numpy()
    found = open_session(tmp_path / "student.onnx").run(None, {"x": x.numpy()})[0]
    assert np.abs(found - expected).max() <= np.abs(expected).max() / 127  # one step of the output's range
    assert np.array_equal(found.argmax(1), expected.argmax(1))


def test_a_checkpoint_of_another_preparation_is_refused_in_the_librarys_words(factories: Any, tmp_path: Path) -> None:
    torch.save(factories.mlp().state_dict(), tmp_path / "student.pth")
    with pytest.raises(GpusqError, match="the tensors do not fit users_factories:fx") as caught:
        load_student(tmp_path / "student.pth", LoadOptions("users_factories:fx", X))
    assert "prepare the model" in caught.value.hint
