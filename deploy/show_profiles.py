"""Show device profiles: all of them in one table, or everything that one of them says."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterable, Iterator
from io import StringIO

from pydantic import Field

from deploy import environment, tensorrt_api
from deploy.text_table import text_table
from profiles.device import Device
from profiles.hardware import PowerMode
from profiles.rates import NUMBER_TYPES, PeakRates
from profiles.record import Record

SCHEMA = 1
_HEADING = ("profile", "device", "CC", "memory", "runtime", "plan")
_TYPE_NAMES = {"fp16_acc16": "fp16, fp16 sums", "fp8_acc16": "fp8, fp16 sums"}
_WIDTH = 80
_LABEL = 20


class ShownProfile(Device):
    """A profile, what follows from its figures, and what this host can do for it."""

    peak_rates: PeakRates | None = Field(description="TFLOPS or TOPS, computed from SMs and clocks.")
    dla_int8_dense_tops: float | None
    compiled_here_as: str | None = Field(description="The target that this host compiles plans for; None if it cannot.")
    host: dict[str, str] | None = Field(description="Of the profile that is this host: what it is.")


class ShownProfiles(Record):
    """What `gpusq profiles --json` prints."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    profiles: tuple[ShownProfile, ...]


def show_profiles(devices: Iterable[Device]) -> ShownProfiles:
    """Return `devices` with what is known of each on this host."""
    return ShownProfiles(profiles=tuple(_shown(device) for device in devices))


