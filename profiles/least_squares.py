"""Fit positive figures to logarithmic residuals, robustly, and refit without a part of the data.

A row counts with 1/√n, n being the rows of its group, so that a table of 200 rows does not drown one of five; and less
the further it is off (soft L1). Each figure is held near a guess that physics gives, within `looseness`.

`without` refits by one Gauss-Newton step from the full fit: exact for a linear model, and what makes dozens of refits
cost no more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

Array = npt.NDArray[np.float64]
_SCALE = 0.15
_STEP = 0.02


@dataclass(frozen=True)
class Fit:
    """A fit.

    Attributes:
        x: logarithms of the figures.
        residuals: log(predicted / published) of each row.
        jacobian: their derivatives by `x`.
        weights: of each row.
        guess: logarithms of the guesses.
        looseness: of each figure.
    """

    x: Array
    residuals: Array
    jacobian: Array
    weights: Array
    guess: Array
    looseness: Array

    def without(self, left_out: npt.NDArray[np.bool_]) -> Array:
        """The logarithms of the figures when the rows `left_out` are not known."""
        influence = (self.weights / _SCALE) ** 2 / np.sqrt(1 + (self.residuals / _SCALE) ** 2)
        influence = np.where(left_out, 0.0, influence)
        prior = 1 / self.looseness**2
        hessian = self.jacobian.T @ (influence[:, None] * self.jacobian) + np.diag(prior)
        gradient = self.jacobian.T @ (influence * self.residuals) + prior * (self.x - self.guess)
        return self.x - np.linalg.solve(hessian, gradient)


def fit_figures(
    residuals: Callable[[Array], Array],
    guess: Sequence[float],
    groups: Sequence[object],
    *,
    looseness: Sequence[float],
    steps: int = 8,
) -> Fit:
    """Return the figures that make `residuals` small.

    Args:
        residuals: log(predicted / published) of each row, by the logarithms of the figures.
        guess: the figures that physics gives.
        groups: of each row, what it counts together with.
        looseness: how far each may go, as a standard deviation of its logarithm.
        steps: at most so many.
    """
    start, loose = np.log(np.asarray(guess, dtype=np.float64)), np.asarray(looseness, dtype=np.float64)
    counts = {group: groups.count(group) for group in set(groups)}
    weights = np.array([counts[group] ** -0.5 for group in groups])

    def objective(x: Array) -> Array:
        off = residuals(x) / _SCALE
        softened = np.sign(off) * np.sqrt(2 * (np.sqrt(1 + off**2) - 1))
        return np.concatenate([weights * softened, (x - start) / loose])

    found = least_squares(objective, start, max_nfev=steps, diff_step=_STEP)
    base = residuals(found.x)
    moved = [residuals(found.x + _STEP * unit) - base for unit in np.eye(len(start))]
    return Fit(found.x, base, np.array(moved).T / _STEP, weights, start, loose)
