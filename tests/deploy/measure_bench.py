"""Hold `gpusq bench` to what it promises, on this host's CPU: `python tests/deploy/measure_bench.py CHECK… [OPTIONS]`.

    aa          200 comparisons of an engine with itself in another session: at most 5 % call it faster or slower
    slowdown    a busy loop of 5, 10 and 20 % added to the call: found in at least 80, 95 and 99 %
    neighbour   as aa, while another process loads a core half of the time: none is called faster or slower
    agreement   medians beside onnxruntime's own measurement and pyperf's: within 2 %
    overhead    what the loop around a call takes: at most 20 µs

With the default budget a run takes about ten seconds, and aa, slowdown and neighbour two hundred runs each; --runs and
--seconds make it less, and then the table says so. A quiet machine is needed: runs that broke a condition are counted
apart from those that did not, but for `neighbour`, which breaks it on purpose.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from deploy.bench_models import BenchSpec, noise_floor
from deploy.timing import conditions
from deploy.timing import statistics as stats
from deploy.timing.engine import CpuEngine, Timed, Times, open_engine, read_model, warm_up
from deploy.timing.interleave import Budget, interleave
from deploy.timing.taken import verdict_of
from tests.deploy.timing.small_models import save_model

FALSE_ALARMS = 0.05
FOUND = {0.05: 0.80, 0.10: 0.95, 0.20: 0.99}
AGREEMENT = 0.02
OVERHEAD_US = 20.0
ANY_CONDITIONS = False  # the option
FIRST_SEED = 0  # the option
_NEIGHBOUR = """
import random, time
while True:
    end = time.time() + random.random()
    while time.time() < end:
        pass
    time.sleep(random.random())
"""


LOOPS = 64  # calls in a value of pyperf's
_PATHS = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from deploy.timing.engine import open_engine, read_model
engine = open_engine(read_model(Path(os.environ["GPUSQ_MODEL"])), 1)
"""


@dataclass
class Slowed:
    """An engine whose call takes `share` longer than `usual_ns`: a busy loop behind it."""

    engine: Timed
    extra_ns: int

    def call(self) -> Times:
        """Answer one request, and spin."""
        compute, latency, enqueue = self.engine.call()
        start = time.perf_counter_ns()
        while time.perf_counter_ns() - start < self.extra_ns:
            pass
        return compute + self.extra_ns, latency + time.perf_counter_ns() - start, enqueue


class Nothing:
    """An engine that answers at once."""

    def call(self) -> Times:
        """Answer nothing."""
        return 1, 1, 0


def verdict(path: Path, slowdown: float, spec: BenchSpec, seed: int) -> tuple[str, bool]:
    """What one run of bench calls an engine that is `slowdown` slower than its baseline; whether conditions held."""
    random = np.random.default_rng(seed)
    model = read_model(path)
    baseline, other = (open_engine(model, 1, seed) for _ in range(2))
    for engine in (baseline, other):
        warm_up(engine)
    before = conditions.read()
    usual = float(np.median([other.call()[1] for _ in range(50)]))
    candidate = Slowed(other, int(slowdown * usual)) if slowdown else other
    floor = noise_floor(baseline, 1, spec, random)
    latency = interleave([baseline, candidate], spec.budget, random).latency_ms
    found = stats.log_ratio(latency[0], latency[1], spec.resampling)
    called, usable = verdict_of(found, floor), not conditions.between(before, conditions.read()).broken
    if called != "inconclusive" and not slowdown:
        print(
            f"seed {seed}: {called}, log ratio {found.value:.4f} [{found.low:.4f}, {found.high:.4f}], floor {floor:.4f}"
        )
    return called, usable


def tally(path: Path, slowdown: float, spec: BenchSpec, runs: int) -> tuple[Counter[str], Counter[str]]:
    """The verdicts of the runs whose conditions held, and of all."""
    quiet, everything = Counter[str](), Counter[str]()
    for seed in range(FIRST_SEED, FIRST_SEED + runs):
        found, usable = verdict(path, slowdown, spec, seed)
        everything[found] += 1
        quiet[found] += usable
    return +quiet, everything


