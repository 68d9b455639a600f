"""Judge the cost model on what it has not seen: leave out one source, one device, one family at a time.

Errors are |log(predicted / published)|, which is the relative error where that is small. An 80 % interval is as wide as
80 % of the errors that were left out elsewhere need; a row is covered if it lies within the interval that all other
groups give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from profiles.fit_gemm import SUSPECT, THIN, GemmFit, Series, all_series, generic
from profiles.fit_latency import residuals, with_figures, with_pairs
from profiles.least_squares import Fit
from profiles.pairs import Step, pairs_of
from profiles.published import PublishedLatency

Array = npt.NDArray[np.float64]
SPLITS: dict[str, Callable[[PublishedLatency], str]] = {
    "source": lambda row: row.page,
    "device": lambda row: row.profile.name if row.profile else "",
    "family": lambda row: row.family,
}
_WORTH = 0.05


@dataclass(frozen=True)
class Score:
    """Errors of what was left out.

    Attributes:
        what: what was left out.
        errors: log(predicted / published).
        groups: of each error, the group that was left out with it.
    """

    what: str
    errors: Array
    groups: tuple[str, ...]

    @property
    def grouped_by(self) -> str:
        """What its groups are: problems are told by their device."""
        return "device" if self.what == "problem" else self.what

    @property
    def median(self) -> float:
        """Median absolute error."""
        return float(np.median(np.abs(self.errors)))

    @property
    def p90(self) -> float:
        """90th percentile of the absolute errors."""
        return float(np.percentile(np.abs(self.errors), 90))

    @property
    def sigma(self) -> float:
        """The standard deviation of the normal distribution whose 80 % interval holds 80 % of the errors."""
        return float(np.percentile(np.abs(self.errors), 80)) / 1.2816

    @property
    def coverage(self) -> float:
        """Share of the errors within the 80 % interval that the other groups give."""
        groups = np.array(self.groups)
        covered = np.zeros(len(groups), dtype=bool)
        for group in set(self.groups):
            own = groups == group
            if own.all():
                return float("nan")
            covered[own] = np.abs(self.errors[own]) <= np.percentile(np.abs(self.errors[~own]), 80)
        return float(covered.mean())

    def by_group(self) -> dict[str, float]:
        """Median absolute error of each group."""
        groups = np.array(self.groups)
        return {group: float(np.median(np.abs(self.errors[groups == group]))) for group in sorted(set(self.groups))}


def latency_score(what: str, fit: Fit, gemm: GemmFit, rows: Sequence[PublishedLatency]) -> Score:
    """Leave out one source, device or family (`what`) at a time, refit, and predict it."""
    groups = tuple(SPLITS[what](row) for row in rows)
    errors = np.zeros(len(rows))
    for group in sorted(set(groups)):
        own = np.array([each == group for each in groups])
        parameters = with_figures(fit.without(with_pairs(own, rows)), gemm.parameters, gemm.sustained)
        errors[own] = residuals(parameters, [row for row, left_out in zip(rows, own, strict=True) if left_out])
    return Score(what, errors, groups)


def gemm_score(what: str, gemm: GemmFit) -> Score:
    """Leave out one device of the table of GEMMs at a time, or judge the problems that were not fitted (`what`).

    A device that is left out has no shares of its own, no fitted clock, and the others' usual floor. Of the problems,
    every third is fitted and the rest is judged.
    """
    used = [series for series in all_series() if series.key not in SUSPECT]
    if what == "device":
        found = [_device_left_out(gemm, series) for series in used]
    else:
        found = [_unfitted(gemm, series) for series in used]
    groups = tuple(series.device for series, errors in zip(used, found, strict=True) for _ in errors)
    return Score(what, np.concatenate(found), groups)


def _device_left_out(gemm: GemmFit, series: Series) -> Array:
    own = np.array([each.device == series.device for each in gemm.series for _ in each.rows])
    parameters, floors = generic(gemm, gemm.fit.without(own), series.device)
    return series.residuals(parameters, floors[series.device, series.sparse], {})


def _unfitted(gemm: GemmFit, series: Series) -> Array:
    errors: Array = series.residuals(gemm.parameters, gemm.floors[series.device, series.sparse], gemm.sustained)
    unseen: Array = errors[np.arange(len(errors)) % THIN != 0]
    return unseen


def gemm_speedups(gemm: GemmFit) -> tuple[Array, Array]:
    """Return log speed-ups dense → 2:4 of the table, published and predicted."""
    by_key = {series.key: series for series in all_series() if series.key not in SUSPECT}
    published, predicted = [], []
    for (device, number, sparse), series in by_key.items():
        dense = by_key.get((device, number, False))
        if not sparse or dense is None:
            continue
        true = np.log(dense.us / series.us)
        off = [
            each.residuals(gemm.parameters, gemm.floors[device, each.sparse], gemm.sustained)
            for each in (dense, series)
        ]
        published.append(true)
        predicted.append(true + off[0] - off[1])
    return np.concatenate(published), np.concatenate(predicted)


def speedups(score: Score, rows: Sequence[PublishedLatency], step: Step) -> tuple[Array, Array]:
    """Return log speed-ups of whole models, published and predicted."""
    pairs = pairs_of(rows, step)
    published = np.array([np.log(rows[slow].latency_ms / rows[fast].latency_ms) for slow, fast in pairs])
    off = np.array([score.errors[slow] - score.errors[fast] for slow, fast in pairs])
    return published, published + off


def sign_right(published: Array, predicted: Array) -> float:
    """Share of the cases beyond ±5 % whose sign is predicted."""
    worth = np.abs(published) > np.log(1 + _WORTH)
    return float((np.sign(published[worth]) == np.sign(predicted[worth])).mean()) if worth.any() else float("nan")
