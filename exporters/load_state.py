"""Put a state dict into a torch module, or say which tensors of the two do not fit each other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from profiles.errors import GpusqError

SHOWN = 5
# Buffers that libraries compute when a model is built, and older releases stored.
_COMPUTED = ("num_batches_tracked", "position_ids", "inv_freq", "relative_position_index", "attn_mask")


def load_state(module: nn.Module, state: Mapping[str, Tensor], name: str, hint: str) -> None:
    """Load `state` into `module` in float32; raises GpusqError, naming `name` and the tensors, where the two misfit."""
    expected = module.state_dict()
    tied = _tied(module)
    missing = [key for key in expected if key not in state and not _computed(key) and key not in tied]
    unexpected = [key for key in state if key not in expected and not _computed(key)]
    misshapen = [key for key in state if key in expected and state[key].shape != expected[key].shape]
    wrong = [f"{key} is missing, {list(expected[key].shape)} expected" for key in missing]
    wrong += [f"{key} {list(state[key].shape)} is unexpected" for key in unexpected]
    wrong += [f"{key} is {list(state[key].shape)}, {list(expected[key].shape)} expected" for key in misshapen]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise GpusqError(f"the tensors do not fit {name}: {'; '.join(wrong[:SHOWN])}{more}", hint=hint)
    module.load_state_dict({key: state[key] for key in expected if key in state}, strict=False)
    module.float()


def _tied(module: nn.Module) -> frozenset[str]:
    """The names that share their tensor with another one: a file may hold any one of them."""
    owners: dict[int, list[str]] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        owners.setdefault(id(tensor), []).append(key)
    return frozenset(key for keys in owners.values() if len(keys) > 1 for key in keys)


def _computed(key: str) -> bool:
    return key.rpartition(".")[2] in _COMPUTED