def told(name: str, counts: Counter[str], wanted: str, share: float, good: bool) -> bool:
    """Print a line of the table; return whether the promise was kept."""
    total = sum(counts.values())
    spread = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    print(f"{name:34} {total:4} runs: {spread:50} {wanted}: {100 * share:5.1f} %  {'kept' if good else 'MISSED'}")
    return good


def aa(path: Path, spec: BenchSpec, runs: int) -> bool:
    """Equals on a quiet machine: false alarms of an engine beside itself."""
    quiet, everything = tally(path, 0.0, spec, runs)
    counts = everything if ANY_CONDITIONS else quiet
    total = sum(counts.values())
    share = 1 - counts["inconclusive"] / total if total else 1.0
    kept = told("aa", counts, "false alarms ≤ 5 %", share, total > 0 and share <= FALSE_ALARMS)
    if not ANY_CONDITIONS and quiet != everything:
        print(f"{'':34} of {runs} runs {runs - total} broke a condition and were not used")
    return kept


def neighbour(path: Path, spec: BenchSpec, runs: int) -> bool:
    """Equals beside a load that comes and goes on one core: as bench tells it, and what it would tell unlooked."""
    with burning():
        quiet, everything = tally(path, 0.0, spec, runs)
    as_told = quiet + Counter({"inconclusive": everything.total() - quiet.total()})
    called, unlooked = (1 - counts["inconclusive"] / counts.total() for counts in (as_told, everything))
    told("neighbour, conditions unlooked at", everything, "false alarms", unlooked, unlooked <= FALSE_ALARMS)
    return told("neighbour", as_told, "false alarms, none allowed", called, called == 0)


def slowdown(path: Path, spec: BenchSpec, runs: int) -> bool:
    """Real slowdowns."""
    kept = True
    for share, wanted in FOUND.items():
        counts = tally(path, share, spec, runs)[ANY_CONDITIONS]
        total = sum(counts.values())
        found = counts["slower"] / total if total else 0.0
        kept &= told(f"slowdown of {share:.0%}", counts, f"found ≥ {wanted:.0%}", found, total > 0 and found >= wanted)
    return kept


@contextmanager
def burning() -> Iterator[None]:
    """A process that loads a core half of the time while the block runs."""
    process = subprocess.Popen([sys.executable, "-c", _NEIGHBOUR])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def agreement(path: Path, spec: BenchSpec, runs: int) -> bool:
    """Our medians beside those of onnxruntime and, where it is installed, pyperf."""
    ours, theirs = onnxruntimes_own(path)
    kept = compared("compute, onnxruntime's own", ours, theirs)
    return compared("latency, pyperf", *pyperfs(path)) and kept


def compared(name: str, ours: float, theirs: float) -> bool:
    """Print two medians in ms; return whether they agree."""
    kept = abs(ours / theirs - 1) <= AGREEMENT
    print(
        f"{name:34} ours {ours:.4f} ms, theirs {theirs:.4f} ms: {ours / theirs - 1:+.2%} "
        + ("kept" if kept else "MISSED")
    )
    return kept


