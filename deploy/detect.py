"""Name the profile of this host: by the GPU's name and, where several fit, by the memory; else `cpu`."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from deploy import environment
from profiles.device import Device, list_devices
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1
CPU = "cpu"


class Detected(Record):
    """What `gpusq profiles --detect` found."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    profile: str
    gpu: str | None = Field(description="The GPU's or the module's name; None where there is none.")
    power_mode: str | None = Field(description="The mode of nvpmodel that the profile knows by this name.")
    why: str = Field(description="One sentence: what the profile was chosen by.")


def detect(devices: Iterable[Device] | None = None) -> Detected:
    """Return the profile, of `devices` or of all that are shipped, that this host is.

    Of several GPUs the first is taken, in the order of CUDA_VISIBLE_DEVICES or else of the PCI bus.
    """
    here = environment.gpus()
    if not here:
        return Detected(profile=CPU, gpu=None, power_mode=None, why="this host has no NVIDIA GPU")
    gpu = here[0]
    found = _nearest_memory(_called(gpu, devices or list_devices()))
    if found is None:
        why = f"no profile is for {gpu.name} of compute capability {gpu.compute_capability or 'unknown'}"
        return Detected(profile=CPU, gpu=gpu.name, power_mode=None, why=f"{why}; write one, see docs/profiles.md")
    others = f", the first of {len(here)} GPUs" if len(here) > 1 else ""
    mode, said = _power_mode(found)
    return Detected(
        profile=found.name, gpu=gpu.name, power_mode=mode, why=f"this host's GPU is {gpu.name}{others}{said}"
    )


def _called(gpu: environment.Gpu, devices: Iterable[Device]) -> list[Device]:
    """The devices that the GPU can be; one whose compute capability is not known is taken by its name alone."""
    capability = gpu.compute_capability
    return [d for d in devices if d.is_called(gpu.name) and capability in ("", d.compute_capability)]


def _nearest_memory(devices: list[Device]) -> Device | None:
    """The only one, or the one whose memory is nearest to this host's: a Jetson's name does not tell its memory."""
    if len(devices) < 2:
        return next(iter(devices), None)
    here = environment.memory_gib()
    return min(devices, key=lambda device: abs((device.memory.size_gb if device.memory else 0) - here))


def _power_mode(device: Device) -> tuple[str | None, str]:
    """The host's power mode, where the profile has it, and what to say of it."""
    name = environment.power_mode() if device.power else None
    if name is None:
        return None, ""
    try:
        mode = device.at(name).power_mode
    except GpusqError:
        return None, f"; its power mode {name} is none of the profile's"
    return mode, f" in power mode {mode}"
