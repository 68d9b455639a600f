"""What calibration costs: time beside plain inference over the same samples, and peak memory.

    python tests/calibration/measure_cost.py MODEL [--samples 32 512] [--entropy 32 64] [--plain-every 1]

MODEL is an ONNX file. Every line is a process of its own; its memory is VmHWM, the largest resident set that Linux
saw of it. Samples are noise that is made when it is asked for, so none of them lie in memory. Plain inference runs
in another process, with the same session options and as many threads, on the batch that ours has just done: whatever
else the machine does slows both alike. With `--plain-every 8` it does so for every eighth batch, and its time is scaled
up. What is timed of ours is `collect` from its call to its return, the making of its sessions and the first run for the
sizes of the tensors with it, less the waiting for plain inference. CPU seconds are those of all threads of a process.

`--entropy` is onnxruntime's entropy calibrator for the same tensors; it keeps the tensors of all samples until its end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[2]))
from calibration.collect import CollectOptions, collect
from calibration.inference import feeds, open_session
from calibration.methods import Method
from calibration.rows import Array, Computed, Index, Rows
from exporters.checkpoint import load_student
from exporters.placement import PLACEMENTS, Placement
from exporters.student import sample_specs
from exporters.surgery import Target, surgery
from profiles.device import load_device

_MIB = 1 << 20


@dataclass(frozen=True)
class Spent:
    """Time of the clock and of the processors, in seconds."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> Spent:
        """Up to now."""
        return cls(time.perf_counter(), time.process_time())

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)

    def __mul__(self, factor: float) -> Spent:
        return Spent(self.wall_s * factor, self.cpu_s * factor)

    def __str__(self) -> str:
        return f"{self.wall_s:.1f} s ({self.cpu_s:.1f} s)"


_NOTHING = Spent(0.0, 0.0)


@dataclass(frozen=True)
class Cost:
    """What one process took: its time, that of plain inference in the other process, and mebibytes."""

    what: str
    samples: int
    tensors: int
    own: Spent
    plain: Spent | None
    peak_mib: float

    def __str__(self) -> str:
        plain = self.plain
        beside = "" if plain is None else f"{self.own.wall_s / plain.wall_s:.3f}, {self.own.cpu_s / plain.cpu_s:.3f}"
        cells = (self.what, self.samples, self.tensors, self.own, plain or "", beside, f"{self.peak_mib:.0f} MiB")
        return f"| {' | '.join(map(str, cells))} |"


@dataclass(frozen=True)
class Work:
    """A graph in a file, the tensors in it that a placement quantizes, and the shapes of its inputs but for N."""

    path: Path
    tensors: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def samples(self, count: int) -> dict[str, Rows]:
        """Noise, float32 [count, …], the same rows in every process."""
        return {name: _noise((count, *shape)) for name, shape in self.shapes.items()}


def prepared(model: Path, placement: Placement, folder: Path) -> Work:
    """The graph as it is before quantizers are placed, in `folder`."""
    student = load_student(model)
    found: list[Work] = []

    def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        path = folder / "model.onnx"
        ir.save(model.clone(), path, external_data="weights")
        specs = sample_specs(student)
        found.append(Work(path, tuple(names), {name: spec.shape for name, spec in specs.items()}))
        return dict.fromkeys(names, 1.0)

    surgery(student.export().model, Target(load_device("a100"), "float32", placement), measure)
    return found[0]


def ours(work: Work, count: int, batch: int, every: int) -> Cost:
    """`collect`, with plain inference of every `every`-th batch in between."""
    samples, plain = work.samples(count), _Plain(work, count, every)
    start = Spent.now()
    found = collect(work.path, work.tensors, samples, CollectOptions(batch), progress=plain)
    own = Spent.now() - start - plain.waited
    for histogram in found.values():
        for name in ("max", "percentile", "entropy", "mse"):
            Method(name)(histogram)
    plain.close()
    return Cost("ours", count, len(work.tensors), own, plain.of_all, _peak_mib())