def onnxruntimes_own(path: Path, calls: int = 300) -> tuple[float, float]:
    """The median of our compute times, and of what onnxruntime's profile says of the same calls, in ms."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        like = open_engine(read_model(path), 1)
        engine = CpuEngine(like.model, session, like.feed)
        ours = [engine.call()[0] / 1e6 for _ in range(calls)]
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    theirs = [event["dur"] / 1e3 for event in events if event["name"] == "model_run"]
    assert len(theirs) == calls
    return float(np.median(ours)), float(np.median(theirs))


def pyperfs(path: Path, rounds: int = 12) -> tuple[float, float]:
    """The median of our latencies and of pyperf's values around the same calls, in ms, in turns and processes of both.

    A value of pyperf's is the mean of `LOOPS` calls in a row; ours are averaged likewise. A machine drifts by more than
    2 % in a minute, so the two take turns, the first one in every second round the other, and each value is one of ten.
    """
    ours, theirs = list[float](), list[float]()
    for number in range(rounds):
        turns: list[tuple[Callable[[Path], list[float]], list[float]]] = [(_ours, ours), (_theirs, theirs)]
        for take, values in turns if number % 2 else turns[::-1]:
            values += take(path)
    return float(np.median(ours)), float(np.median(theirs))


def _ours(path: Path) -> list[float]:
    """Ten means of `LOOPS` latencies in ms, in a process of its own, as pyperf's are."""
    script = f"""{_PATHS}
import numpy as np
from deploy.timing.engine import warm_up
from deploy.timing.interleave import Budget, interleave
warm_up(engine)
count = 10 * {LOOPS}
found = interleave([engine], Budget(1e-9, count, count), np.random.default_rng(0)).latency_ms[0]
print(found.reshape(10, {LOOPS}).mean(axis=1).tolist())
"""
    environment = {**os.environ, "GPUSQ_MODEL": str(path)}
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    found: list[float] = json.loads(done.stdout)
    return found


def _theirs(path: Path) -> list[float]:
    """Ten of pyperf's values in ms, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        script, output = Path(folder) / "run.py", Path(folder) / "values.json"
        script.write_text(f"{_PATHS}\nimport pyperf\npyperf.Runner().bench_func('call', engine.call)\n")
        options = f"--processes 1 --values 10 --warmups 2 --loops {LOOPS} --quiet --copy-env".split()
        command = [sys.executable, str(script), *options, "--output", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "GPUSQ_MODEL": str(path)})
        (benchmark,) = json.loads(output.read_text())["benchmarks"]
        return [1e3 * value for run in benchmark["runs"] for value in run.get("values", [])]


def overhead(path: Path, spec: BenchSpec, runs: int) -> bool:
    """What the loop takes around engines that take nothing, in µs a call: the median of a hundred short runs."""
    pairs, found_us = 500, []
    for seed in range(100):
        start = time.perf_counter_ns()
        interleave([Nothing(), Nothing()], Budget(1e-9, pairs, pairs), np.random.default_rng(seed))
        found_us.append((time.perf_counter_ns() - start) / (2 * pairs) / 1e3)
    found = float(np.median(found_us))
    kept = found <= OVERHEAD_US
    print(f"{'overhead of a call':34} {found:.2f} µs, of {OVERHEAD_US:g} allowed  {'kept' if kept else 'MISSED'}")
    return kept


CHECKS: dict[str, Callable[[Path, BenchSpec, int], bool]] = {
    "overhead": overhead,
    "agreement": agreement,
    "aa": aa,
    "slowdown": slowdown,
    "neighbour": neighbour,
}


def main() -> None:
    """Run the checks that were named, or all; leave with 1 if a promise was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", choices=[*CHECKS, []], default=list(CHECKS))
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=Budget().seconds)
    parser.add_argument("--model", type=Path, help="an ONNX file instead of 24 products of 160 × 160 matrices")
    parser.add_argument("--any-conditions", action="store_true", help="use runs that broke a condition as well")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the others follow")
    given = parser.parse_args()
    global ANY_CONDITIONS, FIRST_SEED
    ANY_CONDITIONS, FIRST_SEED = given.any_conditions, given.seed
    spec = BenchSpec(budget=Budget(given.seconds))
    print(f"budget {spec.budget.seconds:g} s and at least {spec.budget.min_pairs} pairs, {given.runs} runs a row")
    folder = tempfile.TemporaryDirectory() if given.model is None else nullcontext("")
    with folder as name:
        path = given.model or save_model(Path(name) / "model.onnx", 24, 160)
        kept = [CHECKS[check](path, spec, given.runs) for check in given.checks]
    sys.exit(not all(kept))


if __name__ == "__main__":
    main()
