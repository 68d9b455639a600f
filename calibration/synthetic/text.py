"""Text that a language model writes itself: data-free calibration after LLM-QAT (arXiv 2305.17888, section 3.1).

The first token is drawn from the whole vocabulary; the next three are the likeliest; from then on each is drawn from
the distribution that the model predicts. Greedy first, so that the text makes sense, and random then, so that it does
not repeat itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from calibration.samples import InputSpec
from profiles.errors import GpusqError

Advance = Callable[[float], None]
_GREEDY = 3
BATCH = 8
_HINT = "give text of its kind: --data calib.npz with token ids"
_TOKENS = ("input_ids", "tokens", "token_ids")


@dataclass(frozen=True)
class _Context:
    """What the network is given beside the token ids.

    Attributes:
        specs: its inputs, in the order of its forward.
        tokens: which of them holds the token ids.
        memory: the keys and values of what was read before, by input name; zeros where nothing was.
        read: how many tokens that is.
    """

    specs: Mapping[str, InputSpec]
    tokens: str
    memory: Mapping[str, torch.Tensor]
    read: int = 0

    @property
    def places(self) -> int:
        """Tokens that the memory has room for."""
        return next((memory.shape[-2] for memory in self.memory.values()), 0)

    def inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """All inputs for the token ids [B, T], in the order of the forward."""
        return {name: self._input(name, ids).to(getattr(torch, spec.dtype)) for name, spec in self.specs.items()}

    def _input(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        if name == self.tokens:
            return ids
        if name in self.memory:
            return self.memory[name]
        if "mask" in name:
            unread = torch.zeros(len(ids), self.places - self.read, dtype=torch.int64)
            return torch.cat([unread, torch.ones(len(ids), self.read + ids.shape[1], dtype=torch.int64)], 1)
        if "position" in name:
            return (self.read + torch.arange(ids.shape[1])).expand_as(ids)
        if "type" in name:
            return torch.zeros_like(ids)
        raise GpusqError(f"no text can be synthesized: the input {name!r} is unknown", hint=_HINT)


def write_text(
    network: torch.nn.Module,
    specs: Mapping[str, InputSpec],
    count: int,
    generator: torch.Generator,
    advance: Advance,
    batch: int = BATCH,
) -> dict[str, torch.Tensor]:
    """Return `count` texts as all inputs of `network`, [N, T]: token ids, masks of ones, positions, types of zeros.

    With a cache among the inputs, a text is written that fills it, and the sample is what follows.

    Args:
        network: in eval mode; makes logits [B, T, vocabulary] of token ids [B, T] first, then the caches.
        specs: its inputs, in the order of its forward.
        count: texts.
        generator: of all random numbers.
        advance: is told the share that is done.
        batch: texts that are written together.

    Raises:
        GpusqError: the network predicts no next tokens, or has an input of which nothing is known.
    """
    tokens = _token_input(specs)
    caches = {name: spec.shape for name, spec in specs.items() if name != tokens and len(spec.shape) > 1}
    empty = _Context(specs, tokens, {name: torch.zeros(batch, *shape) for name, shape in caches.items()})
    vocabulary = _vocabulary(network, empty, batch)
    parts = []
    for start in range(0, count, batch):
        ids = torch.zeros(batch, specs[tokens].shape[0], dtype=torch.int64)
        ids[:, 0] = torch.randint(vocabulary, (batch,), generator=generator)
        ids, context = _write(network, empty, ids, _GREEDY, generator), empty
        if empty.memory:
            ids, context = _continued(network, empty, ids, generator)
        parts.append(context.inputs(ids))
        advance(min((start + batch) / count, 1.0))
    return {name: torch.cat([part[name] for part in parts])[:count] for name in specs}


def _write(
    network: torch.nn.Module, context: _Context, ids: torch.Tensor, greedy: int, generator: torch.Generator
) -> torch.Tensor:
    """The token ids [B, T] with all but the first written anew, of which the first `greedy` are the likeliest."""
    ids = ids.clone()
    for place in range(1, ids.shape[1]):
        logits = _outputs(network, context.inputs(ids))[0][:, place - 1]
        ids[:, place] = _next(logits, greedy=place <= greedy, generator=generator)
    return ids


def _continued(
    network: torch.nn.Module, empty: _Context, ids: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, _Context]:
    """What follows the text `ids`, and the context in which the end of that text was read."""
    logits, *caches = _outputs(network, empty.inputs(ids))
    length, places = ids.shape[1], empty.places
    fits = len(caches) == len(empty.memory) and all(cache.shape[-2] == places + length for cache in caches)
    if places > length or not fits:
        raise GpusqError("no text can be synthesized: the cache is not that of the text before", hint=_HINT)
    memory = {name: cache[..., -places:, :] for name, cache in zip(empty.memory, caches, strict=True)}
    follows = torch.zeros_like(ids)
    follows[:, 0] = _next(logits[:, -1], greedy=False, generator=generator)
    context = replace(empty, memory=memory, read=places)
    return _write(network, context, follows, 0, generator), context


def _next(logits: torch.Tensor, *, greedy: bool, generator: torch.Generator) -> torch.Tensor:
    if greedy:
        return logits.argmax(dim=-1)
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]


def _token_input(specs: Mapping[str, InputSpec]) -> str:
    named = [name for name in specs if name in _TOKENS] or list(specs)[:1]
    if len(specs[named[0]].shape) != 1:
        raise GpusqError(f"no text can be synthesized: the input {named[0]!r} holds no tokens [N, T]", hint=_HINT)
    return named[0]


def _outputs(network: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        leaves = torch.utils._pytree.tree_leaves(network(*inputs.values()))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _vocabulary(network: torch.nn.Module, context: _Context, batch: int) -> int:
    """The number of tokens, once it is sure that the network predicts them from what comes before.

    A row for each token is the largest table that a language model has; and the last token changes nothing before it.
    """
    ids = torch.zeros(batch, *context.specs[context.tokens].shape, dtype=torch.int64)
    logits = _outputs(network, context.inputs(ids))[0]
    ids[:, -1] = 1
    others = _outputs(network, context.inputs(ids))[0]
    tables = [max(tensor.shape) for tensor in network.state_dict().values() if tensor.dim() == 2]
    if logits.dim() != 3 or not tables or logits.shape[-1] != max(tables):
        raise GpusqError("no text can be synthesized: the network does not predict tokens", hint=_HINT)
    if ids.shape[1] > 1 and not torch.allclose(logits[:, :-1], others[:, :-1], rtol=1e-3, atol=1e-3):
        raise GpusqError("no text can be synthesized: the network looks ahead, it does not continue text", hint=_HINT)
    return logits.shape[-1]
