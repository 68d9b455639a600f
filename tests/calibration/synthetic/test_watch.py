from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.synthetic.watch import Watch


class Attends(nn.Module):
    """One attention, written out."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        weights = functional.dropout((x @ x.transpose(-2, -1)).softmax(-1), training=self.training)
        return self.product(weights, x) + 1


def normalizing() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.25), nn.ReLU())
    network(torch.randn(8, 3, 6, 6))
    return network.eval()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # run_decompositions warns of its own code
@pytest.mark.parametrize("way", ["module", "program", "decomposed program"])
def test_sees_what_a_batch_norm_was_given_however_it_is_written(way: str) -> None:
    network, x = normalizing(), torch.randn(2, 3, 6, 6)
    norm, expected = network.get_submodule("1"), network.get_submodule("0")(x)
    if way != "module":
        program = torch.export.export(network, (x,))
        network = (program.run_decompositions() if way == "decomposed program" else program).module()
    with Watch() as watch:
        network(x)
    (found,) = watch.norms
    assert torch.equal(found.input, expected)
    assert torch.equal(found.mean, norm.get_buffer("running_mean"))
    assert torch.equal(found.variance, norm.get_buffer("running_var"))
    assert found.epsilon == 0.25


@pytest.mark.parametrize("product", [torch.matmul, lambda a, b: a @ b, Tensor.matmul], ids=["function", "@", "method"])
def test_sees_an_attention_that_is_written_out(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 5, 4)
    with Watch() as watch:
        result = Attends(product).eval()(x)
    (found,) = watch.attentions
    assert torch.allclose(found, result - 1, atol=1e-6)


def test_sees_the_fused_attention() -> None:
    x = torch.randn(2, 3, 5, 4)
    with Watch() as watch:
        result = functional.scaled_dot_product_attention(x, x, x)
    assert [torch.equal(found, result) for found in watch.attentions] == [True]


def test_a_softmax_over_classes_and_a_norm_without_statistics_are_not_seen() -> None:
    network = nn.Sequential(
        nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3), nn.Softmax(1), nn.Linear(3, 2)
    )
    with Watch() as watch:
        network(torch.randn(5, 4))
    assert (watch.norms, watch.attentions) == ([], [])


def test_what_is_seen_has_a_gradient() -> None:
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    network = normalizing()
    with Watch() as watch:
        network(x)
    watch.norms[0].input.square().sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
