"""The file of measured scales: which tensor of which graph has which range, and what that was measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from deploy.manifest import SampleSet
from exporters.placement import Placement
from profiles.errors import GpusqError
from profiles.record import Record, first_problem

SCHEMA = 1


class TensorScale(Record):
    """The range of one activation."""

    tensor: str = Field(description="Its name in the graph that the surgery makes before quantizers are placed.")
    amax: float = Field(ge=0, description="The largest magnitude that is not clipped.")
    scale: float = Field(ge=0, description="amax / 127, before it is rounded to the type of the graph.")
    largest: float = Field(ge=0, description="The largest magnitude that was seen.")
    rms: float | None = Field(description="The root of the mean square; None where the method needs the largest alone.")


class Scales(Record):
    """What `gpusq calibrate` writes and `--scales` reads."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    model: str
    sha256: str = Field(description="Of the checkpoint that the ranges are of.")
    profile: str
    placement: Placement
    method: str
    samples: SampleSet
    tensors: tuple[TensorScale, ...]

    def amax(self, names: Sequence[str]) -> Mapping[str, float]:
        """The ranges of the tensors called `names`.

        Raises:
            GpusqError: one of them was not measured.
        """
        known = {tensor.tensor: tensor.amax for tensor in self.tensors}
        if missing := [name for name in names if name not in known]:
            raise GpusqError(
                f"{len(missing)} of {len(names)} ranges are not in the scales, such as that of {missing[0]!r}",
                hint=f"they are of profile {self.profile}, placement {self.placement}: calibrate for this one",
            )
        return {name: known[name] for name in names}


def read_scales(path: Path) -> Scales:
    """Read the file that `gpusq calibrate` wrote.

    Raises:
        GpusqError: it is no such file, or of a newer release.
    """
    try:
        scales = Scales.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise GpusqError(f"{path}: {first_problem(error)}", hint="give a file that gpusq calibrate wrote") from None
    except UnicodeDecodeError:
        raise GpusqError(f"{path} is no text", hint="give a file that gpusq calibrate wrote") from None
    if scales.schema_version > SCHEMA:
        raise GpusqError(f"{path} has schema {scales.schema_version}", hint="use a newer gpusq")
    return scales
