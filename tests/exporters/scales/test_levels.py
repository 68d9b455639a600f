from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.scales.levels import levels_of


@settings(max_examples=100, deadline=None)
@given(
    bits=st.integers(1, 4),
    channels=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_finds_the_step_of_integers_times_a_scale(bits: int, channels: int, dtype: torch.dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    high = 1 << (bits - 1)
    integers = rng.integers(-high, high, (channels, 64))
    integers[:, :2] = [-1, 0]
    scale = torch.from_numpy(rng.uniform(0.01, 1, (channels, 1)).astype(np.float32)).to(dtype)
    weight = (torch.from_numpy(integers).to(torch.float32) * scale.float()).to(dtype)
    found = levels_of(weight)
    assert found is not None
    assert found.uniform
    assert found.scale is not None
    assert found.count == max(len(np.unique(row)) for row in integers)
    back = np.rint(weight.float().numpy() / found.scale[:, None])
    assert np.array_equal(back, integers)


def test_ternary_and_binary_channels_and_dead_ones() -> None:
    weight = torch.tensor([[-0.3, 0.0, 0.3, 0.3], [0.7, -0.7, 0.7, -0.7], [0.0, 0.0, 0.0, 0.0]])
    found = levels_of(weight)
    assert found is not None
    assert (found.count, found.uniform) == (3, True)
    assert found.scale is not None
    assert np.array_equal(found.scale, np.array([0.3, 0.7, 1.0], np.float32))


@pytest.mark.parametrize("levels", [[-1.0, -0.31, 0.12, 0.77], np.tanh(np.linspace(-2, 2, 16)).tolist()])
def test_a_codebook_is_not_uniform(levels: list[float]) -> None:
    codes = torch.randint(0, len(levels), (4, 64), generator=torch.Generator().manual_seed(0))
    codes[:, : len(levels)] = torch.arange(len(levels))
    found = levels_of(torch.tensor(levels)[codes])
    assert found is not None
    assert (found.count, found.uniform, found.scale) == (len(levels), False, None)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(4, 64, generator=torch.Generator().manual_seed(0)),
        torch.zeros(4),
        torch.zeros(4, 4, dtype=torch.int8),
    ],
)
def test_other_weights_have_no_levels(weight: torch.Tensor) -> None:
    assert levels_of(weight) is None
