"""Fold torch's weight normalization, w = g · v / ‖v‖, by torch's own kernel; refuse what a state dict cannot tell.

    M.parametrizations.X.original0 (g), …original1 (v)   torch.nn.utils.parametrizations.weight_norm
    M.X_g, M.X_v                                         torch.nn.utils.weight_norm, the older one

The norm is over all axes but one, `dim`, and g has that one's length: the first axis that fits is taken, as 0 is the
default. Every other parametrization is code that the state dict does not have, and spectral norm's result depends on
how its power iteration was configured; both are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from profiles.errors import GpusqError

BAKE = "fold it before saving: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
BAKE_OR_MASKS = BAKE + "; torch.ao.pruning: call squash_mask(), or save sparsifier.state_dict() beside the weights"
BAKE_SPECTRAL = "fold it before saving: torch.nn.utils.remove_spectral_norm(module)"
_DIRECTION = re.compile(r"(?:.+\.)?weight[^.]*_v", re.DOTALL)  # weight_v, an LSTM's weight_hh_l0_v
_PARAMETRIZED = re.compile(r"(?P<module>(?:.+\.)?)parametrizations\.(?P<name>[^.]+)\.(?P<part>.+)", re.DOTALL)


def fold_weight_norm(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with weight norm folded, each weight in the place of its direction v.

    Raises GpusqError, naming the layer, for any other parametrization and for g and v that do not fit.
    """
    pairs = _pairs(state)  # name → (g, v)
    by_direction = {v: (name, g) for name, (g, v) in pairs.items()}
    lengths = {g for g, _ in pairs.values()}
    folded: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        if key in by_direction:
            name, g = by_direction[key]
            folded[name] = _normalized(name, tensor, state[g])
        elif key not in lengths:
            folded[key] = tensor
    return folded


def _pairs(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, str]]:
    pairs: dict[str, tuple[str, str]] = {}
    for name, parts in _parametrized(state).items():
        if set(parts) != {"original0", "original1"}:
            what = "spectral norm" if "0._u" in parts else f"a parametrization ({', '.join(sorted(parts))})"
            raise GpusqError(
                f"weight {name!r} is under {what}, which the state dict alone does not give",
                hint=BAKE_OR_MASKS if set(parts) == {"original"} else BAKE,
            )
        pairs[name] = (parts["original0"], parts["original1"])
    for key in state:
        name = key[:-2]
        if key.endswith("_orig") and key.removesuffix("_orig") + "_u" in state:
            raise GpusqError(f"weight {key.removesuffix('_orig')!r} is under spectral norm", hint=BAKE_SPECTRAL)
        if key.endswith(("weight_orig", "bias_orig")):
            raise GpusqError(f"weight {key!r} has no mask beside it", hint="save the masks too, or prune.remove() them")
        if _DIRECTION.fullmatch(key) and name + "_g" in state and name not in state:
            pairs[name] = (name + "_g", key)
    return pairs


def _parametrized(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, str]]:
    """For each parametrized weight what is stored of it: part → full name."""
    found: dict[str, dict[str, str]] = {}
    for key in state:
        if match := _PARAMETRIZED.fullmatch(key):
            found.setdefault(match["module"] + match["name"], {})[match["part"]] = key
    return found


def _normalized(name: str, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    if not v.is_floating_point() or g.dtype != v.dtype:
        raise GpusqError(f"weight {name!r}: weight norm of {v.dtype} with a length in {g.dtype}", hint=BAKE)
    return torch._weight_norm(v, g, _dim(name, v, g))


def _dim(name: str, v: torch.Tensor, g: torch.Tensor) -> int:
    """The axis that g runs along; −1, torch's sign for no axis, where g is one number."""
    if g.ndim == 0:
        return -1
    for dim in range(v.ndim):
        if list(g.shape) == [size if axis == dim else 1 for axis, size in enumerate(v.shape)]:
            return dim
    raise GpusqError(
        f"weight {name!r}: the lengths {list(g.shape)} of its weight norm fit no axis of {list(v.shape)}", hint=BAKE
    )
