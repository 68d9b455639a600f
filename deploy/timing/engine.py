"""What is timed, and onnxruntime's engines on the CPU, with inputs bound once for each call.

One call tells its times by one clock (`perf_counter_ns`):

    start ── bind ── bound ── run ── done ── fetch outputs ── end
    compute = done − bound          latency = end − start

On the CPU the call itself computes, so there is no enqueue time apart from the compute time, and "transfers" are the
binding of the inputs and the copy of the outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from calibration.feed import fit
from deploy.bundle import hash_file
from deploy.engine import checked_engine
from deploy.manifest import MODEL_FILE, is_bundle, read_manifest
from deploy.onnxruntime_api import open_session, runtime_version
from profiles.errors import GpusqError

Feed = Mapping[str, npt.NDArray[Any]]
Times = tuple[int, int, int]  # compute, latency and enqueue, in nanoseconds
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_INTEGERS = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


class Timed(Protocol):
    """What can be timed."""

    def call(self) -> Times:
        """Answer one request, and return compute, latency and enqueue time; 0 where a call computes by itself."""


class Opened(Timed, Protocol):
    """A model that was opened to be timed."""

    @property
    def model(self) -> Model:
        """What was opened."""

    @property
    def cuda_graph(self) -> str:
        """Whether calls launch a CUDA graph; if not, why."""

    def beside(self) -> Opened:
        """The same engine for another thread."""

    def close(self) -> None:
        """Give back what it holds."""


@dataclass(frozen=True)
class Model:
    """A model that is to be timed.

    Attributes:
        name: what it is called in results: the path as it was given.
        path: the ONNX file.
        precision: as its bundle calls it; "as written" of a plain ONNX file.
        sha256: of the file.
        feed: the inputs that it is timed with, of one batch; None for random ones.
        runtime: what runs it, with its version.
        bundle: whose engine runs on the GPU; None where onnxruntime runs the file on the CPU.
    """

    name: str
    path: Path
    precision: str
    sha256: str
    feed: Feed | None = None
    runtime: str = field(default_factory=lambda: f"onnxruntime {runtime_version()}, CPU")
    bundle: Path | None = None


@dataclass
class CpuEngine:
    """A session with its inputs, ready to be called. Not for two threads at once: each opens its own."""

    model: Model
    session: Any
    feed: Feed
    _binding: Any = field(init=False)
    _outputs: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._binding = self.session.io_binding()
        self._outputs = [output.name for output in self.session.get_outputs()]

    @property
    def cuda_graph(self) -> str:
        """A CPU has none."""
        return "not used: the runtime has none"

    def call(self) -> Times:
        """Answer one request; there is no enqueue time."""
        binding, clock = self._binding, time.perf_counter_ns
        start = clock()
        for name, array in self.feed.items():
            binding.bind_cpu_input(name, array)
        for (
            name
        ) in self._outputs:  # anew: else the arrays of the last call are given, and held against the graph's shapes
            binding.bind_output(name)
        bound = clock()
        self.session.run_with_iobinding(binding)
        done = clock()
        binding.copy_outputs_to_cpu()
        return done - bound, clock() - start, 0

    def beside(self) -> CpuEngine:
        """The same engine for another thread: the session is shared, the binding is not."""
        return CpuEngine(self.model, self.session, self.feed)

    def close(self) -> None:
        """The session goes with its last reference."""


def read_model(path: Path) -> Model:
    """The model at `path`: an ONNX file, or a bundle with its engine.

    Raises:
        GpusqError: nothing is there, a folder that is no bundle, or a bundle whose engine is not for this host.
    """
    if path.is_dir() and is_bundle(path):
        return _of_bundle(path)
    if not path.is_file():
        raise GpusqError(f"{path} is neither a bundle nor an ONNX file", hint="give what `gpusq convert` wrote")
    return model_at(path, str(path), "as written")


def _of_bundle(path: Path) -> Model:
    manifest = read_manifest(path)
    if manifest.device_profile.runtime == "onnxruntime":
        files = [engine.file for engine in manifest.engines if engine.file.endswith(".onnx")]
        return model_at(path / (files[0] if files else MODEL_FILE), str(path), manifest.precision)
    try:
        engine, file = checked_engine(path)
    except GpusqError as error:
        raise GpusqError(
            error.message, hint=f"{error.hint}; or bench {path / MODEL_FILE}, as it runs on the CPU"
        ) from None
    runtime = f"{engine.runtime} {engine.runtime_version}"
    return replace(model_at(file, str(path), manifest.precision), bundle=path, runtime=runtime)


def model_at(file: Path, name: str, precision: str, feed: Feed | None = None) -> Model:
    """The model in `file`, under the name that results shall have."""
    return Model(name, file, precision, hash_file(file).sha256, feed)


def open_engine(model: Model, batch: int, seed: int = 0) -> CpuEngine:
    """Open `model` with its inputs, or with random ones of `batch` samples.

    Raises:
        GpusqError: its batch is fixed and another one, or an input varies in more than the batch.
    """
    session = open_session(model.path)
    inputs = session.get_inputs()
    feed = model.feed
    if feed is None:
        feed = random_feed(inputs, batch, np.random.default_rng(seed), model.name)
    return CpuEngine(model, session, fit(inputs, feed))


def fixed_batch(engine_inputs: list[Any]) -> int | None:
    """The batch that a session's inputs ask for; None where it may vary."""
    first = [spec.shape[0] for spec in engine_inputs if spec.shape]
    return next((dim for dim in first if isinstance(dim, int)), None)


