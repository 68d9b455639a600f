"""Choose the optimization profile for a request: of those that take its shapes, the one whose usual shapes are nearest.

    profiles   x: 1x3x224x224                     x: 1x3x224x224 … 8x3x224x224 … 32x3x224x224
    x is 1x3x224x224 ─► the first                 x is 6x3x224x224 ─► the second, the first takes it not

Kernels are the fastest for the usual shape, TensorRT's OPT. How far a shape is from it: the sum of |ln(length / usual
length)| over all axes of all inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from deploy.build_options import InputRange, Shape

Profile = Sequence[InputRange]


def choose(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int | None:
    """The number of the profile for a request, the first of equals; None where no profile takes it.

    Args:
        profiles: of each, the ranges of all inputs.
        shapes: of the request's inputs, by name.
    """
    fitting = [
        index for index, profile in enumerate(profiles) if all(each.takes(shapes[each.name]) for each in profile)
    ]
    return min(fitting, key=lambda index: _distance(profiles[index], shapes), default=None)


def _distance(profile: Profile, shapes: Mapping[str, Shape]) -> float:
    return sum(
        abs(math.log(length / usual))
        for each in profile
        for length, usual in zip(shapes[each.name], each.usual, strict=True)
    )
