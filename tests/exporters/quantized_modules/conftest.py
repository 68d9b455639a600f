from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from exporters.fake_quantize import attach
from exporters.linears import array_of
from exporters.quantized_modules.plain import PlainModule
from exporters.signature import Input
from exporters.to_onnx import OPSET, to_onnx

CLASSES, SIDE = 4, 8


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """[count, 1, 8, 8] images of four patterns in noise, and their classes."""
    patterns = torch.randn(CLASSES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return patterns[labels] + 0.5 * torch.randn(count, 1, SIDE, SIDE, generator=generator), labels


@dataclass(frozen=True)
class Task:
    """A classification that a small net learns in some steps, and 256 inputs to compare on."""

    inputs: Tensor
    labels: Tensor

    def train(self, module: nn.Module, steps: int = 60, rate: float = 3e-3) -> None:
        optimizer = torch.optim.Adam(module.parameters(), rate)
        for step in range(steps):
            x, labels = images(32, 100 + step)
            optimizer.zero_grad()
            loss: Any = nn.functional.cross_entropy(module(x), labels)
            loss.backward()
            optimizer.step()


@pytest.fixture(scope="session")
def task() -> Task:
    return Task(*images(256, 1))


@dataclass(frozen=True)
class Compared:
    """How far the plain module and its graph are from the library's own output on the task's inputs."""

    expected: npt.NDArray[np.float32]
    attached: npt.NDArray[np.float32]
    onnx: npt.NDArray[np.float32]
    model: ir.Model

    @property
    def furthest(self) -> float:
        """Largest difference of the logits of the attached module and of the graph."""
        return float(max(np.abs(self.attached - self.expected).max(), np.abs(self.onnx - self.expected).max()))

    @property
    def agreement(self) -> float:
        """Share of inputs on which all three name one class."""
        first = self.expected.argmax(1)
        return float(((self.attached.argmax(1) == first) & (self.onnx.argmax(1) == first)).mean())

    @property
    def scales(self) -> list[bytes]:
        """The scales in the graph, as they are stored, sorted and each once."""
        found = set()
        for node in self.model.graph:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                scale = node.inputs[1]
                assert scale is not None
                found.add(array_of(scale).astype(np.float32).tobytes())
        return sorted(found)


@pytest.fixture
def compare(task: Task, run: Callable[..., npt.NDArray[np.float32]]) -> Callable[..., Compared]:
    """`compare(expected, found)`: attach the quantizers, export, and run both."""

    def compare(expected: Tensor, found: PlainModule, opset: int = OPSET) -> Compared:
        module = copy.deepcopy(found.module)
        attach(module, found.quantizers)
        with torch.no_grad():
            attached = module(task.inputs).numpy()
        inputs = (Input("x", (2, 1, SIDE, SIDE), dynamic={0: "batch"}),)
        model = to_onnx(module, inputs, ["logits"], opset=opset).model
        answered = run(model, x=task.inputs.numpy())
        return Compared(expected.detach().numpy(), attached, answered, model)

    return compare


def as_bytes(*scales: Tensor | float) -> list[bytes]:
    """Scales of a library as `Compared.scales` gives them."""
    arrays = [
        np.asarray(scale.detach().numpy() if isinstance(scale, Tensor) else scale, np.float32) for scale in scales
    ]
    return sorted({array.tobytes() for array in arrays})


@pytest.fixture(scope="session", name="as_bytes")
def as_bytes_fixture() -> Callable[..., list[bytes]]:
    return as_bytes