def entropy(work: Work, count: int, batch: int) -> Cost:
    """onnxruntime's calibrator for the same tensors."""
    import onnx
    from onnxruntime.quantization.calibrate import EntropyCalibrater

    with tempfile.TemporaryDirectory() as folder:
        calibrator: Any = EntropyCalibrater(
            str(work.path),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            symmetric=True,
            use_external_data_format=True,
        )
        infos = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in work.tensors}
        calibrator.select_tensors_to_calibrate = lambda model: (set(work.tensors), infos)
        calibrator.augment_graph()
        start = Spent.now()
        calibrator.create_inference_session()
        calibrator.collect_data(_Reader(calibrator.infer_session.get_inputs(), work.samples(count), batch))
        calibrator.compute_data()
        own = Spent.now() - start
    return Cost("onnxruntime's entropy", count, len(work.tensors), own, None, _peak_mib())


class _Plain:
    """Runs in another process what ours has run since the last time, when it is told how far that is."""

    def __init__(self, work: Work, count: int, every: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._there, there = context.Pipe()
        self._process = context.Process(target=_plain, args=(work, count, there), daemon=True)
        self._process.start()
        self._count, self._every, self._done, self._calls, self._asked = count, every, 0, 0, 0
        self._spent = self.waited = _NOTHING
        self._there.recv()  # the session is made

    def __call__(self, share: float) -> None:
        start, until = Spent.now(), round(share * self._count)
        if self._calls % self._every == 0:
            self._there.send((self._done, until))
            self._spent += self._there.recv()
            self._asked += until - self._done
        self._calls, self._done = self._calls + 1, until
        self.waited += Spent.now() - start

    @property
    def of_all(self) -> Spent:
        """What all samples take, by those that were run."""
        return self._spent * (self._count / self._asked)

    def close(self) -> None:
        """End the other process."""
        self._there.send(None)
        self._process.join()


def _plain(work: Work, count: int, pipe: Any) -> None:
    session, samples = open_session(work.path), work.samples(count)
    session.run(None, next(feeds(session.get_inputs(), samples, 1)))
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        rows, start = np.arange(*asked), Spent.now()
        session.run(None, {name: array[rows] for name, array in samples.items()})
        pipe.send(Spent.now() - start)


class _Reader:
    """The samples as onnxruntime's calibrators want them."""

    def __init__(self, inputs: Sequence[Any], samples: Mapping[str, Rows], batch: int) -> None:
        self._feeds: Iterator[dict[str, Array]] = feeds(inputs, samples, batch)

    def get_next(self) -> Mapping[str, Array] | None:
        """The next feed."""
        return next(self._feeds, None)


def _noise(shape: tuple[int, ...]) -> Computed:
    def compute(rows: Index) -> Array:
        return np.stack([np.random.default_rng(int(row)).standard_normal(shape[1:], np.float32) for row in rows])

    return Computed(shape, np.dtype(np.float32), compute)


def _peak_mib() -> float:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024 / _MIB


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--placement", choices=PLACEMENTS, default="w8a8-linear")
    parser.add_argument("--samples", type=int, nargs="*", default=[32, 512])
    parser.add_argument("--entropy", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--plain-every", type=int, default=1)
    parser.add_argument("--batch", type=int, default=CollectOptions.batch)
    asked = parser.parse_args()
    print(f"{asked.model.name}, {asked.placement}, {len(os.sched_getaffinity(0))} threads for either inference")
    print("| | samples | tensors | time (CPU) | plain inference | of it | peak memory |", flush=True)
    print(f"|{'---|' * 7}", flush=True)
    spawn = multiprocessing.get_context("spawn")

    def alone(function: Any, *args: Any) -> Any:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(function, *args).result()

    with tempfile.TemporaryDirectory() as folder:
        work = alone(prepared, asked.model, asked.placement, Path(folder))
        for count in asked.samples:
            print(alone(ours, work, count, asked.batch, asked.plain_every), flush=True)
        for count in asked.entropy:
            print(alone(entropy, work, count, asked.batch), flush=True)


if __name__ == "__main__":
    main()
