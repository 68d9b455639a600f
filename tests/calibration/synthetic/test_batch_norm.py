from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibration.synthetic.batch_norm import statistics_distance
from calibration.synthetic.watch import Normalized


def standard(shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """[1000, 2] of exactly mean `shift` and deviation `scale`."""
    x = torch.linspace(-1, 1, 1000).repeat(2, 1).T
    return (x - x.mean(0)) / x.std(0, unbiased=False) * scale + shift


@given(mean=st.floats(-3, 3), deviation=st.floats(0.1, 3))
def test_nothing_is_nearer_than_the_same_statistics(mean: float, deviation: float) -> None:
    there = (torch.full((2,), mean), torch.full((2,), deviation**2))
    same = statistics_distance([Normalized(standard(mean, deviation), *there, 0.0)])
    assert abs(float(same)) <= 1e-4
    for other in (standard(mean + 0.2, deviation), standard(mean, 1.2 * deviation)):
        assert float(statistics_distance([Normalized(other, *there, 0.0)])) > float(same)


@given(st.floats(-2, 2), st.floats(0.2, 3))
def test_is_the_divergence_of_two_normal_distributions(mean: float, deviation: float) -> None:
    of = torch.distributions.Normal(torch.tensor(mean), torch.tensor(deviation))
    expected = torch.distributions.kl_divergence(of, torch.distributions.Normal(0.0, 1.0))
    found = statistics_distance([Normalized(standard(mean, deviation), torch.zeros(2), torch.ones(2), 0.0)])
    assert float(found) == pytest.approx(float(expected), abs=1e-3)


def test_has_no_unit() -> None:
    norms = [Normalized(standard(2) * unit, torch.zeros(2), torch.full((2,), unit**2), 0.0) for unit in (1.0, 100.0)]
    first, second = (float(statistics_distance([norm])) for norm in norms)
    assert first == pytest.approx(second, rel=1e-4)


def test_a_dead_channel_counts_little() -> None:
    norm = Normalized(torch.zeros(10, 2), torch.zeros(2), torch.full((2,), 1e-12), 1e-5)
    assert abs(float(statistics_distance([norm]))) <= 1e-5


def test_all_axes_but_the_channels_are_one() -> None:
    flat, there = standard(1, 2), (torch.zeros(2), torch.ones(2))
    image = flat.reshape(10, 10, 10, 2).permute(0, 3, 1, 2)
    found = [float(statistics_distance([Normalized(x, *there, 1e-5)])) for x in (flat, image)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
