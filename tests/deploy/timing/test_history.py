from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deploy.bench_models import BenchSpec, bench_models
from deploy.timing.history import SCHEMA, open_history
from deploy.timing.interleave import Budget
from deploy.timing.results import BenchResult
from deploy.timing.statistics import Resampling, percentile
from profiles.errors import GpusqError
from tests.deploy.timing.small_models import save_model

QUICK = BenchSpec(budget=Budget(0.02, 10, 20), resampling=Resampling(resamples=50))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BenchResult]:
    """A history with one result."""
    folder = tmp_path_factory.mktemp("history")
    model = save_model(folder / "one.onnx", 1)
    (result,) = bench_models([model], model, QUICK, history=folder / "gpusq.db").results
    return folder / "gpusq.db", result


@pytest.fixture
def copy(measured: tuple[Path, BenchResult], tmp_path: Path) -> Path:
    return Path(shutil.copy(measured[0], tmp_path / "gpusq.db"))


def test_gives_back_the_result_and_every_sample(measured: tuple[Path, BenchResult]) -> None:
    path, result = measured
    with open_history(path) as history:
        assert history.results() == [result]
        for position, engine in enumerate(result.engines):
            samples = history.samples(result.id, position, "latency_ms")
            assert len(samples) == result.pairs
            assert percentile(samples, 50) == engine.latency.p50_ms.value
            assert (history.samples(result.id, position, "compute_ms") <= samples).all()


def test_finds_results_by_model_and_device(measured: tuple[Path, BenchResult]) -> None:
    path, result = measured
    with open_history(path) as history:
        assert history.results(model=result.engines[0].sha256) == [result]
        assert history.results(model=result.engines[0].name, device=result.device) == [result]
        assert history.results(model="another") == history.results(device="another") == []


def test_tells_the_newest_results_the_oldest_first(copy: Path, measured: tuple[Path, BenchResult]) -> None:
    _, result = measured
    raw = [{"latency_ms": np.ones(3)} for _ in result.engines]
    with open_history(copy, create=True) as history:
        for number in (1, 2, 3):
            history.add(result.model_copy(update={"id": str(number), "created": f"2099-01-0{number}"}), raw)
        assert [found.id for found in history.results(last=2)] == ["2", "3"]


def test_stores_nothing_of_a_result_that_cannot_be_stored_whole(copy: Path, measured: tuple[Path, BenchResult]) -> None:
    _, result = measured
    with open_history(copy, create=True) as history:
        with pytest.raises(ValueError, match="shorter"):
            history.add(result.model_copy(update={"id": "half"}), [{"latency_ms": np.ones(3)}])
        assert [found.id for found in history.results()] == [result.id]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from deploy.timing.history import History, open_history
from deploy.timing import history

with open_history(Path(sys.argv[1]), create=True) as db:
    (result,) = db.results()
    raw = [{"latency_ms": np.ones(100_000)} for _ in result.engines]
    db.add(result.model_copy(update={"id": "whole"}), raw)
    inner = history._deflated
    def deflated(values, calls=[]):
        calls.append(1)
        if len(calls) == len(raw):
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(values)
    history._deflated = deflated
    db.add(result.model_copy(update={"id": "half"}), raw)
"""


def test_a_process_killed_while_it_writes_leaves_whole_results(copy: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(copy)], cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == -signal.SIGKILL
    with open_history(copy) as history:
        assert [found.id for found in history.results()][-1] == "whole"
    with open_history(copy, create=True) as history:
        assert len(history.results()) == 2


def test_refuses_a_newer_history_and_leaves_it(copy: Path) -> None:
    with sqlite3.connect(copy) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.close()
    before = copy.read_bytes()
    with pytest.raises(GpusqError, match=f"schema {SCHEMA + 1}"), open_history(copy, create=True):
        pass
    assert copy.read_bytes() == before


@pytest.mark.parametrize("where", [0, 4096 + 8])
def test_refuses_a_damaged_history_and_leaves_it(copy: Path, where: int) -> None:
    data = bytearray(copy.read_bytes())
    data[where : where + 64] = os.urandom(64)
    copy.write_bytes(data)
    with pytest.raises(GpusqError, match=r"gpusq\.db"), open_history(copy, create=True) as history:
        history.results()
    assert copy.read_bytes() == bytes(data)


def test_refuses_what_is_no_history(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE run (id)")
    db.close()
    with pytest.raises(GpusqError, match="another program"), open_history(tmp_path / "other.db", create=True):
        pass
    with pytest.raises(GpusqError, match="no history"), open_history(tmp_path / "none.db"):
        pass
    assert not (tmp_path / "none.db").exists()
