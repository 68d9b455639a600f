"""TensorRT's own command as a second way to an engine: the same build, with the flags of its line.

| | 10.3 (JetPack 6) | 10.16 (JetPack 7.2) | 11.x |
|---|---|---|---|
| strong typing | `--stronglyTyped` | `--stronglyTyped` | always; the flag would be a warning |
| tiling, same compute capability | no | yes | yes |
| DLA | yes | no | 11.4.1, with JetPack 7.2.2 |

Sources: samples/common/sampleOptions.cpp of NVIDIA/TensorRT at release/10.3, 10.16 and 11.1, and "Working with DLA" of
TensorRT 11.4.1. `--skipInference` only builds, so the defaults that 11 changed for measuring (CUDA graphs, spin wait,
transfers) play no part here.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from deploy.build_options import BuildOptions, InputRange, option_name
from deploy.tensorrt_api import Built, ShapeRange
from profiles.device import Device
from profiles.errors import GpusqError
from profiles.runtime_line import RuntimeLine

_LEVELS = {"ampere+": "ampere+", "same-compute-capability": "sameComputeCapability"}
_TILINGS = {"none": 0, "fast": 1, "moderate": 2, "full": 3}
_STRONG_BY_DEFAULT = (11, 0)
_TILING_FROM = (10, 8)
_SAME_CAPABILITY_FROM = (10, 8)
_DLA_NOT = ((10, 8), (11, 0))
_BANNER = re.compile(r"TensorRT\.trtexec \[TensorRT v(\d+)\]")
Version = tuple[int, int]


@dataclass(frozen=True)
class Files:
    """Where the engine goes, and what is written beside it."""

    engine: Path
    timing_cache: Path | None = None

    @property
    def layers(self) -> Path:
        """What the inspector says."""
        return self.engine.with_name(f"{self.engine.name}.layers.json")


def commands(device: Device, model: Path, options: BuildOptions) -> list[tuple[RuntimeLine, str]]:
    """The command for each line of TensorRT that `device` has, as a shell takes it; what a line lacks as a comment.

    Raises:
        GpusqError: the device has no DLA, and one is asked for.
    """
    if options.dla_core is not None and device.dla is None:
        raise GpusqError(f"{device.title} has no DLA", hint="leave out --dla")
    lines = [line for line in device.runtimes if line.runtime == "tensorrt"]
    return [(line, _said(line, model, options)) for line in lines]


def _said(line: RuntimeLine, model: Path, options: BuildOptions) -> str:
    try:
        return shlex.join(command(model, Files(Path("engine.tensorrt")), options, version_of(line.version)))
    except GpusqError as error:
        return f"# {error.message}"


def version_of(text: str) -> Version:
    """Major and minor of `10.3 (JetPack 6)` or `11.x`; the minor of a whole line is 0."""
    match = re.match(r"(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise GpusqError(f"'{text}' is no version", hint="a line of TensorRT is called like 10.3 or 11.x")
    return int(match[1]), int(match[2] or 0)


def command(model: Path, files: Files, options: BuildOptions, version: Version) -> list[str]:
    """The words of the command that builds `model` with TensorRT `version`.

    Raises:
        GpusqError: this version lacks an option.
    """
    return ["trtexec", *_flags(model, files, options, version)]


def _flags(model: Path, files: Files, options: BuildOptions, version: Version) -> Iterator[str]:
    yield f"--onnx={model}"
    yield f"--saveEngine={files.engine}"
    yield from ("--skipInference", "--verbose", "--profilingVerbosity=detailed", "--noTF32")
    yield f"--exportLayerInfo={files.layers}"
    if files.timing_cache is not None:
        yield f"--timingCacheFile={files.timing_cache}"
    if version < _STRONG_BY_DEFAULT:
        yield "--stronglyTyped"
    yield f"--sparsity={'enable' if options.sparse else 'disable'}"
    yield from _profiles([list(ranges_of(model, given)) for given in options.profiles])
    yield from _builder(options, version)
    yield from _device(options, version)


def _builder(options: BuildOptions, version: Version) -> Iterator[str]:
    if options.optimization_level is not None:
        yield f"--builderOptimizationLevel={options.optimization_level}"
    if options.workspace_mib is not None:
        yield f"--memPoolSize=workspace:{options.workspace_mib}"
    if options.tiling is not None:
        _need(version >= _TILING_FROM, version, "tiling")
        yield f"--tilingOptimizationLevel={_TILINGS[options.tiling]}"
    if options.hardware_compatibility != "none":
        same = options.hardware_compatibility == "same-compute-capability"
        _need(not same or version >= _SAME_CAPABILITY_FROM, version, "hardware_compatibility")
        yield f"--hardwareCompatibilityLevel={_LEVELS[options.hardware_compatibility]}"


def _device(options: BuildOptions, version: Version) -> Iterator[str]:
    if options.dla_core is not None:
        first, last = _DLA_NOT
        _need(not first <= version < last, version, "dla_core")
        yield f"--useDLACore={options.dla_core}"
    for asked, flag in (
        (options.gpu_fallback, "--allowGPUFallback"),
        (options.version_compatible, "--versionCompatible"),
        (options.weight_streaming, "--allowWeightStreaming"),
        (options.refit, "--refit"),
    ):
        if asked:
            yield flag


def _need(has: bool, version: Version, option: str) -> None:
    if not has:
        said = ".".join(map(str, version))
        raise GpusqError(f"TensorRT {said} lacks {option_name(option)}", hint="leave the option out on this line")


def _profiles(profiles: list[list[InputRange]]) -> Iterator[str]:
    for index, ranges in enumerate(profiles):
        if profiles[1:]:
            yield f"--profile={index}"
        yield from _shapes(ranges)


def _shapes(ranges: list[InputRange]) -> Iterator[str]:
    if ranges:
        for flag, shapes in (
            ("min", [(each.name, each.smallest) for each in ranges]),
            ("opt", [(each.name, each.usual) for each in ranges]),
            ("max", [(each.name, each.largest) for each in ranges]),
        ):
            yield f"--{flag}Shapes={','.join(f'{_quoted(name)}:{_joined(shape)}' for name, shape in shapes)}"


def _quoted(name: str) -> str:
    """A name with a colon stands between quotes: trtexec splits at the first colon behind them."""
    return f"'{name}'" if ":" in name else name


def _joined(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def ranges_of(model: Path, profile: Sequence[InputRange]) -> Iterator[InputRange]:
    """The ranges of the inputs that have a dynamic axis: those given, else the batches that `tensorrt_api` takes."""
    given = {each.name: each for each in profile}
    batch = ShapeRange()
    for value in ir.load(model).graph.inputs:
        name, shape = value.name or "", value.shape
        if name in given:
            yield given[name]
        elif shape is not None and not shape.is_static():
            sizes = (batch.smallest, batch.usual, batch.largest)
            shapes = [tuple(dim if isinstance(dim, int) else size for dim in shape) for size in sizes]
            yield InputRange(name, *shapes)


def build_with_trtexec(model: Path, folder: Path, options: BuildOptions, timing_cache: Path | None) -> Built:
    """Build `model` with the trtexec on PATH, and read its log.

    Raises:
        GpusqError: there is no trtexec, its version lacks an option, or it built nothing.
    """
    program = _program()
    version = _version(program)
    files = Files(folder / "trtexec.engine", timing_cache)
    if timing_cache is not None:
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
    words = command(model, files, options, (version[0], version[1]))
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True, check=False)
    log = tuple(f"{done.stdout}\n{done.stderr}".splitlines())
    if done.returncode or not files.engine.is_file():
        said = next((line for line in log if "[E]" in line), f"it exited with {done.returncode}")
        raise GpusqError(f"trtexec could not build {model.name}: {said}", hint=shlex.join(words))
    layers = files.layers.read_text(encoding="utf-8") if files.layers.is_file() else None
    engine = files.engine.read_bytes()
    files.engine.unlink()
    files.layers.unlink(missing_ok=True)
    return Built(engine, log, "tensorrt", ".".join(map(str, version)), layers)


def installed_version() -> str:
    """The version of the trtexec on PATH, such as 10.16.3.

    Raises:
        GpusqError: there is none, or it does not say its version.
    """
    return ".".join(map(str, _version(_program())))


def _program() -> str:
    program = shutil.which("trtexec")
    if program is None:
        raise GpusqError("there is no trtexec on PATH", hint="on a Jetson it is in /usr/src/tensorrt/bin")
    return program


def _version(program: str) -> tuple[int, int, int]:
    """The version in the banner of trtexec: v101603 is 10.16.3."""
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    match = _BANNER.search(f"{done.stdout}{done.stderr}")
    if match is None:
        raise GpusqError(f"{program} does not say its version", hint="is it TensorRT's?")
    number = int(match[1])
    return number // 10000, number // 100 % 100, number % 100
