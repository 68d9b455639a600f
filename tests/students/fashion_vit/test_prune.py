from __future__ import annotations

import pytest
import torch

from students.fashion_vit.model import fashion_vit
from students.fashion_vit.prune import SparseLinear, linears, prune, two_four_mask


def test_mask_keeps_the_two_largest_of_every_four() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.5, -0.25, 0.125]])
    assert two_four_mask(weight).tolist() == [[0, 1, 1, 0, 0, 1, 1, 0]]


def test_mask_keeps_exactly_two_even_where_magnitudes_are_equal() -> None:
    assert two_four_mask(torch.ones(3, 8)).tolist() == [[1, 1, 0, 0] * 2] * 3
    assert two_four_mask(torch.zeros(3, 8)).sum() == 12


def test_mask_refuses_a_k_that_is_no_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="K is 6"):
        two_four_mask(torch.ones(2, 6))


def test_prunes_everything_but_the_head() -> None:
    model = fashion_vit()
    names = set(linears(model))
    prune(model)
    assert set(linears(model)) == names
    for name, linear in linears(model).items():
        assert isinstance(linear, SparseLinear)
        assert linear.mask.mean() == (1.0 if name == "head" else 0.5)


def test_pruned_weights_are_zero_and_get_no_gradient() -> None:
    model = fashion_vit()
    prune(model)
    model(torch.randn(2, 1, 28, 28)).square().sum().backward()
    linear = model.get_submodule("blocks.0.attn.qkv")
    assert isinstance(linear, SparseLinear)
    assert linear.weight.grad is not None
    assert linear.weight[linear.mask == 0].abs().max() == 0
    assert linear.weight.grad[linear.mask == 0].abs().max() == 0
    assert linear.weight.grad[linear.mask == 1].abs().max() > 0


def test_pruning_keeps_the_names_of_the_state_dict() -> None:
    model = fashion_vit()
    names = list(model.state_dict())
    prune(model)
    assert set(model.state_dict()) == set(names)
