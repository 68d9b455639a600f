"""Find the weights in what a training script saved, and tell the plain data beside them.

Training scripts wrap the state dict: {"model": …, "optimizer": …, "epoch": 12}. The rule, at each level:

1. the first key of WRAPPERS that holds tensors is taken (averaged weights before the raw ones: they are what was
   evaluated), and the search goes on inside;
2. else, where the level itself has tensors, it is the state dict;
3. else the one mapping that holds tensors is taken, optimizers and the like left out; two are an error.

Then names lose what wrappers put into them: "module." (DataParallel, `AveragedModel`) where every name has it,
"_orig_mod." (torch.compile) and the FSDP and activation-checkpoint segments wherever they stand, and "model." or
"net." only in a Lightning checkpoint where every name has it: elsewhere it is the model's own. Whatever was chosen or
taken off is in the notes.

torch.ao.pruning keeps its masks out of the module's state dict. Where the script saved `sparsifier.state_dict()`
({"state": {"fc.weight": {"mask": …}}, "groups": […]}) beside the weights, the masks join them under the names that the
parametrizations' buffers have: fc.parametrizations.weight.0.mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from exporters.safe_pickle import NamespaceStandIn
from profiles.errors import GpusqError

WRAPPERS = (
    "ema_state_dict",
    "model_ema",
    "state_dict_ema",
    "ema",
    "params_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "params",
    "weights",
)
NO_WEIGHTS = frozenset(
    {
        *("optimizer", "optimizers", "optim", "optimizer_state", "optimizer_states", "optimizer_state_dict"),
        *("scheduler", "scheduler_state_dict", "lr_scheduler", "lr_schedulers"),
        *("scaler", "grad_scaler", "rng", "rng_state", "rng_states", "callbacks", "loops"),
    }
)
SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
LIGHTNING = "pytorch-lightning_version"
AVERAGED_COUNT = "n_averaged"
MOST_DEPTH = 64  # of nested containers; a pickle can nest without end
_ABSENT = object()


def find_weights(source: Path, tree: object) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """The tensors of the state dict within `tree` with their plain names; the notes; the plain data beside it.

    Raises GpusqError where there are none, or where two sets of weights stand side by side and no rule prefers one.
    """
    holders = _Holders()
    notes: list[str] = []
    beside: dict[str, Any] = {}
    where: list[str] = []
    masks: dict[str, torch.Tensor] = {}
    level = tree
    while isinstance(level, Mapping) and len(where) < MOST_DEPTH:
        masks |= _sparsifier_masks(level)
        key = _next_level(source, level, holders, notes, where)
        beside = {**plain_items(level, skip=key), **beside}
        if key is None:
            break
        where.append(str(key))
        level = level[key]
    state, ignored = _own_tensors(level) if isinstance(level, Mapping) else ({}, [])
    if not state:
        raise GpusqError(f"{source} holds no tensors with names", hint="save model.state_dict()")
    if ignored:
        notes.append(
            f"left out {ignored[0]!r}" + (f" and {len(ignored) - 1} more" if ignored[1:] else "") + ": no tensor"
        )
    state = _unwrap_names(state, lightning=LIGHTNING in beside, notes=notes)
    return _with_masks(state, masks, notes), notes, beside


class _Holders:
    """Answers whether a value holds tensors, each object looked at once."""

    def __init__(self) -> None:
        self._known: dict[int, bool] = {}

    def holds(self, value: object, depth: int = 0) -> bool:
        if isinstance(value, torch.Tensor):
            return True
        if not isinstance(value, Mapping) or depth > MOST_DEPTH:
            return False
        if id(value) not in self._known:
            self._known[id(value)] = False  # what a mapping within itself adds
            self._known[id(value)] = any(self.holds(inner, depth + 1) for inner in value.values())
        return self._known[id(value)]


def _next_level(
    source: Path, level: Mapping[Any, Any], holders: _Holders, notes: list[str], where: list[str]
) -> object | None:
    """The key to go into; None where the level itself is the state dict."""
    inside = [key for key, value in level.items() if isinstance(value, Mapping) and holders.holds(value)]
    usable = [key for key in inside if not _no_weights(key) and not _is_sparsifier(level[key])]
    known = sorted((key for key in usable if key in WRAPPERS), key=WRAPPERS.index)
    if not known and any(isinstance(value, torch.Tensor) for value in level.values()):
        return None
    choices = known or usable
    if not known and len(usable) > 1:
        names = ", ".join(repr(".".join([*where, str(key)])) for key in usable[:8])
        raise GpusqError(
            f"{source} holds {len(usable)} sets of weights: {names}", hint="save the one you mean on its own"
        )
    if not choices:
        return None
    taken = ".".join([*where, str(choices[0])])
    others = [repr(str(key)) for key in usable if key != choices[0]]
    notes.append(f"took the weights in {taken!r}" + (f", not those in {', '.join(others)}" if others else ""))
    chosen: object = choices[0]
    return chosen


def _is_sparsifier(value: object) -> bool:
    return isinstance(value, Mapping) and value.keys() == {"state", "groups"} and isinstance(value["state"], Mapping)


def _sparsifier_masks(level: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """The masks of the sparsifiers at this level, by the prefix of their parametrization."""
    masks: dict[str, torch.Tensor] = {}
    for value in level.values():
        for name, kept in value["state"].items() if _is_sparsifier(value) else ():
            if isinstance(name, str) and isinstance(kept, Mapping) and isinstance(kept.get("mask"), torch.Tensor):
                module, dot, leaf = name.rpartition(".")
                masks[f"{module}{dot}parametrizations.{leaf}."] = kept["mask"]
    return masks


def _with_masks(
    state: dict[str, torch.Tensor], masks: Mapping[str, torch.Tensor], notes: list[str]
) -> dict[str, torch.Tensor]:
    """`state` with the masks of the weights that wait for one; after `squash_mask()` none does."""
    waiting = {f"{prefix}0.mask": mask for prefix, mask in masks.items() if prefix + "original" in state}
    if waiting:
        notes.append(f"took {len(waiting)} masks from the sparsifier's state")
    return state | waiting


def _no_weights(key: object) -> bool:
    return str(key).lower() in NO_WEIGHTS


def _own_tensors(level: Mapping[Any, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
    state = {str(key): value for key, value in level.items() if isinstance(value, torch.Tensor)}
    return state, [str(key) for key in level if str(key) not in state]


def _unwrap_names(state: dict[str, torch.Tensor], *, lightning: bool, notes: list[str]) -> dict[str, torch.Tensor]:
    state = _without_segments(state, notes)
    prefixes = ("module.", "model.", "net.") if lightning else ("module.",)
    while prefix := next((prefix for prefix in prefixes if _all_have(state, prefix)), None):
        if prefix == "module.":
            state.pop(AVERAGED_COUNT, None)
        else:
            prefixes = ("module.",)
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        notes.append(f"took the prefix {prefix!r} off every name")
    return state


def _all_have(state: Mapping[str, object], prefix: str) -> bool:
    names = state.keys() - {AVERAGED_COUNT}
    return bool(names) and all(name.startswith(prefix) and len(name) > len(prefix) for name in names)


def _without_segments(state: dict[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    renamed = {name: ".".join(part for part in name.split(".") if part not in SEGMENTS) for name in state}
    changed = [name for name in state if renamed[name] != name]
    if not changed or len(set(renamed.values())) < len(state):
        return state
    notes.append(f"took {', '.join(SEGMENTS)} out of {len(changed)} names")
    return {renamed[name]: value for name, value in state.items()}


def plain_items(level: Mapping[Any, Any], skip: object | None = None) -> dict[str, Any]:
    """The plain data in `level`: numbers, strings, and containers of them; optimizers and tensors are left out."""
    plain = _Plain()
    items = {str(key): (value, plain(value)) for key, value in level.items() if key != skip and not _no_weights(key)}
    # a mapping of nothing but tensors is other weights, not data
    return {key: copy for key, (value, copy) in items.items() if copy is not _ABSENT and (copy != {} or not value)}


class _Plain:
    """Copies plain data out of a tree, each object once; what is not plain is left out."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}

    def __call__(self, value: object, depth: int = 0) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, NamespaceStandIn):
            value = vars(value)
        if not isinstance(value, Mapping | list | tuple) or depth > MOST_DEPTH:
            return _ABSENT
        if id(value) not in self._known:
            self._known[id(value)] = _ABSENT  # what a container within itself becomes
            self._known[id(value)] = self._copy(value, depth + 1)
        return self._known[id(value)]

    def _copy(self, value: Mapping[Any, Any] | list[Any] | tuple[Any, ...], depth: int) -> Any:
        if isinstance(value, Mapping):
            named = ((key if isinstance(key, int) else str(key), inner) for key, inner in value.items())
            return dict(self._items(named, depth))
        copied = [inner for _, inner in self._items((("", inner) for inner in value), depth)]
        return tuple(copied) if isinstance(value, tuple) else copied

    def _items(self, items: Iterator[tuple[int | str, Any]], depth: int) -> Iterator[tuple[int | str, Any]]:
        for key, value in items:
            copied = self(value, depth)
            if copied is not _ABSENT:
                yield key, copied
