"""What TensorRT's verbose log says of sparse kernels: for how many layers they are eligible, for how many chosen.

Two wordings are known. TensorRT 8 lists names, newer releases count first, several times a build, once for each part of
the network, so the largest count is taken:

    (Sparsity) Layers eligible for sparse math: a, b
    (Sparsity) TRT inference plan picked sparse implementation for layers: b
    (Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b
    (Sparsity) Chose 1 layer(s) using sparse tactics: b
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_COUNTED = re.compile(r"\(Sparsity\).*?(Found|Chose) (\d+) layer")
_LISTED = re.compile(r"\(Sparsity\).*?(eligible for sparse math|picked sparse implementation for layers): ?(.*)")
_MEANING = {
    "Found": "eligible",
    "Chose": "chosen",
    "eligible for sparse math": "eligible",
    "picked sparse implementation for layers": "chosen",
}


@dataclass(frozen=True)
class SparseChoice:
    """Numbers of layers; None where the log says nothing, which is not zero."""

    eligible: int | None
    chosen: int | None


def read_sparse_choice(log: Iterable[str]) -> SparseChoice:
    """Return what `log` says."""
    found: dict[str, int] = {}
    for message in log:
        for what, number in _numbers(message):
            found[what] = max(number, found.get(what, 0))
    return SparseChoice(found.get("eligible"), found.get("chosen"))


def _numbers(message: str) -> Iterator[tuple[str, int]]:
    for word, number in _COUNTED.findall(message):
        yield _MEANING[word], int(number)
    for words, names in _LISTED.findall(message):
        yield _MEANING[words], len([name for name in names.split(",") if name.strip()])
