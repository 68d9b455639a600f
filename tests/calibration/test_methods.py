"""Each method against the straightforward computation on the values themselves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.histogram import Histogram
from calibration.method_names import LEAST_LOSS, METHODS
from calibration.methods import Method, at_percentile, least_divergent, least_square_error

Array = npt.NDArray[np.float64]
LINEAR = 2048


def drawn() -> Mapping[str, Array]:
    random = np.random.default_rng(0)
    return {
        "normal": random.standard_normal(200_000),
        "laplace": random.laplace(size=200_000),
        "behind a ReLU": np.maximum(random.standard_normal(200_000), 0),
        "heavy tails": random.standard_t(3, 200_000),
        "few": random.standard_normal(300),
        "one outlier": np.append(random.standard_normal(50_000), 100.0),
        "behind a ReLU6": np.clip(4 * random.standard_normal(200_000), 0, 6),
    }


DRAWN = drawn()
OF_ONE_TENSOR = [name for name in METHODS if name != LEAST_LOSS]  # that one needs the model
each = pytest.mark.parametrize("values", DRAWN.values(), ids=DRAWN)


def counted(values: npt.ArrayLike) -> Histogram:
    histogram = Histogram()
    histogram.add(np.asarray(values, np.float32))
    return histogram


def magnitudes(values: Array) -> Array:
    return np.abs(values.astype(np.float32)).astype(np.float64)


def square_error(x: Array, amax: float) -> float:
    scale = amax / 127
    return float(np.square(np.minimum(np.rint(x / scale), 127) * scale - x).mean())


def divergence(counts: Array, end: int) -> float:
    """KL(P ‖ Q) level by level, as Migacz describes it."""
    p = counts[:end].copy()
    p[-1] += counts[end:].sum()
    q = np.zeros(end)
    for level in range(128):
        part = slice(level * end // 128, (level + 1) * end // 128)
        filled = counts[:end][part] > 0
        if filled.any():
            q[part][filled] = counts[:end][part].sum() / filled.sum()
    p, q = p / p.sum(), q / q.sum()
    if (q[p > 0] == 0).any():
        return float("inf")
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@each
@pytest.mark.parametrize("percent", [50, 99, 99.9, 99.99, 100])
def test_percentile_is_in_the_bin_of_the_value_itself(values: Array, percent: float) -> None:
    x = magnitudes(values)
    expected = float(np.percentile(x, percent, method="inverted_cdf"))
    smallest = 2.0**-15 * x.max()  # below it all is one bin
    assert expected <= at_percentile(counted(values), percent) <= max(expected * (1 + 2.0**-11), smallest)


@each
def test_mse_is_the_candidate_with_the_least_error_on_the_values(values: Array) -> None:
    x = magnitudes(values)
    tried = x.max() * 2.0 ** -(np.arange(5 * 64 + 1) / 64)
    expected = tried[np.argmin([square_error(x, amax) for amax in tried])]
    assert least_square_error(counted(values)) == pytest.approx(expected, rel=2.0 ** (1 / 64) - 1 + 1e-9)


@each
def test_mse_is_never_worse_than_clipping_nothing(values: Array) -> None:
    x, histogram = magnitudes(values), counted(values)
    assert square_error(x, least_square_error(histogram)) <= square_error(x, histogram.amax) * (1 + 1e-3)


@each
def test_entropy_is_the_end_with_the_least_divergence_on_the_values(values: Array) -> None:
    x = magnitudes(values)
    width = 2.0 ** np.ceil(np.log2(x.max())) / LINEAR
    counts, _ = np.histogram(x, LINEAR, (0, LINEAR * width))
    counts = np.trim_zeros(counts, "b").astype(np.float64)
    allowed = [end for end in range(128, len(counts) + 1) if counts[end:].sum() <= 1e-3 * len(x)]
    counts[0] = counts[1]
    expected = allowed[int(np.argmin([divergence(counts, end) for end in allowed]))] * width
    assert least_divergent(counted(values)) == min(expected, x.max())


@pytest.mark.parametrize("name", OF_ONE_TENSOR)
@example(np.array([1e-45], np.float32))
@given(hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-1024, 1024, width=32)))
def test_no_method_exceeds_the_largest_value(name: str, values: npt.NDArray[np.float32]) -> None:
    amax = Method(name)(counted(values))  # type: ignore[arg-type]
    assert 0 <= amax <= np.abs(values).max()
    assert (amax > 0) == bool(values.any())


@pytest.mark.parametrize("name", OF_ONE_TENSOR)
def test_heavy_tails_are_clipped_by_all_but_max(name: str) -> None:
    x = DRAWN["heavy tails"]
    amax = Method(name)(counted(x))  # type: ignore[arg-type]
    largest = np.abs(x.astype(np.float32)).max()
    assert amax == largest if name == "max" else amax < 0.75 * largest


def test_zeros_have_no_range() -> None:
    assert [Method(name)(counted(np.zeros(5))) for name in OF_ONE_TENSOR] == [0, 0, 0, 0]
