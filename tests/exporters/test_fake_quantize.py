from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporters.fake_quantize import FakeQuantize, attach, fake_quantize
from exporters.quantizer import Place, Quantizer
from exporters.signature import Input
from exporters.student import ModuleStudent
from profiles.errors import GpusqError

X = Input("x", (2, 3, 8), dynamic={0: "batch"})
SCALE = np.array(0.05, np.float32)
ROWS = np.linspace(0.01, 0.02, 4, dtype=np.float32)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.left_out = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


def quantizers() -> dict[Place, Quantizer]:
    return {Place("fc", "input"): Quantizer(SCALE), Place("fc", "weight"): Quantizer(ROWS, axis=0)}


def test_quantizes_input_weight_and_output() -> None:
    module = Unused()
    plain, x = module.fc.weight.detach().clone(), torch.randn(2, 8)
    attach(module, {**quantizers(), Place("fc", "output"): Quantizer(SCALE)})
    weight = fake_quantize(plain, torch.from_numpy(ROWS)[:, None])
    expected = nn.functional.linear(fake_quantize(x, torch.tensor(0.05)), weight, module.fc.bias)
    assert torch.equal(module(x), fake_quantize(expected, torch.tensor(0.05)))


def test_computes_as_the_quantizer_does() -> None:
    quantizer = Quantizer(np.full((2, 2), 0.1, np.float32), axis=1, block=4, low=-8, high=7)
    x = np.random.default_rng(0).standard_normal((2, 8), np.float32)
    found = FakeQuantize(quantizer, Place("fc", "weight"))(torch.from_numpy(x)).numpy()
    assert np.array_equal(found, quantizer.real(quantizer.integers(x)))


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (Place("gone", "weight"), "no module 'gone'"),
        (Place("fc", "gone"), r"no parameter 'fc\.gone'"),
    ],
)
def test_scales_without_their_layer_are_named(place: Place, expected: str) -> None:
    with pytest.raises(GpusqError, match=expected):
        attach(Unused(), {place: Quantizer(SCALE)})


def test_scales_that_do_not_fit_are_named() -> None:
    with pytest.raises(GpusqError, match=r"scale of 'fc\.weight' is \[4\], expected \[8\]"):
        attach(Unused(), {Place("fc", "weight"): Quantizer(ROWS, axis=1)})


def test_a_student_keeps_its_float_module_and_shares_its_weights() -> None:
    student = ModuleStudent(Unused().eval(), (X,), quantizers=quantizers())
    x = np.random.default_rng(0).standard_normal((2, 3, 8), np.float32)
    (quantized,), (plain,) = student.predict({"x": x}), student.predict({"x": x}, scales=False)
    assert not np.array_equal(quantized, plain)
    assert not any(isinstance(module, FakeQuantize) for module in student.module.modules())
    assert (student.quantized, student.parameters) == (1, 2 * (8 * 4 + 4))


def test_scales_that_the_forward_does_not_use_are_not_lost_in_silence() -> None:
    lost = {Place("left_out", "input"): Quantizer(SCALE)}
    with pytest.raises(GpusqError, match=r"trained scale of 'left_out\.input' would be lost"):
        ModuleStudent(Unused().eval(), (X,), quantizers=lost).export()
