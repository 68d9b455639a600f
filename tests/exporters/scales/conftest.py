"""Small classifiers with real margins, and the road from a state dict with scales to an ONNX graph on onnxruntime."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from deploy.onnxruntime_api import open_session
from exporters.fake_quantize import attach
from exporters.linears import array_of
from exporters.quantizer import Place
from exporters.scales import Hints, TakenScales, take_scales
from exporters.scales.factors import multiply_inputs
from exporters.signature import Input
from exporters.to_onnx import to_onnx

CLASSES, COUNT = 10, 256


@dataclass(frozen=True)
class Task:
    """A classifier, the shape of its inputs, and data that it can learn: one prototype per class, and noise."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def data(self, seed: int, count: int = COUNT) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        prototypes = torch.randn(CLASSES, *self.shape, generator=torch.Generator().manual_seed(7))
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        return prototypes[labels] + 0.5 * torch.randn(count, *self.shape, generator=generator), labels

    def train(self, module: nn.Module, steps: int, rate: float = 2e-3) -> nn.Module:
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], rate)
        for step in range(steps):
            x, labels = self.data(100 + step, 64)
            loss = nn.functional.cross_entropy(module(x), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return module.eval()

    def trained(self) -> nn.Module:
        """A trained network; the same at each call."""
        if self.make not in _TRAINED:
            torch.manual_seed(0)
            _TRAINED[self.make] = self.train(self.make(), 25).state_dict()
        module = self.make().eval()
        module.load_state_dict(_TRAINED[self.make])
        return module


_TRAINED: dict[Callable[[], nn.Module], dict[str, Tensor]] = {}


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES, bias=True)
    )


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, CLASSES),
    )


def _vit() -> nn.Module:
    import timm

    module: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=32, patch_size=8, num_classes=CLASSES
    )
    return module


TASKS = {
    "mlp": Task(_mlp, (256,)),
    "conv": Task(_conv, (3, 16, 16)),
    "vit": Task(_vit, (3, 32, 32)),
}


@pytest.fixture
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[getattr(request, "param", "mlp")]


@dataclass(frozen=True)
class Road:
    """What became of a state dict: the scales that were taken, the reference, the graph and their outputs."""

    taken: TakenScales
    reference: nn.Module
    graph: ir.Model
    outputs: npt.NDArray[np.float32]
    on_onnxruntime: npt.NDArray[np.float32]

    def agrees(self, expected: npt.NDArray[np.float32]) -> None:
        """Assert that all three answer alike: within one INT8 step of the outputs' range, the same top-1 everywhere."""
        step = float(np.abs(expected).max()) / 127
        for name, outputs in (("torch", self.outputs), ("onnxruntime", self.on_onnxruntime)):
            worst = float(np.abs(outputs - expected).max())
            print(f"{name}: the largest difference is {worst:.1e}, one step {step:.1e}")
            assert worst <= step, name
            assert (outputs.argmax(1) == expected.argmax(1)).all(), name
        best = np.sort(expected, axis=1)
        assert np.median(best[:, -1] - best[:, -2]) > 10 * step  # the classes are told apart, so top-1 says something

    def scale(self, name: str) -> npt.NDArray[np.generic]:
        """The scale of that name in the graph, in the layout of the weight in torch."""
        held = array_of(self.graph.graph.initializers[name])
        module, _, tensor = name.removesuffix("_scale").rpartition(".")
        transposed = held.shape != self.taken.quantizers[Place(module, tensor)].scale.shape
        return np.ascontiguousarray(held.T) if transposed else held


@pytest.fixture
def travel(tmp_path: Path) -> Callable[..., Road]:
    def travel(
        task: Task,
        state: Mapping[str, Tensor],
        metadata: Mapping[str, Any] | None = None,
        hints: Hints | None = None,
        module: nn.Module | None = None,
    ) -> Road:
        taken = take_scales(state, metadata, hints)
        module = (module or task.make()).eval()
        module.load_state_dict(taken.state)
        multiply_inputs(module, taken.factors)
        attach(module, taken.quantizers)
        x, _ = task.data(1)
        with torch.inference_mode():
            outputs = module(x).numpy()
        graph = to_onnx(module, [Input("x", (2, *task.shape), dynamic={0: "batch"})], ["logits"]).model
        ir.save(graph, tmp_path / "student.onnx")
        (found,) = open_session(tmp_path / "student.onnx").run(None, {"x": x.numpy()})
        return Road(taken, module, graph, outputs, found)

    return travel


@pytest.fixture(scope="session")
def modelopt() -> Any:
    """`modelopt.torch`; it warns while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("opt", "quantization", "sparsity"):
            importlib.import_module(f"modelopt.torch.{name}")
        return importlib.import_module("modelopt.torch")


@pytest.fixture(scope="session")
def compressed_tensors() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("compressed_tensors")


@pytest.fixture(scope="session")
def bitnet() -> Any:
    """Hugging Face's BitNet; it compiles while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("transformers.integrations.bitnet")
