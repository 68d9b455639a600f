"""A published or promised figure, as data: what is claimed of which model, beside which baseline, and by whom.

    title = "My student"

    [[claim]]
    id = "student-cpu-latency"
    what = "latency speed-up"
    model = "dist/cpu"
    format = "2:4 INT8"
    device = "cpu"
    batch = 1
    baseline = "the dense teacher"
    baseline_precision = "fp32"
    value = 1.2
    source = "our release notes"

A ratio is claimed as at least `value`, a latency, drop or energy as at most `value`; `tolerance` is the share by which
it may be missed, for what was rounded when it was printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from profiles.errors import GpusqError
from profiles.record import Record
from profiles.toml_file import fit, read_toml

What = Literal[
    "latency speed-up", "throughput speed-up", "latency", "accuracy drop", "size ratio", "FLOPs ratio", "energy"
]
Scope = Literal["pruned layers", "linear layers", "all products", "all parameters"]
AT_MOST = frozenset({"latency", "accuracy drop", "energy"})
FOLDER = Path(__file__).with_name("claims")


class Claim(Record):
    """One claim."""

    id: str
    what: What
    model: str = Field(description="What it is claimed of; of a timing, the name or SHA-256 in the history.")
    architecture: str = Field(default="", description="The spec that builds its graph, such as timm:NAME.")
    format: str = Field(description="Pattern and types, in words.")
    weight_bits: int | None = Field(default=None, description="Of the pruned layers' weights.")
    activation_bits: int | None = None
    rest_bits: int = Field(default=32, description="Of what is not pruned.")
    dense: tuple[str, ...] = Field(default=(), description="Modules that are not pruned, as patterns such as head*.")
    scope: Scope | None = Field(default=None, description="What a size or FLOPs ratio is taken over.")
    formula: str = Field(default="", description="The FLOPs formula by name, or how a size is counted.")
    device: str | None = Field(default=None, description="A profile; None where the claim needs none.")
    power_mode: str | None = None
    batch: int | None = None
    baseline: str
    baseline_precision: str
    value: float = Field(description="A ratio, milliseconds, a share of the samples, or millijoules.")
    tolerance: float = Field(default=0.0, ge=0, lt=1)
    source: str

    @property
    def limit(self) -> float:
        """What has to be reached: the value with its tolerance."""
        return self.value * (1 + self.tolerance if self.what in AT_MOST else 1 - self.tolerance)


class ClaimFile(Record):
    """A file of claims."""

    title: str
    claims: tuple[Claim, ...] = Field(alias="claim")


def read_claims(given: str) -> ClaimFile:
    """Return the claims in a TOML file, or of a shipped one by its name, such as `gpusq-vit`.

    Raises:
        GpusqError: there is no such file, or a key is unknown, missing or of another type.
    """
    path = FOLDER / f"{given}.toml" if "/" not in given and not given.endswith(".toml") else Path(given)
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise GpusqError(f"no claims in {given}", hint=f"give a TOML file, or one of those shipped: {shipped}")
    found = fit(ClaimFile, read_toml(path), path)
    twice = {claim.id for claim in found.claims if sum(claim.id == other.id for other in found.claims) > 1}
    if twice:
        raise GpusqError(f"{path}: two claims are called {min(twice)}", hint="give each its own id")
    return found
