"""One adapter over `tensorrt` and `tensorrt_rtx`: ONNX in, engine bytes and the compiler's log out.

The two packages share their API, so one code path drives both. What differs is found by asking the module, never by
comparing versions:

* `tensorrt_rtx` compiles ahead of time for a compute capability, without a GPU; `tensorrt` builds for the host's GPU.
* TensorRT 10 needs the STRONGLY_TYPED creation flag; TensorRT 11 ignores it, TensorRT-RTX knows nothing else.
* what a build asks for beyond that is set by `builder_config`, or refused.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from deploy.build_options import BuildOptions, InputRange
from deploy.builder_config import configure
from deploy.timing_cache import load_timing_cache, save_timing_cache
from profiles.errors import GpusqError

_log = logging.getLogger(__name__)
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@dataclass(frozen=True)
class ShapeRange:
    """The smallest, usual and largest batch that the engine must take."""

    smallest: int = 1
    usual: int = 8
    largest: int = 32


@dataclass(frozen=True)
class Built:
    """A compiled engine, what the compiler said while compiling it, and what its inspector says of it on a GPU."""

    engine: bytes
    log: tuple[str, ...]
    runtime: str
    runtime_version: str
    layers: str | None = None


def has_api(runtime: str) -> bool:
    """Whether the Python package of `runtime` can be imported here."""
    try:
        return hasattr(import_api(runtime), "Builder")  # a package of type stubs imports as an empty module
    except ImportError:
        return False


def import_api(runtime: str) -> ModuleType:
    """Import the package of `runtime`, `tensorrt` or `tensorrt-rtx`."""
    return importlib.import_module(_MODULES[runtime])


def build_engine(
    model: Path,
    runtime: str,
    *,
    compute_capability: str | None = None,
    batch: ShapeRange | None = None,
    usual: Mapping[str, Sequence[int]] | None = None,
    options: BuildOptions | None = None,
    timing_cache: Path | None = None,
) -> Built:
    """Compile the ONNX file `model`.

    Args:
        model: strongly typed ONNX.
        runtime: `tensorrt` or `tensorrt-rtx`.
        compute_capability: such as `SM80`, to compile ahead of time; None builds for the GPU of this host.
        batch: the sizes that the engine must take for every dynamic axis, but for those that `usual` tells.
        usual: the shapes of inputs; a dynamic axis other than the first has just the length that it has there.
        options: what else is asked; the shapes in it go before `batch` and `usual`, and may make several optimization
            profiles.
        timing_cache: the file of timings to read and to write; None keeps none.

    Raises:
        GpusqError: the parser or the builder refused the model, with their first error in the message, or this
            runtime lacks an option.
    """
    try:
        ranges = _Ranges(batch or ShapeRange(), usual or {}, (options or BuildOptions()).profiles)
        return _build(model, runtime, compute_capability, ranges, options or BuildOptions(), timing_cache)
    except GpusqError as error:
        # Its frames hold TensorRT's objects. Kept with the error, they would die whenever Python collects garbage: also
        # inside the log call of another build, which holds the lock that they need.
        raise error.with_traceback(None) from None


@dataclass(frozen=True)
class _Ranges:
    """What is known of the inputs' shapes."""

    batch: ShapeRange
    usual: Mapping[str, Sequence[int]]
    profiles: Sequence[Sequence[InputRange]]


