from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.manifest import Interval
from deploy.timing.statistics import Resampling, draws, exponential, holm, log_ratio, pairs_to_decide, percentile
from deploy.timing.taken import verdict_of

Samples = npt.NDArray[np.float64]
QUICK = Resampling(resamples=400)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=500), st.sampled_from([50, 90, 95, 99]))
def test_percentile_is_a_sample_with_about_that_share_below_it(samples: list[float], p: int) -> None:
    found = percentile(np.asarray(samples), p)
    assert found in samples
    assert sum(sample <= found for sample in samples) >= len(samples) * p / 100 - 1
    assert percentile(np.asarray(samples), 99) >= found


def test_percentiles_of_a_thousand_samples() -> None:
    """Worked by hand from sampleReporting.cpp: index 999 − int(0.01 · 1000) = 989, 999 − 500 = 499."""
    assert percentile(np.arange(1000.0), 99) == 989
    assert percentile(np.arange(1000.0), 50) == 499


def machine(seed: int, slowdown: float, pairs: int = 200, noisy: bool = False) -> tuple[Samples, Samples]:
    """Latencies in ms of a baseline and a candidate on a machine that drifts, interrupts calls, and may be shared.

    A noisy neighbour takes half of the speed in stretches of about 25 pairs, half of the time; within a pair it comes
    or goes at random.
    """
    random = np.random.default_rng(seed)
    drift = 1 + 0.5 * np.linspace(0, 1, pairs)
    load = np.ones((2, pairs))
    if noisy:
        stretch = np.repeat(random.random(pairs // 25 + 1) < 0.5, 25)[:pairs]
        load += stretch * (random.random((2, pairs)) < 0.9)
    noise = random.lognormal(0, 0.05, (2, pairs)) + 5 * (random.random((2, pairs)) < 0.02)
    baseline, candidate = 3.0 * drift * load * noise
    return baseline, slowdown * candidate


def verdicts(slowdown: float, runs: int, noisy: bool = False) -> list[str]:
    """The verdicts where the noise floor comes from a pilot of half as many pairs on the same machine."""
    found: list[str] = []
    for seed in range(runs):
        pilot = log_ratio(*machine(1000 + seed, 1.0, 100, noisy), QUICK)
        floor = math.expm1(max(abs(pilot.low), abs(pilot.high)))
        found.append(verdict_of(log_ratio(*machine(seed, slowdown, noisy=noisy), QUICK), floor))
    return found


def test_equals_are_called_different_in_at_most_one_case_of_twenty() -> None:
    assert sum(verdict != "inconclusive" for verdict in verdicts(1.0, 200)) <= 10


@pytest.mark.parametrize(("slowdown", "share"), [(1.05, 0.80), (1.10, 0.95), (1.20, 0.99)])
def test_finds_a_slowdown_as_often_as_is_promised(slowdown: float, share: float) -> None:
    found = verdicts(slowdown, 100)
    assert found.count("slower") >= share * len(found)
    assert "faster" not in found


def test_a_noisy_neighbour_makes_no_regression_of_equals() -> None:
    found = verdicts(1.0, 100, noisy=True)
    assert sum(verdict != "inconclusive" for verdict in found) <= 5


def test_an_interval_over_blocks_is_wider_where_neighbours_are_alike() -> None:
    """Ratios that stay for 20 pairs hold a twentieth of the information of as many single ones."""
    random = np.random.default_rng(0)
    alike = np.exp(np.repeat(random.normal(0, 0.1, 20), 20))
    mixed = random.permutation(alike)
    ones = np.ones_like(alike)
    found = [log_ratio(samples, ones) for samples in (alike, mixed)]
    assert found[0].high - found[0].low > 1.5 * (found[1].high - found[1].low)


@given(st.integers(1, 400))
def test_a_resample_has_as_many_samples_as_there_are(count: int) -> None:
    indices = draws(count, Resampling(resamples=3))
    assert indices.shape == (3, count)
    assert indices.min() >= 0
    assert indices.max() < count


@given(st.floats(0.1, 10))
def test_a_ratio_without_noise_is_itself(ratio: float) -> None:
    below = np.linspace(1, 2, 50)
    found = exponential(log_ratio(ratio * below, below, Resampling(resamples=10)))
    assert found.low == pytest.approx(found.high) == pytest.approx(ratio)


def test_holm_by_hand() -> None:
    """0.01·3 = 0.03, 0.02·2 = 0.04, 0.04·1 = 0.04."""
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_only_raises_and_keeps_the_order(found: list[float]) -> None:
    adjusted = holm(found)
    assert all(before <= after <= 1 for before, after in zip(found, adjusted, strict=True))
    assert [after for _, after in sorted(zip(found, adjusted, strict=True))] == sorted(adjusted)


def test_tells_how_many_more_pairs_would_decide() -> None:
    """The half-width is 0.04, the distance 0.02: four times the pairs, so three times as many more."""
    found = Interval(value=0.02, low=-0.02, high=0.06)
    assert pairs_to_decide(found, 0.0, 200) == 600
    assert pairs_to_decide(found, 0.02, 200) is None
