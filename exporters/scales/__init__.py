"""Trained scales that lie in a state dict, taken out by name: no library that wrote them is needed, or imported.

Each grammar has a file of its own and answers whether a state dict is written in it. The first that is, takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from exporters.scales import bitnet, codebooks, compressed_tensors, modelopt
from exporters.scales.taken import Hints, TakenScales

__all__ = ["GRAMMARS", "Hints", "TakenScales", "take_scales"]

State = Mapping[str, torch.Tensor]
Metadata = Mapping[str, Any]
Recognise = Callable[[State, Metadata], bool]
Take = Callable[[State, Metadata, Hints], TakenScales]

GRAMMARS: tuple[tuple[Recognise, Take], ...] = (
    (modelopt.recognise, modelopt.take),
    (codebooks.recognise, codebooks.take),  # these look like the integer weights below
    (bitnet.recognise, bitnet.take),
    (compressed_tensors.recognise, compressed_tensors.take),
)


def take_scales(state: State, metadata: Metadata | None = None, hints: Hints | None = None) -> TakenScales:
    """Return the plain float weights of `state` and the scales that were trained with them.

    Args:
        state: a state dict; masks are folded already.
        metadata: what the file says beside its tensors: `modelopt_state`, or config.json's `quantization_config`.
        hints: what to do where the checkpoint leaves it open.

    Returns:
        `state` itself and no quantizers where it holds no scales.

    Raises:
        GpusqError: a scale cannot be kept as it is; the message names its layer.
    """
    metadata, hints = metadata or {}, hints or Hints()
    for recognise, take in GRAMMARS:
        if recognise(state, metadata):
            return take(state, metadata, hints)
    return TakenScales(dict(state))
