"""Round a weight value by value, each error made up for by the values that are rounded later (arXiv 2210.17323).

    for k in order:   q[k] = round(w[k])          e = (w[k] − q[k]) / U[k, k]          w[k+1:] −= e · U[k, k+1:]

U is the upper Cholesky factor of H⁻¹, H = XᵀX of the layer's inputs plus a damping of its diagonal; the order is that
of falling diagonals of H. It lowers ‖XW − XQ‖ and not ‖W − Q‖. What pruning set to zero is zero as well in Q, whatever
the errors before have added to it, and that is one more error for those behind (arXiv 2301.00774): a 2:4 mask is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
_COLUMNS = 128  # whose errors reach the values behind them in one product
_DAMPING = 0.01  # of the mean of H's diagonal
_TRIES = 4


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid: float32 [K, N], and the errors tr((W − Q)ᵀ H (W − Q)) of it and of plain rounding."""

    values: Float
    error: float
    plain_error: float


def round_with_feedback(weight: Float, hessian: Float, scale: Float, low: int, high: int) -> Rounded:
    """Return `weight` rounded to multiples of `scale`, its zeros kept.

    Args:
        weight: [K, N], finite.
        hessian: XᵀX [K, K] of the inputs X [rows, K].
        scale: positive, [K, N] or what broadcasts to it.
        low: the smallest integer.
        high: the largest integer.
    """
    scale = np.ascontiguousarray(np.broadcast_to(scale, weight.shape), np.float32)
    order = np.argsort(-np.diag(hessian), kind="stable")
    factor = _factor(hessian[np.ix_(order, order)])
    values = np.empty_like(weight)
    values[order] = _rounded(weight[order].astype(np.float32), factor, scale[order], low, high)
    return Rounded(values, _error(weight - values, hessian), plain_error(weight, hessian, scale, low, high))


def plain_error(weight: Float, hessian: Float, scale: Float, low: int, high: int) -> float:
    """The error of plain rounding, with the same arguments."""
    return _error(weight - np.clip(np.rint(weight / scale), low, high) * scale, hessian)


def _rounded(w: Float, factor: Float, scale: Float, low: int, high: int) -> Float:
    kept = w != 0
    q = np.zeros_like(w)
    errors = np.empty((_COLUMNS, w.shape[1]), np.float32)
    for start in range(0, len(w), _COLUMNS):
        end = min(start + _COLUMNS, len(w))
        for k in range(start, end):
            q[k] = np.where(kept[k], np.clip(np.rint(w[k] / scale[k]), low, high) * scale[k], 0)
            errors[k - start] = (w[k] - q[k]) / factor[k, k]
            w[k + 1 : end] -= np.outer(factor[k, k + 1 : end], errors[k - start])
        w[end:] -= factor[start:end, end:].T @ errors[: end - start]
    return q


def _factor(hessian: Float) -> Float:
    """The upper triangular U with UᵀU = (H + damping)⁻¹; an input that is always 0 hands no error on."""
    from scipy.linalg import cho_factor, cho_solve, cholesky

    h = hessian.astype(np.float64)
    diagonal = np.diag(h).copy()
    mean = float(diagonal.mean()) or 1.0
    for attempt in range(_TRIES):
        h[np.diag_indices_from(h)] = np.where(diagonal > 0, diagonal, mean) + _DAMPING * 10**attempt * mean
        try:
            inverse = cho_solve(cho_factor(h), np.eye(len(h)))
            return np.asarray(cholesky(inverse), np.float32)
        except np.linalg.LinAlgError:
            continue
    return np.diag(1 / np.sqrt(np.diag(h))).astype(np.float32)


def _error(difference: Float, hessian: Float) -> float:
    return float(np.einsum("kn,kn->", difference, hessian @ difference, dtype=np.float64))
