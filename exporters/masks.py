"""Fold pruning masks into the weights: a state dict with masks → plain weights with exact zeros, and an account.

| library | stored | becomes |
|---|---|---|
| torch.nn.utils.prune | X_orig, X_mask | X = X_orig · X_mask |
| torch.ao.pruning | M.parametrizations.X.original, M.parametrizations.X.i.mask | M.X, their product |
| modelopt mts | M.weight, M._weight_mask | M.weight · mask |
| apex ASP | M.X, M.__X_mma_mask (, M.__X_mma_pruned_p) | M.X, whose zeros are there already |
| a mask beside its weight | M.weight, M.weight_mask | M.weight, whose zeros are there already |
| compressed-tensors | M.compressed, M.bitmask, M.shape | M.weight (`exporters.bitmask`) |
| torch's weight_norm | original0, original1, or X_g, X_v | the weight (`exporters.weight_norm`) |

torch.ao.pruning keeps the mask in the sparsifier, not in the state dict: `exporters.nesting` brings them together.

The first three multiply in their forward, so what they stored under the mask does not matter: it becomes +0, also where
it is −0 or NaN. The next two do not: a non-zero weight under their mask has been computed with, and zeroing it would
give another network, so that is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from exporters.bitmask import KINDS as BITMASK_KINDS
from exporters.bitmask import unpack_bitmasks
from exporters.weight_norm import fold_weight_norm
from profiles.errors import GpusqError

SAVE_AGAIN = "save the weights and the masks of one moment together"


@dataclass(frozen=True)
class FoldedMask:
    """One weight that had a mask: its plain name, whose mask it was, and the share of exact zeros in it now."""

    name: str
    kind: str
    zeros: float


@dataclass(frozen=True)
class MaskedState:
    """A state dict of plain weights, in the order of the masked one, and an account of what was folded."""

    state: dict[str, torch.Tensor]
    folded: tuple[FoldedMask, ...]


@dataclass(frozen=True)
class MaskRule:
    """How one library names a mask and its weight; `{module}` ends with a dot or is empty.

    `multiplies` tells whether its forward applies the mask. `certain` tells that a mask of this name is one even where
    its weight is missing.
    """

    kind: str
    mask: re.Pattern[str]
    weight: str
    multiplies: bool = True
    certain: bool = True
    drop: str = ""


def _mask_name(leaf: str) -> re.Pattern[str]:
    return re.compile(rf"(?P<module>(?:.+\.)?){leaf}", re.DOTALL)


RULES = (
    MaskRule("torch.nn.utils.prune", _mask_name(r"(?P<name>[^.]+)_mask"), "{module}{name}_orig", certain=False),
    MaskRule(
        "torch.ao.pruning",
        _mask_name(r"parametrizations\.(?P<name>[^.]+)\.\d+\.mask"),
        "{module}parametrizations.{name}.original",
    ),
    MaskRule("modelopt mts", _mask_name(r"_(?P<name>weight)_mask"), "{module}{name}"),
    MaskRule(
        "apex ASP",
        _mask_name(r"__(?P<name>[^.]+)_mma_mask"),
        "{module}{name}",
        multiplies=False,
        drop="{module}__{name}_mma_pruned_p",
    ),
    MaskRule("mask beside its weight", _mask_name(r"(?P<name>weight|bias)_mask"), "{module}{name}", multiplies=False),
)


@dataclass
class _Masked:
    """A weight with its masks, as found."""

    rule: MaskRule
    name: str
    weight: str
    masks: list[str]
    dropped: list[str]


def fold_masks(state: Mapping[str, torch.Tensor]) -> MaskedState:
    """`state` with every mask folded in; tensors without one are passed on as they are, not copied.

    Raises GpusqError, naming the layer, for a mask that has no weight, does not fit it, holds more than 0 and 1, or
    ought to be applied already and is not; and for a parametrization that the state dict does not describe.
    """
    plain, unpacked = unpack_bitmasks(dict(state))
    found = _find(plain)
    renamed = {masked.weight: masked for masked in found.values()}
    gone = {name for masked in found.values() for name in (*masked.masks, *masked.dropped)}
    folded: dict[str, torch.Tensor] = {}
    for name, tensor in plain.items():
        masked_here = renamed.get(name)
        if masked_here is not None:
            folded[masked_here.name] = _fold(masked_here, plain)
        elif name not in gone:
            folded[name] = tensor
    kinds = {name: BITMASK_KINDS[kind] for name, kind in unpacked.items()}
    kinds |= {name: masked.rule.kind for name, masked in found.items()}
    account = tuple(FoldedMask(name, kind, _share_of_zeros(folded[name])) for name, kind in kinds.items())
    return MaskedState(fold_weight_norm(folded), account)


def _find(state: Mapping[str, torch.Tensor]) -> dict[str, _Masked]:
    """The masked weights of `state` by their plain names."""
    found: dict[str, _Masked] = {}
    for key in state:
        match = _first_match(key, state)
        if match is None:
            continue
        rule, parts = match
        name, weight = "{module}{name}".format(**parts), rule.weight.format(**parts)
        if weight not in state:
            raise GpusqError(f"mask {key!r} ({rule.kind}) has no weight {weight!r} beside it", hint=SAVE_AGAIN)
        if weight != name and name in state:
            raise GpusqError(
                f"weight {name!r} is there twice, plain and as {weight!r} with a mask ({rule.kind})", hint=SAVE_AGAIN
            )
        masked = found.setdefault(name, _Masked(rule, name, weight, [], []))
        if masked.rule is not rule:
            raise GpusqError(f"weight {name!r} has masks of {masked.rule.kind} and {rule.kind}", hint=SAVE_AGAIN)
        masked.masks.append(key)
        if rule.drop and rule.drop.format(**parts) in state:
            masked.dropped.append(rule.drop.format(**parts))
    return found


def _first_match(key: str, state: Mapping[str, torch.Tensor]) -> tuple[MaskRule, dict[str, str]] | None:
    for rule in RULES:
        match = rule.mask.fullmatch(key)
        if match is not None and (rule.certain or rule.weight.format(**match.groupdict()) in state):
            return rule, match.groupdict()
    return None


def _fold(masked: _Masked, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    weight = state[masked.weight]
    keep = torch.ones(weight.shape, dtype=torch.bool)
    for name in masked.masks:
        keep &= _as_bool(name, state[name], masked.name, weight)
    if masked.rule.multiplies:
        return weight.masked_fill(~keep, 0)
    revived = int(((weight != 0) & ~keep).sum())
    if revived:
        raise GpusqError(
            f"weight {masked.name!r} has {revived} non-zero values under its mask ({masked.rule.kind}), "
            "which is not applied in the forward: the trained network is not the masked one",
            hint="multiply the weights by their masks, test that network, and save it",
        )
    return weight.masked_fill(~keep, 0)


def _as_bool(name: str, mask: torch.Tensor, layer: str, weight: torch.Tensor) -> torch.Tensor:
    if mask.shape != weight.shape:
        raise GpusqError(
            f"mask {name!r} {list(mask.shape)} does not fit weight {layer!r} {list(weight.shape)}", hint=SAVE_AGAIN
        )
    keep = mask != 0
    if mask.dtype is not torch.bool and not bool((mask[keep] == 1).all()):
        raise GpusqError(
            f"mask {name!r} of weight {layer!r} holds values other than 0 and 1", hint="save a mask of zeros and ones"
        )
    return keep


def _share_of_zeros(tensor: torch.Tensor) -> float:
    return float((tensor == 0).sum()) / max(1, tensor.numel())