def list_text(shown: ShownProfiles, width: int = _WIDTH) -> str:
    """The profiles as one table of at most `width` characters a line, and what else they are called."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*_HEADING, box=None, padding=(0, 1, 0, 0), header_style="")
    for profile in shown.profiles:
        table.add_row(*_row(profile))
    screen = StringIO()
    Console(file=screen, width=width, color_system=None, highlight=False).print(table)
    aliases = [f"{alias} = {profile.name}" for profile in shown.profiles for alias in profile.aliases]
    notes = [
        f"Also called: {', '.join(aliases)}." if aliases else "",
        "Plan: what this host compiles plans for, ~ where that is the device's nearest relative, - where it cannot.",
    ]
    lines = [line.rstrip() for line in screen.getvalue().splitlines()]
    return "\n".join([*lines, "", *(textwrap.fill(note, width, break_on_hyphens=False) for note in notes if note)])


def one_text(shown: ShownProfile, width: int = _WIDTH) -> str:
    """Everything that a profile says, for people."""
    parts = [
        f"{shown.title}\n{', '.join((shown.name, *shown.aliases))}",
        "\n".join(f"{what:{_LABEL}}{value}" for what, value in _facts(shown)),
        text_table([("runtime", "version", "opset", "attention", "float"), *_runtimes(shown)]),
    ]
    if shown.peak_rates is not None:
        parts.append(text_table([_rates_heading(shown), *_rates(shown, shown.peak_rates)]))
    if shown.power is not None:
        parts.append(text_table([("power mode", "SMs", "GPU MHz", "GB/s", "CPU", "DLA MHz"), *_modes(shown)]))
    sources = [_indented(what, source, width) for what, source in _sources(shown)]
    return "\n\n".join([*parts, "\n".join(["Sources", *sources])])


def _shown(device: Device) -> ShownProfile:
    return ShownProfile(
        **{key: getattr(device, key) for key in Device.model_fields},
        peak_rates=device.rates,
        dla_int8_dense_tops=device.dla_int8_tops,
        compiled_here_as=_compiled_here_as(device),
        host=_host() if device.compute_capability is None and device.runtime == "onnxruntime" else None,
    )


def _compiled_here_as(device: Device) -> str | None:
    if device.runtime == "onnxruntime":
        return "onnxruntime" if importlib.util.find_spec("onnxruntime") is not None else None
    target = device.ahead_of_time
    return target.compute_capability if target and tensorrt_api.has_api("tensorrt-rtx") else None


def _host() -> dict[str, str]:
    found = environment.host()
    memory = environment.memory_gib()
    return {key: found[key] for key in ("processor", "machine", "cores")} | {"memory GiB": f"{memory:.1f}"}


def _row(profile: ShownProfile) -> tuple[str, ...]:
    memory = f"{profile.memory.size_gb:g} GB" if profile.memory else ""
    version = profile.runtime_version.split(" ")[0]
    return (
        profile.name,
        profile.title.removeprefix("NVIDIA ").removesuffix(memory).strip(),
        profile.compute_capability or "-",
        memory or "-",
        profile.runtime if version == "any" else f"{profile.runtime} {version}",
        _plan(profile),
    )


def _plan(profile: ShownProfile) -> str:
    if profile.compiled_here_as is None:
        return "-"
    near = profile.ahead_of_time is not None and profile.ahead_of_time.nearest
    return f"{'~' if near else ''}{'yes' if profile.compiled_here_as == 'onnxruntime' else profile.compiled_here_as}"


def _facts(shown: ShownProfile) -> Iterator[tuple[str, str]]:
    yield from (shown.host or {}).items()
    if shown.compute_capability:
        architecture = f", {shown.architecture.title}" if shown.architecture else ""
        yield "compute capability", f"{shown.compute_capability}{architecture}"
    if gpu := shown.gpu:
        base = f", base {gpu.base_clock_mhz:g}" if gpu.base_clock_mhz else ""
        tensor = f", tensor cores {gpu.tensor_clock_mhz:g}" if gpu.tensor_clock_mhz else ""
        yield "GPU", f"{gpu.sms} SMs at {gpu.boost_clock_mhz:g} MHz{tensor}{base}"
        yield "L2 cache", f"{gpu.l2_mib:g} MiB" if gpu.l2_mib else "not known"
        yield "power", f"{gpu.power_w:g} W" if gpu.power_w else "not known"
    if shown.architecture:
        yield "shared memory", f"{shown.architecture.shared_memory_kib} KiB a SM"
    if memory := shown.memory:
        rate = f"{memory.bus_bits} bits × {memory.data_rate_mbps:g} Mbit/s"
        yield "memory", f"{memory.size_gb:g} GB {memory.kind}, {memory.bandwidth_gb_s:.1f} GB/s ({rate})"
    if shown.dla and shown.dla_int8_dense_tops is not None:
        cores, tops = len(shown.dla.clocks_mhz), shown.dla_int8_dense_tops
        yield "DLA", f"{cores} cores, {tops:.1f} TOPS INT8 dense, {2 * tops:.1f} sparse"
    if shown.power_mode:
        yield "power mode", shown.power_mode
    if sparse := shown.sparse:
        yield "sparse kernels", f"K a multiple of {sparse.int8_k_multiple} (INT8), {sparse.float16_k_multiple} (FP16)"
    elif shown.architecture:
        yield "sparse kernels", "none: the GPU has no 2:4"
    yield "plan on this host", _plan_told(shown)


def _plan_told(shown: ShownProfile) -> str:
    if shown.compiled_here_as is None:
        return "no: pip install tensorrt-rtx" if shown.ahead_of_time else "no: `gpusq build` on the device"
    if shown.ahead_of_time is None:
        return f"yes, by {shown.compiled_here_as}"
    near = shown.ahead_of_time.nearest
    return f"compiled for {shown.compiled_here_as}{', its nearest relative' if near else ''}"


def _runtimes(shown: ShownProfile) -> Iterator[tuple[str, ...]]:
    for line in shown.runtimes:
        onnx = line.onnx
        yield line.runtime, line.version, str(onnx.opset), onnx.attention, onnx.float_type


def _rates_heading(shown: ShownProfile) -> tuple[str, ...]:
    return ("TFLOPS, TOPS", "dense", "2:4", *(("published", "2:4") if shown.published else ()))


def _rates(shown: ShownProfile, rates: PeakRates) -> Iterator[tuple[str, ...]]:
    columns = [rates.dense, rates.sparse]
    if shown.published:
        columns += [shown.published.dense, shown.published.sparse]
    for kind in NUMBER_TYPES:
        figures = [getattr(column, kind) for column in columns]
        if any(figures):
            yield _TYPE_NAMES.get(kind, kind), *("-" if figure is None else f"{figure:.4g}" for figure in figures)


def _modes(shown: ShownProfile) -> Iterator[tuple[str, ...]]:
    for mode in shown.power.modes if shown.power else ():
        memory = shown.at(mode.name).memory
        yield (
            mode.name,
            str(2 * mode.tpcs),
            f"{mode.gpu_clock_mhz:g}",
            f"{memory.bandwidth_gb_s:.1f}" if memory else "-",
            f"{mode.cpu_cores} × {mode.cpu_clock_mhz:g} MHz",
            _dla_clocks(mode),
        )


def _dla_clocks(mode: PowerMode) -> str:
    return ", ".join(f"{clock:g}" for clock in mode.dla_clocks_mhz) or "-"


def _sources(shown: ShownProfile) -> Iterator[tuple[str, str]]:
    parts = ("architecture", "gpu", "memory", "dla", "published", "power", "onnx", "ahead_of_time", "sparse")
    for part in parts:
        if (found := getattr(shown, part)) is not None:
            yield part.replace("_", " "), found.source


def _indented(what: str, source: str, width: int) -> str:
    return textwrap.fill(
        f"{what}: {source}", width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
