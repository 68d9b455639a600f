"""A device as data: one TOML file per device, read into a strict model.

`load_device("a100")` takes a file's stem, one of its aliases, or the path of a user's own file. An unknown key, a
missing figure and a misspelt name are each one error that names the file and the key.

A file says what is its device's own. What it shares it names, and the model that comes out holds all of it:

    architecture = "sm80"          the entry of profiles/architectures.toml, with its ahead-of-time target and the
                                   rules of the sparse kernels
    runtimes = ["tensorrt-11", …]  entries of profiles/runtimes.toml; the first gives `runtime` and `onnx`
    inherits = "agx-orin"          another profile, by name: every key that is not given comes from there

A key that the file has itself wins, always.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from profiles.architecture import AheadOfTime, Architecture, SparseKernels
from profiles.errors import GpusqError
from profiles.hardware import Dla, Gpu, Memory, PowerMode, PowerModes, PublishedRates
from profiles.rates import PeakRates, peak_rates
from profiles.record import Record
from profiles.runtime_line import AttentionForm, FloatType, OnnxTarget, RuntimeLine
from profiles.shared_fields import one_of, with_shared
from profiles.toml_file import Fields, fit, read_toml

__all__ = ["AheadOfTime", "AttentionForm", "Device", "FloatType", "OnnxTarget", "SparseKernels", "list_devices",
           "load_device"]  # fmt: skip

DEVICES_DIR = Path(__file__).parent / "devices"
# What is true of the figures of one GPU: a file with a `[gpu]` of its own does not inherit it.
_OF_ITS_GPU = frozenset({"published", "power", "power_mode"})
# A word behind a product's name that makes it another product.
_OTHER_PRODUCT = r"(?! (?:Laptop|Mobile|Max-Q|Ti|SUPER|D)\b)"

Runtime = Literal["tensorrt", "onnxruntime"]
_BFLOAT16_FROM = 8.0


class Device(Record):
    """One device profile; see `profiles/devices/*.toml`."""

    name: str
    title: str
    aliases: tuple[str, ...] = ()
    runtime: Runtime
    runtime_version: str = Field(description="The line of the runtime that the device is shipped with.")
    runtimes: tuple[RuntimeLine, ...] = Field(
        default=(), description="All lines that run on it, the shipped one first."
    )
    compute_capability: str | None = None
    gpu_name: str | None = Field(default=None, description="Part of the name by which the driver calls the GPU.")
    onnx: OnnxTarget
    ahead_of_time: AheadOfTime | None = None
    sparse: SparseKernels | None = None
    architecture: Architecture | None = None
    gpu: Gpu | None = None
    memory: Memory | None = None
    dla: Dla | None = None
    published: PublishedRates | None = None
    power: PowerModes | None = None
    power_mode: str | None = Field(default=None, description="The mode that the figures are of.")

    @property
    def rates(self) -> PeakRates | None:
        """Peak rates in TFLOPS or TOPS, computed from SMs and clocks; None where those are not known."""
        if self.architecture is None or self.gpu is None:
            return None
        return peak_rates(
            self.architecture.per_clock,
            self.architecture.sparse_types,
            sms=self.gpu.sms,
            clock_mhz=self.gpu.boost_clock_mhz,
            tensor_clock_mhz=self.gpu.tensor_clock_mhz or self.gpu.boost_clock_mhz,
            fp32_accumulate=self.gpu.fp32_accumulate,
        )

    @property
    def dla_int8_tops(self) -> float | None:
        """Dense INT8 rate of all DLA cores together; None on a device without them. 2:4 doubles it."""
        if self.architecture is None or self.architecture.dla_int8_per_clock is None or self.dla is None:
            return None
        return self.architecture.dla_int8_per_clock * sum(self.dla.clocks_mhz) / 1e6

    def is_called(self, gpu: str) -> bool:
        """Whether `gpu`, a name that the driver or the device tree gives, is this device's: `L4`, but not `L40S`."""
        if self.gpu_name is None:
            return False
        return re.search(rf"(?<!\w){re.escape(self.gpu_name)}(?!\w){_OTHER_PRODUCT}", gpu) is not None

    def at(self, power_mode: str) -> Device:
        """The device as the power mode of that name leaves it: SMs, clocks, bandwidth, and so its rates.

        Args:
            power_mode: such as `30W`; `MODE_30W`, as nvpmodel prints it, and small letters are understood.

        Raises:
            GpusqError: the device has no such mode; its modes are in the message.
        """
        mode = self._mode(power_mode)
        if mode.name == self.power_mode:
            return self
        changes: dict[str, Any] = {"power_mode": mode.name, "published": None}  # those are the usual mode's
        if self.gpu is not None:
            changes["gpu"] = self.gpu.model_copy(
                update={"sms": 2 * mode.tpcs, "boost_clock_mhz": mode.gpu_clock_mhz, "tensor_clock_mhz": None}
            )
        if self.memory is not None:
            data_rate = 2 * mode.emc_clock_mhz
            bandwidth = self.memory.bus_bits / 8 * data_rate / 1e3
            changes["memory"] = self.memory.model_copy(
                update={"data_rate_mbps": data_rate, "bandwidth_gb_s": bandwidth}
            )
        if self.dla is not None:
            changes["dla"] = self.dla.model_copy(update={"clocks_mhz": mode.dla_clocks_mhz})
        return self.model_copy(update=changes)

    def _mode(self, asked: str) -> PowerMode:
        if self.power is None:
            raise GpusqError(
                f"{self.name} has no power modes, so no '{asked}'",
                hint="leave the power mode out: its clocks are fixed",
            )
        by_name = {_plain(mode.name): mode for mode in self.power.modes}
        if _plain(asked) not in by_name:
            raise GpusqError(
                f"{self.name} has no power mode '{asked}'; it has {', '.join(mode.name for mode in self.power.modes)}",
                hint=f"`gpusq profiles {self.name}` shows what each allows",
            )
        return by_name[_plain(asked)]

    @property
    def has_bfloat16(self) -> bool:
        """Whether its tensor cores take bfloat16: from compute capability 8.0 on (CUDA C++ programming guide, 17.2)."""
        return self.compute_capability is not None and float(self.compute_capability) >= _BFLOAT16_FROM


