"""What a network computes inside, seen while it runs: inputs of BatchNorm with its statistics, results of attentions.

Functions are watched and not modules, so it is the same for modules of every library, for programs of torch.export and
for `graph_module`. An attention is `scaled_dot_product_attention`, or a product whose left operand came from a softmax:

    softmax(q kᵀ) v = o, float [B, heads, N, D]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
_PRODUCT = frozenset({"matmul", "__matmul__", "bmm"})
_SAME_VALUES = frozenset({"dropout", "clone", "to", "type_as", "contiguous", "view", "reshape", "expand", "nan_to_num"})
_ATTENTION = frozenset({"scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"})
# Where a function has the input, the mean and the variance of a BatchNorm, and its ε.
_STATISTICS = {
    "torch.nn.functional.batch_norm": (0, 1, 2, 7),
    "batch_norm": (0, 3, 4, 7),
    "_native_batch_norm_legit_no_training": (0, 3, 4, 6),
}
_NORMS = frozenset(name.rpartition(".")[2] for name in _STATISTICS)
_NAMES = ("input", "running_mean", "running_var", "eps")
_EPSILON = 1e-5


@dataclass(frozen=True)
class Normalized:
    """The input [B, C, …] of one BatchNorm, and the mean and variance [C] that training left in it."""

    input: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    epsilon: float


class Watch(TorchFunctionMode):
    """Collects what the functions make that run inside its `with` block.

    Attributes:
        norms: what each BatchNorm was given.
        attentions: what each attention made, float [B, heads, N, D], or [B · heads, N, D].
    """

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[Normalized] = []
        self.attentions: list[torch.Tensor] = []
        self._softmaxes: dict[int, torch.Tensor] = {}  # held, so that no other tensor gets the id

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, and note what is looked for."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "").partition(".")[0]
        if name in _NORMS:
            self._note_norm(_statistics_of(func, name), args, kwargs)
        elif name in _ATTENTION:
            self.attentions.append(result[0] if isinstance(result, tuple) else result)
        elif name in _SOFTMAX or (name in _SAME_VALUES and args and id(args[0]) in self._softmaxes):
            self._softmaxes[id(result)] = result
        elif name in _PRODUCT and id(args[0]) in self._softmaxes:
            self.attentions.append(result)
        return result

    def _note_norm(self, places: Sequence[int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        given = dict(enumerate(args)) | {
            place: kwargs[name] for name, place in zip(_NAMES, places, strict=True) if name in kwargs
        }
        value, mean, variance, epsilon = (given.get(place) for place in places)
        if isinstance(value, torch.Tensor) and mean is not None and variance is not None:
            self.norms.append(Normalized(value, mean, variance, _EPSILON if epsilon is None else epsilon))


def _statistics_of(func: Callable[..., Any], name: str) -> Sequence[int]:
    whole = f"{getattr(func, '__module__', '')}.{name}"
    return _STATISTICS[whole if whole in _STATISTICS else name]