def random_feed(inputs: list[Any], batch: int, random: np.random.Generator, name: str) -> dict[str, npt.NDArray[Any]]:
    """Random inputs, none of them all zeros: floats from the standard normal distribution, integers and truths 1.

    Zeros are refused a place because kernels, and a GPU's power, may be faster on them. A 1 is a valid token, mask and
    index of every model that takes such.

    Args:
        inputs: what an onnxruntime session says of its inputs.
        batch: the length of every first axis.
        random: the source of the numbers.
        name: of the model, for errors.
    """
    return {spec.name: _random(spec, _shape(spec, batch, name), random, name) for spec in inputs}


def _shape(spec: Any, batch: int, name: str) -> tuple[int, ...]:
    dims = list(spec.shape)
    if dims and not isinstance(dims[0], int):
        dims[0] = batch
    if dims and dims[0] != batch:
        raise GpusqError(f"{name} takes batches of {dims[0]}, not of {batch}", hint=f"add --batch {dims[0]}")
    if open_axes := [axis for axis, dim in enumerate(dims) if not isinstance(dim, int)]:
        raise GpusqError(
            f"input {spec.name!r} of {name} varies in axis {open_axes[0]} too",
            hint="export the model with fixed axes but for the batch",
        )
    return tuple(dims)


def _random(spec: Any, shape: tuple[int, ...], random: np.random.Generator, name: str) -> npt.NDArray[Any]:
    if spec.type in _FLOATS:
        return random.standard_normal(shape, np.float32).astype(_FLOATS[spec.type])
    if spec.type in _INTEGERS:
        return np.ones(shape, _INTEGERS[spec.type])
    raise GpusqError(f"input {spec.name!r} of {name} is a {spec.type}", hint="bench takes numbers and truths")


def warm_up(engine: Timed, *, window: int = 20, limit: int = 50, tolerance: float = 0.02) -> int:
    """Call until the median of a window is no longer below the best one by more than `tolerance`; return the calls."""
    best = math.inf
    for done, latency in enumerate(_windows(engine, window, limit), start=1):
        if latency > (1 - tolerance) * best:
            return done * window
        best = latency
    return limit * window


def _windows(engine: Timed, window: int, limit: int) -> Iterator[float]:
    for _ in range(limit):
        yield float(np.median([engine.call()[1] for _ in range(window)]))
