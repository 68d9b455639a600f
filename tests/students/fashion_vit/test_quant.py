from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from exporters.fake_quantize import fake_quantize
from students.fashion_vit.prune import SparseLinear, two_four_mask
from students.fashion_vit.quant import QuantLinear, best_scale, input_scales, learned_fake_quant


@pytest.mark.parametrize(("low", "high"), [(-128, 127), (-127, 127)])
def test_forward_is_the_formula_bit_for_bit(low: int, high: int) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3
    scale = torch.tensor(0.01713)
    x[:64] = scale * (torch.arange(64) - 32.5)  # ties, as near as float32 gets
    got = learned_fake_quant(x, scale, low, high)
    expected = np.clip(np.rint(x.numpy() / scale.numpy()), np.float32(low), np.float32(high)) * scale.numpy()
    assert got.numpy().tobytes() == expected.astype(np.float32).tobytes()


def test_rounds_ties_to_even_and_clamps() -> None:
    x = torch.tensor([0.25, 0.75, -0.25, -0.75, 1e6, -1e6])
    got = fake_quantize(x, torch.tensor(0.5))
    assert got.tolist() == [0.0, 1.0, 0.0, -1.0, 63.5, -64.0]


def test_divides_where_the_reciprocal_would_round_differently() -> None:
    scale = torch.tensor(0.0123)
    x = torch.arange(-4000, 4000) * (scale / 2)
    by_reciprocal = torch.round(x * (1 / scale))
    assert not torch.equal(torch.round(x / scale), by_reciprocal)
    wide = fake_quantize(x, scale, -8192, 8191)
    assert torch.equal(wide, torch.round(x / scale) * scale)


def test_gradient_of_x_is_straight_through_and_zero_where_clamped() -> None:
    x = torch.tensor([0.1, -0.3, 12.6, 100.0, -100.0], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    torch.autograd.backward(learned_fake_quant(x, torch.tensor(0.1), -128, 127), upstream)
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 0.0, 0.0]


def test_gradient_of_the_scale_is_lsq_s() -> None:
    x = torch.tensor([0.13, -0.38, 100.0, -100.0])
    scale = torch.tensor(0.1, requires_grad=True)
    torch.autograd.backward(learned_fake_quant(x, scale, -128, 127).sum())
    expected = ((1 - 1.3) + (-4 + 3.8) + 127 - 128) / (4 * 127) ** 0.5
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(expected, rel=1e-4)


def test_gradient_of_per_channel_scales_has_their_shape() -> None:
    scale = torch.full((3, 1), 0.1, requires_grad=True)
    torch.autograd.backward(learned_fake_quant(torch.randn(3, 8), scale, -127, 127).sum())
    assert scale.grad is not None
    assert scale.grad.shape == (3, 1)


def test_mask_survives_a_step() -> None:
    source = nn.Linear(8, 4)
    linear = QuantLinear(SparseLinear(source, two_four_mask(source.weight)), torch.tensor(0.02))
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1)
    before = linear.weight.detach().clone()
    linear(torch.randn(16, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(linear.weight, before)
    assert linear.weight[linear.mask == 0].abs().max() == 0
    assert (linear.weight != 0).reshape(4, 2, 4).sum(-1).max() <= 2


def test_dead_channel_gets_a_positive_scale() -> None:
    source = nn.Linear(8, 2)
    with torch.no_grad():
        source.weight[1] = 0
    linear = QuantLinear(SparseLinear(source, two_four_mask(source.weight)), torch.tensor(0.02))
    assert linear.log_weight_scale.exp().min() > 0
    assert torch.isfinite(linear(torch.randn(3, 8))).all()


def test_best_scale_of_zeros_is_positive() -> None:
    assert best_scale(torch.zeros(10)) > 0


def test_best_scale_clips_an_outlier_only_where_that_pays() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert best_scale(x) < x.abs().max() / 127
    assert best_scale(torch.linspace(-1, 1, 1000)) == pytest.approx(1 / 127)


def test_input_scales_are_of_the_inputs_and_leave_no_hooks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    batches = [torch.ones(2, 4), torch.full((2, 4), 3.0)]
    assert input_scales(model, batches)["0"] > 0
    assert not model[0]._forward_pre_hooks
