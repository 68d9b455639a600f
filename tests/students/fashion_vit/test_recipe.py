from __future__ import annotations

import copy

import pytest
import torch

from students.fashion_vit.data import Images
from students.fashion_vit.model import FashionVit, fashion_vit
from students.fashion_vit.prune import SparseLinear, linears
from students.fashion_vit.quant import QuantLinear
from students.fashion_vit.recipe import (
    Distillation,
    HardLabels,
    Recipe,
    Stage,
    accuracy,
    agreeing_error,
    fit,
    inverse_weights,
    late_blocks,
    pace,
    quantized_student,
    soft_loss,
    sparse_student,
)

RECIPE = Recipe(epochs=(1, 1, 1), batch=32, range_batches=1)


@pytest.fixture
def images() -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, 10, (64,), generator=generator))


@pytest.fixture
def dense() -> FashionVit:
    torch.manual_seed(0)
    return fashion_vit().eval()


def run(model: FashionVit, loss: HardLabels | Distillation, images: Images) -> None:
    fit(model, Stage("test", 1, 1e-3, loss), images, RECIPE, torch.Generator().manual_seed(0))


def test_dense_stage_trains_every_parameter(dense: FashionVit, images: Images) -> None:
    before = copy.deepcopy(dense.state_dict())
    run(dense, HardLabels(0.05), images)
    for name, now in dense.state_dict().items():
        assert torch.isfinite(now).all()
        assert not torch.equal(now, before[name]), name


def test_sparse_stage_keeps_the_mask_and_the_teacher(dense: FashionVit, images: Images) -> None:
    teacher = copy.deepcopy(dense.state_dict())
    sparse = sparse_student(dense)
    loss = Distillation(RECIPE, dense, torch.ones(late_blocks(dense)))
    run(sparse, loss, images)
    assert torch.isfinite(loss.feature_losses).all()
    assert (loss.feature_losses > 0).all()
    assert all(torch.equal(now, teacher[name]) for name, now in dense.state_dict().items())
    for name, linear in linears(sparse).items():
        assert isinstance(linear, SparseLinear)
        zeros = (linear.weight.detach().reshape(linear.out_features, -1, 4) == 0).sum(-1)
        assert name == "head" or (zeros >= 2).all()


def test_quantized_stage_keeps_the_masks_and_learns_the_scales(dense: FashionVit, images: Images) -> None:
    sparse = sparse_student(dense)
    quantized = quantized_student(sparse, images, RECIPE, torch.Generator().manual_seed(0))
    before = copy.deepcopy(quantized.state_dict())
    run(quantized, Distillation(RECIPE, sparse, torch.ones(late_blocks(dense))), images)
    for name, linear in linears(quantized).items():
        assert isinstance(linear, QuantLinear)
        assert linear.weight.detach()[linear.mask == 0].abs().sum() == 0
        assert not torch.equal(linear.log_input_scale, before[f"{name}.log_input_scale"])
        assert not torch.equal(linear.log_weight_scale, before[f"{name}.log_weight_scale"])


def test_a_stage_is_the_same_for_the_same_seed(images: Images) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        model = fashion_vit()
        run(model, HardLabels(0.05), images)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_loss_is_zero_in_all_but_the_hard_part_for_the_teacher_itself(dense: FashionVit, images: Images) -> None:
    image = torch.randn(8, 1, 28, 28)
    logits = dense(image)
    features = dense.forward_features(image)[-1]
    assert soft_loss(logits, logits, 2.0).item() == pytest.approx(0, abs=1e-6)
    assert agreeing_error(features, features, torch.ones(8, dtype=torch.bool)) == 0


def test_features_count_only_where_teacher_and_student_agree() -> None:
    feature = torch.zeros(2, 1, 4)
    wanted = torch.stack([torch.ones(1, 4), torch.full((1, 4), 10.0)])
    assert agreeing_error(feature, wanted, torch.tensor([True, False])) == 1
    assert agreeing_error(feature, wanted, torch.tensor([False, False])) == 0


def test_feature_weights_are_inverse_to_the_losses_with_mean_one() -> None:
    weights = inverse_weights(torch.tensor([1.0, 2.0, 4.0]))
    assert weights.mean() == pytest.approx(1)
    assert (weights[0] / weights[2]).item() == pytest.approx(4)


def test_pace_rises_to_one_and_falls_to_zero() -> None:
    factors = [pace(step, 1000, 100) for step in range(1001)]
    assert factors[99] == factors[100] == 1
    assert factors[0] == 0.01
    assert factors[1000] == pytest.approx(0)
    assert factors[100:] == sorted(factors[100:], reverse=True)


def test_accuracy_counts_the_largest_logit(images: Images) -> None:
    class Always(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.full((len(image),), 3), 10).float()

    assert accuracy(Always(), images, batch=10) == (images.labels == 3).float().mean().item()