def _build(
    model: Path,
    runtime: str,
    compute_capability: str | None,
    ranges: _Ranges,
    options: BuildOptions,
    timing_cache: Path | None,
) -> Built:
    trt: Any = import_api(runtime)
    logger = _collecting_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_creation_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        said = parser.get_error(0).desc() if parser.num_errors else logger.first_error()
        raise GpusqError(
            f"{runtime} cannot parse {model.name}: {_first_line(said)}",
            hint="choose a profile with a newer runtime; `gpusq -v …` shows the parser's whole log",
        )
    config = builder.create_builder_config()
    configure(trt, builder, network, config, options)
    if timing_cache is not None:
        load_timing_cache(trt, config, timing_cache)
    if compute_capability is not None:
        _target(trt, config, compute_capability)
    for given in ranges.profiles:
        if config.add_optimization_profile(_optimization_profile(builder, network, ranges, given)) < 0:
            raise RuntimeError(f"{runtime} refused an optimization profile: {logger.first_error()}")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise GpusqError(
            f"{runtime} {trt.__version__} could not build {model.name}: {logger.first_error()}",
            hint="`gpusq -v …` shows the compiler's whole log",
        )
    if timing_cache is not None:
        save_timing_cache(trt, config, timing_cache)
    layers = None if compute_capability is not None else _inspect(trt, logger, bytes(engine))
    return Built(bytes(engine), tuple(logger.messages), runtime, str(trt.__version__), layers)


def _inspect(trt: Any, logger: Any, built: bytes) -> str | None:
    """What the inspector says of the engine, as JSON; None where it cannot be loaded."""
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(built)
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _collecting_logger(trt: Any) -> Any:
    class CollectingLogger(trt.ILogger):  # type: ignore[misc]
        """Keeps every message: the plan is the last of the verbose ones."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append(message)
            _log.debug("%s", message)
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

        def first_error(self) -> str:
            return _first_line(self.errors[0]) if self.errors else "it gave no reason"

    return CollectingLogger()


def _creation_flags(trt: Any) -> int:
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if strongly_typed is None else 1 << int(strongly_typed)


def _target(trt: Any, config: Any, compute_capability: str) -> None:
    known = getattr(trt, "ComputeCapability", None)
    if known is None or not hasattr(known, compute_capability):
        raise GpusqError(
            f"{trt.__name__} {trt.__version__} cannot compile for {compute_capability} ahead of time",
            hint="install tensorrt-rtx, or run `gpusq build` on the device",
        )
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(getattr(known, compute_capability), 0):
        raise RuntimeError(f"{trt.__name__} refused {compute_capability}")


def _optimization_profile(builder: Any, network: Any, ranges: _Ranges, said: Sequence[InputRange]) -> Any:
    profile = builder.create_optimization_profile()
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    given = {each.name: each for each in said}
    for name in given.keys() - {tensor.name for tensor in tensors}:
        raise GpusqError(
            f"the model has no input '{name}'", hint=f"its inputs are: {', '.join(tensor.name for tensor in tensors)}"
        )
    for tensor in tensors:
        if tensor.name in given:
            shapes = _checked(given[tensor.name], tensor.shape)
        else:
            usual, batch = ranges.usual.get(tensor.name), ranges.batch
            sizes = (batch.smallest, batch.usual, batch.largest)
            shapes = [_sized(tensor.shape, size, usual) for size in sizes]
        profile.set_shape(tensor.name, *shapes)
    return profile


def _checked(given: InputRange, shape: Sequence[int]) -> list[list[int]]:
    """The three shapes of `given`, if they fit `shape`, where -1 is dynamic."""
    shapes = [list(each) for each in (given.smallest, given.usual, given.largest)]
    if any(len(each) != len(shape) for each in shapes) or any(
        dim not in (-1, length) for each in shapes for dim, length in zip(shape, each, strict=True)
    ):
        written = "x".join("?" if dim < 0 else str(dim) for dim in shape)
        raise GpusqError(f"--shapes {given.name}: the input is {written}", hint="only the axes with ? may be chosen")
    return shapes


def _sized(shape: Sequence[int], batch: int, usual: Sequence[int] | None) -> list[int]:
    """`shape` with `batch` for what is dynamic, and behind the first axis what is usual, where that is known."""
    return [dim if dim >= 0 else batch if axis == 0 or usual is None else usual[axis] for axis, dim in enumerate(shape)]


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "it gave no reason"


def versions() -> Mapping[str, str]:
    """The versions of the TensorRT packages that can be imported here."""
    return {runtime: str(import_api(runtime).__version__) for runtime in _MODULES if has_api(runtime)}
