"""Which of the samples are used: N of them, the same ones on every machine and with every version.

Samples are ranked by SHA-256 of `SEED/NAME`, and the first N are used, in their own order. No random generator is
asked, whose numbers change from one release to the next; and a sample that is added displaces at most one other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from calibration.rows import Index, Rows, batches
from profiles.errors import GpusqError


@dataclass(frozen=True)
class Choice:
    """How many samples are used, all where `count` is None, and the seed of their choice."""

    count: int | None = None
    seed: int = 0

    def of(self, names: Sequence[str]) -> Index:
        """The numbers of the chosen samples among those called `names`, rising."""
        if self.count is None or self.count >= len(names):
            return np.arange(len(names))
        ranked = sorted(range(len(names)), key=lambda row: _digest(f"{self.seed}/{names[row]}"))
        return np.array(sorted(ranked[: self.count]), np.intp)


@dataclass(frozen=True)
class Member:
    """One sample that is used, and the SHA-256 of its file, or of its values."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Read:
    """What was read of a source.

    Attributes:
        inputs: rows [N, …] by input name, as the model takes them.
        members: the samples, N of them.
        available: how many there were to choose from.
        labels: int64 [N], where they are known.
        notes: what was converted, and what may be wrong.
    """

    inputs: Mapping[str, Rows]
    members: tuple[Member, ...]
    available: int
    labels: npt.NDArray[np.int64] | None = None
    notes: tuple[str, ...] = field(default=())


def listing(members: Iterable[Member]) -> str:
    """The list of the samples in the form of sha256sum: `sha256sum --check` takes that of a folder of images."""
    return "".join(f"{member.sha256}  {member.name}\n" for member in members)


def digest_of(members: Iterable[Member]) -> str:
    """One SHA-256 for the samples: of their own, one a line, in their order; names do not count."""
    return hashlib.sha256("".join(f"{member.sha256}\n" for member in members).encode()).hexdigest()


def members_of(names: Sequence[str], inputs: Mapping[str, Rows], source: str) -> tuple[Member, ...]:
    """Each row's name and the SHA-256 of its values: of every input by name, its type, its shape and its bytes.

    Raises:
        GpusqError: a row of floats holds NaN or infinity.
    """
    members = []
    for rows in batches(len(names)):
        arrays = {name: np.ascontiguousarray(inputs[name][rows]) for name in sorted(inputs)}
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise GpusqError(f"{source}: {name!r} holds NaN or infinity", hint="clean the samples")
        for place, row in enumerate(rows):
            parts = (f"{name} {a.dtype.name} {a.shape[1:]}".encode() + a[place].tobytes() for name, a in arrays.items())
            members.append(Member(names[row], hashlib.sha256(b"".join(parts)).hexdigest()))
    return tuple(members)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
