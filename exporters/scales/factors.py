"""Factors on the input of a layer, as SmoothQuant and AWQ train them: x · factor, and only then the quantizer.

They stay a multiplication of their own, so that the weight keeps its trained integers and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from exporters.scales.taken import Array
from profiles.errors import GpusqError

_BUFFER = "input_factor"


def multiply_inputs(module: nn.Module, factors: Mapping[str, Array]) -> None:
    """Let each module that `factors` names multiply its first input by its factor [channels]; in place.

    Call it ahead of `attach`: hooks run in the order in which they were added.

    Raises:
        GpusqError: there is no such module.
    """
    modules = dict(module.named_modules())
    for name, factor in factors.items():
        if name not in modules:
            raise GpusqError(
                f"the model has no module {name!r}, whose input factor the checkpoint holds",
                hint="the checkpoint belongs to another architecture",
            )
        modules[name].register_buffer(_BUFFER, torch.from_numpy(factor.copy()))
        modules[name].register_forward_pre_hook(_multiply)


def _multiply(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0] * module.get_buffer(_BUFFER), *inputs[1:])
