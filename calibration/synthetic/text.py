"""Text that a language model writes itself: data-free calibration after LLM-QAT (arXiv 2305.17888, section 3.1).

The first token is drawn from the whole vocabulary; the next three are the likeliest; from then on each is drawn from
the distribution that the model predicts. Greedy first, so that the text makes sense, and random then, so that it does
not repeat itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from calibration.samples import InputSpec
from profiles.errors import GpusqError

Advance = Callable[[float], None]
_GREEDY = 3
BATCH = 8
_HINT = "give text of its kind: --data calib.npz with token ids"
_TOKENS = ("input_ids", "tokens", "token_ids")


def write_text(
    network: torch.nn.Module,
    specs: Mapping[str, InputSpec],
    count: int,
    generator: torch.Generator,
    advance: Advance,
    batch: int = BATCH,
) -> dict[str, torch.Tensor]:
    """Return `count` texts as all inputs of `network`, [N, T]: token ids, masks of ones, positions, types of zeros.

    Args:
        network: in eval mode; makes logits [B, T, vocabulary] of token ids [B, T] first.
        specs: its inputs, in the order of its forward.
        count: texts.
        generator: of all random numbers.
        advance: is told the share that is done.
        batch: texts that are written together.

    Raises:
        GpusqError: the network predicts no next tokens, or has an input of which nothing is known.
    """
    tokens = _token_input(specs)
    (length,) = specs[tokens].shape
    vocabulary = _vocabulary(network, specs, tokens, batch)
    texts = []
    for start in range(0, count, batch):
        ids = torch.zeros(batch, length, dtype=torch.int64)
        ids[:, 0] = torch.randint(vocabulary, (len(ids),), generator=generator)
        for place in range(1, length):
            logits = _logits(network, _inputs(specs, tokens, ids))
            assert logits is not None  # `_vocabulary` saw them
            ids[:, place] = _next(logits[:, place - 1], greedy=place <= _GREEDY, generator=generator)
            advance(min((start + batch * (place + 1) / length) / count, 1.0))
        texts.append(ids)
    return _inputs(specs, tokens, torch.cat(texts)[:count])


def _next(logits: torch.Tensor, *, greedy: bool, generator: torch.Generator) -> torch.Tensor:
    if greedy:
        return logits.argmax(dim=-1)
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]


def _token_input(specs: Mapping[str, InputSpec]) -> str:
    named = [name for name in specs if name in _TOKENS] or list(specs)[:1]
    if len(specs[named[0]].shape) != 1:
        raise GpusqError(f"no text can be synthesized: the input {named[0]!r} holds no tokens [N, T]", hint=_HINT)
    return named[0]


def _inputs(specs: Mapping[str, InputSpec], tokens: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """All inputs for the token ids, in the order of the forward."""
    found = {}
    for name, spec in specs.items():
        if name == tokens:
            value = ids
        elif "mask" in name:
            value = torch.ones_like(ids)
        elif "position" in name:
            value = torch.arange(ids.shape[1]).expand_as(ids)
        elif "type" in name:
            value = torch.zeros_like(ids)
        else:
            raise GpusqError(f"no text can be synthesized: the input {name!r} is unknown", hint=_HINT)
        found[name] = value.to(getattr(torch, spec.dtype))
    return found


def _logits(network: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    with torch.inference_mode():
        output = network(*inputs.values())
    return next((leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)


def _vocabulary(network: torch.nn.Module, specs: Mapping[str, InputSpec], tokens: str, batch: int) -> int:
    """The number of tokens, once it is sure that the network predicts them from what comes before.

    A row for each token is the largest table that a language model has; and the last token changes nothing before it.
    """
    ids = torch.zeros(batch, *specs[tokens].shape, dtype=torch.int64)
    logits = _logits(network, _inputs(specs, tokens, ids))
    ids[:, -1] = 1
    others = _logits(network, _inputs(specs, tokens, ids))
    tables = [max(tensor.shape) for tensor in network.state_dict().values() if tensor.dim() == 2]
    if logits is None or others is None or logits.dim() != 3 or not tables or logits.shape[-1] != max(tables):
        raise GpusqError("no text can be synthesized: the network does not predict tokens", hint=_HINT)
    if ids.shape[1] > 1 and not torch.allclose(logits[:, :-1], others[:, :-1], rtol=1e-3, atol=1e-3):
        raise GpusqError("no text can be synthesized: the network looks ahead, it does not continue text", hint=_HINT)
    return logits.shape[-1]