def load_device(name: str) -> Device:
    """Return the profile called `name`: a stem in `profiles/devices/`, an alias, or a path to a TOML file.

    Raises:
        GpusqError: there is no such profile (the nearest name is given), or the file does not fit the model.
    """
    if name.endswith(".toml"):
        return _read(Path(name))
    by_name = _names()
    return by_name[one_of(by_name, name, "no device profile", hint="`gpusq profiles` lists them")]


def list_devices() -> Iterator[Device]:
    """Yield every shipped profile, by name."""
    yield from (_read(path) for path in sorted(DEVICES_DIR.glob("*.toml")))


@cache
def _names() -> dict[str, Device]:
    return {name: device for device in list_devices() for name in (device.name, *device.aliases)}


@cache
def _paths() -> dict[str, Path]:
    """Where the profile of each name and alias is, none of them being read further than that."""
    paths = sorted(DEVICES_DIR.glob("*.toml"))
    return {name: path for path in paths for name in (path.stem, *read_toml(path).get("aliases", ()))}


def _read(path: Path) -> Device:
    fields = read_toml(path)
    if "name" in fields:
        raise GpusqError(f"{path}: name: a profile is called after its file", hint="remove the key, or use 'title'")
    return fit(Device, {"name": path.stem, **with_shared(_with_inherited(fields, path), path)}, path)


def _with_inherited(fields: Fields, path: Path) -> Fields:
    """`fields`, and for what they leave out those of the profile that they inherit from, but its aliases."""
    if "inherits" not in fields:
        return fields
    own = {key: value for key, value in fields.items() if key != "inherits"}
    known = _paths()
    parent = known[one_of(known, str(fields["inherits"]), f"{path}: inherits: no device profile")]
    inherited = _with_inherited(read_toml(parent), parent)
    left_out = {"aliases"} | (_OF_ITS_GPU if "gpu" in own else set())
    return {**{key: value for key, value in inherited.items() if key not in left_out}, **own}


def _plain(mode: str) -> str:
    return mode.casefold().removeprefix("mode_").replace(" ", "_")
