"""Samples in the types that a model takes: float32 ones become float16 where the inputs of a graph are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_FLOATS: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}


def fit(inputs: Sequence[Any], arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return `arrays` with each float array in the type of the input of its name.

    Args:
        inputs: what an onnxruntime session says of its inputs: `name`, and `type` such as "tensor(float16)".
        arrays: arrays by input name.
    """
    types = {known.name: _FLOATS.get(known.type) for known in inputs}
    return {name: _in(types.get(name), array) for name, array in arrays.items()}


def _in(dtype: type[np.generic] | None, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array if dtype is None or array.dtype.kind != "f" else array.astype(dtype, copy=False)
