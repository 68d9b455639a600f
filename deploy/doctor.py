"""What this host has, what gpusq can do with it, and what to install for the rest."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from pydantic import Field

from deploy import environment, tensorrt_api
from deploy.text_table import text_table
from profiles.record import Record

SCHEMA = 1
EXPORT = "export checkpoints to ONNX"
VERIFY = "verify, and build for the CPU"
BUILD = "build TensorRT engines"
_DATA = "pip install 'gpusq[data]'"
_TENSORRT_ON_JETSON = "it comes with JetPack: make the environment with --system-site-packages"


@dataclass(frozen=True)
class Ability:
    """One thing that gpusq does, whether this host can, and what to do where it cannot."""

    what: str
    here: bool
    how: str


class Diagnosis(Record):
    """What `gpusq doctor` found."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    host: dict[str, str]
    versions: dict[str, str]
    onnxruntime_providers: tuple[str, ...]
    abilities: tuple[Ability, ...]

    @property
    def can_convert(self) -> bool:
        """Whether a checkpoint can be converted and verified here."""
        return self._has(EXPORT) and self._has(VERIFY)

    @property
    def is_useful(self) -> bool:
        """Whether this host can do one of the two jobs: convert checkpoints, or build bundles on their device."""
        return self.can_convert or (self._has(BUILD) and self._has(VERIFY))

    def _has(self, what: str) -> bool:
        return any(ability.here for ability in self.abilities if ability.what == what)

    def to_text(self) -> str:
        """The diagnosis for the terminal."""
        facts = [*self.host.items(), *self.versions.items()]
        facts.append(("onnxruntime providers", ", ".join(self.onnxruntime_providers) or "none"))
        able = [(a.what, "yes" if a.here else "no", "" if a.here else a.how) for a in self.abilities]
        return f"{text_table([('this host', ''), *facts])}\n\n{text_table([('gpusq can', 'here', 'to get it'), *able])}"


def diagnose() -> Diagnosis:
    """Look at this host."""
    return Diagnosis(
        host=environment.host(),
        versions={**environment.versions(), **tensorrt_api.versions()},
        onnxruntime_providers=_providers(),
        abilities=_abilities(),
    )


def _abilities() -> tuple[Ability, ...]:
    def has(module: str) -> bool:
        return importlib.util.find_spec(module) is not None

    has_gpu, jetson = bool(environment.gpus()), environment.jetson()
    tensorrt = _TENSORRT_ON_JETSON if jetson else "pip install tensorrt"
    return (
        Ability(EXPORT, has("torch") and has("onnxscript"), "pip install torch onnxscript"),
        Ability(VERIFY, has("onnxruntime"), "pip install onnxruntime"),
        Ability("calibrate on images", has("PIL"), _DATA),
        Ability("calibrate on texts", has("tokenizers"), _DATA),
        Ability("read compiled plans without a GPU", tensorrt_api.has_api("tensorrt-rtx"), "pip install tensorrt-rtx"),
        Ability(
            BUILD,
            has_gpu and tensorrt_api.has_api("tensorrt"),
            tensorrt if has_gpu else "run `gpusq build BUNDLE` on the device",
        ),
    )


def _providers() -> tuple[str, ...]:
    """What onnxruntime was built with; the GPU package names CUDA here whether or not there is a GPU."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())
