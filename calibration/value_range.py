"""What the values of the samples themselves say about their range, where no layer remembers what it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from calibration.preprocessing import Preprocessing
from calibration.rows import Rows

_SOME = 32
_SLACK = 0.5
_LEVELS = 255
_IMAGE_AXES, _CHANNELS = 4, frozenset({1, 3})


def doubtful_range(samples: Mapping[str, Rows], how: Preprocessing | None) -> Iterator[str]:
    """Sentences about floats that look like pixels which were not scaled, or not normalised as the model's config says.

    Args:
        samples: rows by input name, as the model takes them.
        how: the model's own preprocessing, where it is known.
    """
    for name, rows in samples.items():
        if rows.dtype.kind != "f" or len(rows.shape) != _IMAGE_AXES or not {rows.shape[1], rows.shape[3]} & _CHANNELS:
            continue
        if 0 in rows.shape:
            continue
        some = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SOME)).astype(np.intp))]
        low, high = float(some.min()), float(some.max())
        if how is not None:
            yield from _against_config(name, low, high, how)
        elif low >= 0 and 2 < high <= _LEVELS and np.array_equal(some, np.rint(some)):
            yield (
                f"{name!r} holds whole numbers up to {high:.0f}, like pixels that were not scaled; if the model takes "
                "scaled ones, give images or uint8 arrays, and --preprocessing"
            )


def _against_config(name: str, low: float, high: float, how: Preprocessing) -> Iterator[str]:
    least, most = how.bounds()
    told = (
        f"{name!r} holds values from {low:.3g} to {high:.3g}, "
        f"and the model's preprocessing gives {least:.3g} to {most:.3g}"
    )
    if low < least - _SLACK or high > most + _SLACK:
        looks = "; they look like pixels that were not scaled: store them as uint8" if high > 2 * most + 1 else ""
        yield told + (looks or "; check how they were made")
    elif low >= 0 and high <= 1 and least < -_SLACK and most > 1 + _SLACK:
        yield f"{told}; they look like pixels without mean and deviation: store them as uint8"
