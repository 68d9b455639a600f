"""What TensorRT's log tells of a build that came out as less than it could be: layers off the DLA, kernels not tried.

    Layer '/model.23/Slice_1' (SLICE): Unsupported on DLA. Switching this layer's device type to GPU.
    Default DLA is enabled but layer Gather_3 is not supported on DLA, falling back to GPU.     (TensorRT 7)
    Default DLA is enabled but layer conv4 is not running on DLA, falling back to GPU.       (TensorRT 5)
    DLA supports only 8 subgraphs per DLA core. Switching to GPU for layer conv_6
    Skipping tactic 3 due to insuficient memory on requested size of 449 detected for tactic 4.     (so spelt in 8.x)
    UNSUPPORTED_STATE: Skipping tactic 33 due to insufficient memory on requested size of 629145600 detected for …

A build that skips kernels for want of memory passes, and its engine is slower than the same build on a quiet device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from deploy.sparsity_log import SparseChoice, read_sparse_choice

_FALLBACK = re.compile(
    r"Default DLA is enabled but layer (.+?) is not (?:supported|running) on DLA,? (?:and )?falling back to GPU"
    r"(?! is not enabled)|Switching to GPU for layer (\S+)|Layer '(.+?)' \(\w+\): Unsupported on DLA"
    r"|Switching (?!this layer's)(.+?) device type to GPU"
)
_SKIPPED = re.compile(r"Skipping tactic \S+ due to insuff?icient memory")


@dataclass(frozen=True)
class BuildLog:
    """What a log says.

    Attributes:
        dla_fallbacks: the layers that the DLA left to the GPU, in order, each once.
        tactics_skipped: how many times a kernel was not tried, because there was not enough memory.
        sparse: layers that are eligible for sparse kernels, and for which one was chosen.
    """

    dla_fallbacks: tuple[str, ...]
    tactics_skipped: int
    sparse: SparseChoice


def read_build_log(log: Iterable[str]) -> BuildLog:
    """Read the messages of one build."""
    messages = list(log)
    found = (next(filter(None, match), "") for message in messages for match in _FALLBACK.findall(message))
    return BuildLog(
        dla_fallbacks=tuple(dict.fromkeys(name for name in found if name)),
        tactics_skipped=sum(len(_SKIPPED.findall(message)) for message in messages),
        sparse=read_sparse_choice(messages),
    )
