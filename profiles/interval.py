"""The 80 % interval of a predicted figure, from the residuals of the fit.

The residuals are of the logarithm, so an interval is a factor: value × e^(±1.28 σ). Time that is not modelled widens
it: that share may be missing by half or take twice as long.
"""

from __future__ import annotations

import math

from profiles.cost_parameters import Uncertainty

_QUANTILE = 1.2816  # of the normal distribution, at 90 %


def interval(value: float, uncertainty: Uncertainty, *, unmodelled: float = 0.0) -> tuple[float, float]:
    """Return the ends of the 80 % interval of a latency.

    Args:
        value: the latency.
        uncertainty: of the fit.
        unmodelled: share of the latency that the model does not know.
    """
    sigma = math.hypot(uncertainty.end_to_end, unmodelled * math.log(2))
    return value * math.exp(-_QUANTILE * sigma), value * math.exp(_QUANTILE * sigma)


def speedup_interval(value: float, uncertainty: Uncertainty) -> tuple[float, float]:
    """Return the ends of the 80 % interval of a ratio of two latencies on one device."""
    factor = math.exp(_QUANTILE * uncertainty.speedup)
    return value / factor, value * factor
