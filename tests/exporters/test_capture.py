from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from exporters import to_onnx as exporter
from exporters.capture import WAYS
from exporters.fake_quantize import attach
from exporters.linears import array_of
from exporters.module_names import MODULE_KEY
from exporters.quantizer import Place, Quantizer
from exporters.signature import Input
from exporters.to_onnx import to_onnx
from profiles.errors import GpusqError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, 8), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(self.norm(x))
        return y


def blocks() -> nn.Module:
    """Two blocks whose constants differ: equal ones would be merged."""
    module = nn.Sequential(Block(), Block())
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


class Attends(nn.Module):
    """Shaped as Hugging Face's Swin is: a trained bias, and heads that are merged by a view of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=self.bias[None].expand(2, -1, -1, -1))
        return y.transpose(1, 2).contiguous().reshape(x.shape)


class BranchesOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class KeepsWhatItMade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grid = torch.empty(0)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.grid.shape != x.shape:
            self.grid = torch.ones_like(x) * 3
            self.steps = 4
        return x * self.grid + self.steps


class TakesAny(nn.Module):
    def forward(self, first: Tensor, *rest: Tensor) -> Tensor:
        return first + sum(rest)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`only(name)`: leave one way."""
    return lambda name: monkeypatch.setattr(exporter, "WAYS", tuple(way for way in WAYS if way.name == name))


BLOCK = Input("x", (2, 4, 8))
NAMES = [way.name for way in WAYS]


def operators(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph)


@pytest.mark.parametrize("way", [name for name in NAMES if "written out" not in name])
@pytest.mark.parametrize("dynamic", [{}, {0: "batch"}])
def test_every_way_gives_the_same_clean_graph(
    way: str, dynamic: dict[int, str], only: Callable[[str], None], run: Callable[..., npt.NDArray[np.float32]]
) -> None:
    if "fixes" in way and not dynamic:
        pytest.skip("there is no axis that could be fixed")
    only(way)
    module = blocks()
    exported = to_onnx(module, [Input("x", (2, 4, 8), dynamic=dynamic)], ["y"])
    assert (exported.way, exported.failed) == (way, ())
    assert operators(exported.model) == sorted(
        ["LayerNormalization", "MatMul", "Add", "Gelu", "MatMul", "Add", "Add"] * 2
    )
    modules = {node.metadata_props.get(MODULE_KEY) for node in exported.model.graph}
    assert modules == {f"{index}{part}" for index in (0, 1) for part in ("", ".norm", ".mlp.0", ".mlp.1", ".mlp.3")}
    assert {"0.mlp.0.weight", "0.mlp.0.bias", "1.norm.weight"} <= set(exported.model.graph.initializers)
    onnx.checker.check_model(ir.to_proto(exported.model), full_check=True)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        expected = module.eval()(x).numpy()
    assert np.abs(run(exported.model, x=x.numpy()) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert str(exported.model.graph.outputs[0].shape) == f"[{dynamic.get(0, 2)},4,8]"


@pytest.mark.parametrize("way", ["torch.export", "TorchScript"])
def test_names_are_the_same_in_a_second_run(way: str, only: Callable[[str], None]) -> None:
    only(way)
    module = blocks()
    first, second = (ir.to_proto(to_onnx(module, [BLOCK], ["y"]).model).SerializeToString() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("way", ["torch.export", "TorchScript"])
def test_leaves_no_path_of_this_machine(way: str, only: Callable[[str], None]) -> None:
    only(way)
    content = ir.to_proto(to_onnx(nn.Sequential(Block()), [BLOCK], ["y"]).model).SerializeToString()
    here = [str(Path.cwd()), "site-packages", str(Path.home()), ".py", "pkg.torch"]
    assert not [trace for trace in here if trace.encode() in content]


@pytest.mark.parametrize("way", ["torch.export", "TorchScript"])
def test_quantizers_become_qdq_with_their_scales(way: str, only: Callable[[str], None]) -> None:
    only(way)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 4))
    scale = np.linspace(0.01, 0.02, 4, dtype=np.float32)
    attach(
        module,
        {
            Place("0", "weight"): Quantizer(scale, axis=0, low=-127),
            Place("0", "input"): Quantizer(np.array(0.03, np.float32)),
        },
    )
    model = to_onnx(module, [Input("x", (2, 8))], ["y"]).model
    assert operators(model) == ["DequantizeLinear", "DequantizeLinear", "Gemm", "QuantizeLinear"]
    stored = {name: array_of(value) for name, value in model.graph.initializers.items()}
    assert stored["0.weight_scale"].tobytes() == scale.tobytes()
    assert stored["0.input_scale"].tobytes() == np.float32(0.03).tobytes()
    assert stored["0.weight_int8"].shape == (4, 8)


@pytest.mark.parametrize("saved", [False, True])
def test_attention_with_a_trained_bias_is_exported(saved: bool, run: Callable[..., npt.NDArray[np.float32]]) -> None:
    module, x = Attends().eval(), torch.randn(2, 6, 8)
    with pytest.raises(torch.onnx.errors.OnnxExporterError):  # as torch exports it
        torch.onnx.export(torch.export.export(module, (x,)), dynamo=True, opset_version=18, verbose=False)
    given: Any = torch.export.export(module, (x,)).module() if saved else module
    exported = to_onnx(given, [Input("x", (2, 6, 8))], ["y"], opset=18)
    expected = module(x).detach().numpy()
    assert exported.way == "torch.export"
    assert np.abs(run(exported.model, x=x.numpy()) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_arguments_of_any_number_may_be_dynamic() -> None:
    inputs = [Input(name, (2, 4), dynamic={0: "batch"}) for name in ("a", "b", "c")]
    model = to_onnx(TakesAny(), inputs, ["y"]).model
    assert [(value.name, str(value.shape)) for value in model.graph.inputs] == [(one, "[batch,4]") for one in "abc"]


def test_no_way_freezes_a_branch_on_data() -> None:
    with pytest.raises(GpusqError, match="could not export the model: Could not guard on data-dependent expression"):
        to_onnx(BranchesOnData(), [Input("x", (4,))], ["y"])


@pytest.mark.parametrize("way", ["torch.export", "TorchScript"])
def test_gives_the_module_back_as_it_was(
    way: str, only: Callable[[str], None], run: Callable[..., npt.NDArray[np.float32]]
) -> None:
    only(way)
    module, x = KeepsWhatItMade(), torch.randn(2, 4)
    model = to_onnx(module, [Input("x", (2, 4))], ["y"]).model
    assert module.grid.shape == (0,)
    assert module.steps == 0
    assert np.abs(run(model, x=x.numpy()) - (x * 3 + 4).numpy()).max() <= 1e-6


def test_a_program_is_exported_as_it_is() -> None:
    program: Any = torch.export.export(nn.Sequential(Block()).eval(), (torch.zeros(2, 4, 8),)).module()
    assert operators(to_onnx(program, [BLOCK], ["y"]).model).count("LayerNormalization") == 1
