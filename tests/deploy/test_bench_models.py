from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pyarrow.parquet
import pytest
from click.testing import CliRunner

from deploy.bench_models import BenchSpec, bench_models, parse_batches
from deploy.cli import main
from deploy.timing.engine import Times, open_engine, random_feed, read_model, warm_up
from deploy.timing.interleave import Budget, back_to_back
from deploy.timing.statistics import Resampling
from profiles.errors import GpusqError
from tests.deploy.timing.small_models import save_model

QUICK = BenchSpec(budget=Budget(0.1, 40, 100), resampling=Resampling(resamples=100))


def test_times_each_model_beside_the_baseline(tmp_path: Path) -> None:
    """The large model takes 60 times the products."""
    small, large = save_model(tmp_path / "small.onnx", 1, 128), save_model(tmp_path / "large.onnx", 60, 128)
    (found,) = bench_models([large, small], small, QUICK).results
    baseline, slower, same = found.engines
    assert baseline.speedup is None
    assert slower.speedup is not None
    assert slower.speedup.latency.value < 1
    assert slower.speedup.throughput.value < 1
    assert slower.speedup.verdict in (("slower", "inconclusive") if found.usable else ("inconclusive",))
    assert same.speedup is not None
    assert same.speedup.latency.low <= same.speedup.latency.value <= same.speedup.latency.high
    assert all(engine.compute.p50_ms.value <= engine.latency.p50_ms.value for engine in found.engines)
    assert {engine.sha256 for engine in (baseline, same)} == {baseline.sha256}


def test_a_run_that_broke_a_condition_gives_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lowered until every host breaks it."""
    monkeypatch.setattr("deploy.timing.conditions.MOST_LOAD_OF_OTHERS", -1.0)
    small, large = save_model(tmp_path / "small.onnx", 1, 96), save_model(tmp_path / "large.onnx", 12, 96)
    (found,) = bench_models([large], small, QUICK).results
    assert not found.usable
    assert found.engines[1].speedup is not None
    assert found.engines[1].speedup.verdict == "inconclusive"
    assert found.engines[1].speedup.more_pairs is None
    assert "more pairs" not in found.to_text()
    assert "Not used for verdicts: other processes used" in found.to_text()


def test_measures_every_batch_and_stream(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.onnx", 1)
    found = bench_models([model], spec=replace(QUICK, batches=(1, 4), streams=2)).results
    assert [(result.batch, result.streams) for result in found] == [(1, 2), (4, 2)]
    assert found[1].engines[0].samples_per_s == pytest.approx(4 * found[1].engines[0].throughput_qps.value)


def test_tells_where_the_time_goes(bundles: dict[str, Path]) -> None:
    (found,) = bench_models([bundles["cpu"]], spec=replace(QUICK, layers=True)).results
    layers = found.engines[0].layers
    assert sum(layer.share for layer in layers) == pytest.approx(1)
    assert [layer.ms for layer in layers] == sorted((layer.ms for layer in layers), reverse=True)
    qkv = [layer for layer in layers if layer.modules == ("blocks.0.attn.qkv",)]
    assert any(layer.name.startswith("MatMulIntegerToFloat") for layer in qkv)
    assert "blocks.0.attn.qkv" in found.to_text()


def test_back_to_back_counts_all_streams(tmp_path: Path) -> None:
    engine = open_engine(read_model(save_model(tmp_path / "model.onnx", 1)), 1)
    assert back_to_back([engine, engine.beside()], 0.02) > 0


def test_inputs_are_random_and_of_the_batch(tmp_path: Path) -> None:
    engine = open_engine(read_model(save_model(tmp_path / "model.onnx", 1)), 3)
    (array,) = engine.feed.values()
    assert array.shape == (3, 32, 32)
    assert np.unique(array).size > 0.9 * array.size


def test_refuses_an_axis_that_is_open_and_a_batch_that_is_fixed(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[2, tokens] x) => (float[2, tokens] y) { y = Relu(x) }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "open.onnx")
    model = read_model(tmp_path / "open.onnx")
    with pytest.raises(GpusqError, match="batches of 2, not of 1"):
        open_engine(model, 1)
    with pytest.raises(GpusqError, match="varies in axis 1"):
        open_engine(model, 2)


def test_integers_are_valid_tokens() -> None:
    class Spec:
        name, shape, type = "ids", ["batch", 4], "tensor(int64)"

    assert (random_feed([Spec], 2, np.random.default_rng(0), "m")["ids"] == 1).all()


class Falling:
    """An engine whose calls become faster for a hundred calls, and then stay so."""

    def __init__(self) -> None:
        self.calls = 0

    def call(self) -> Times:
        self.calls += 1
        return 1, max(200 - self.calls, 100), 0


def test_warms_up_until_calls_become_no_faster() -> None:
    engine = Falling()
    assert warm_up(engine) == engine.calls
    assert 100 < engine.calls <= 140


def test_reads_batches() -> None:
    assert parse_batches("1, 8,32,8") == (1, 8, 32)
    for wrong in ("", "0", "1;8", "a"):
        with pytest.raises(GpusqError, match="names no batch sizes"):
            parse_batches(wrong)


def test_bench_and_history_on_the_command_line(tmp_path: Path) -> None:
    model, db = save_model(tmp_path / "model.onnx", 1), str(tmp_path / "gpusq.db")
    run = CliRunner().invoke
    done = run(main, ["bench", str(model), "--seconds", "0.05", "--db", db, "--json"])
    assert done.exit_code == 0, done.output
    (result,) = json.loads(done.stdout)["results"]
    assert result["origin"] == "measured"
    plot = tmp_path / "plot.svg"
    listed = run(main, ["history", "--db", db, "--plot", str(plot), "--samples", str(tmp_path / "samples.csv")])
    rows = (tmp_path / "samples.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "run,model,batch,quantity,number,value"
    assert len(rows) == 1 + 2 * result["pairs"] + 10
    parquet = tmp_path / "samples.parquet"
    assert run(main, ["history", "--db", db, "--samples", str(parquet)]).exit_code == 0
    table = pyarrow.parquet.read_table(parquet)
    assert ",".join(table.column_names) == rows[0]
    assert [str(value) for value in table.to_pylist()[-1].values()] == rows[-1].split(",")
    assert "model.onnx" in listed.stdout
    assert plot.read_text(encoding="utf-8").startswith("<svg")
    assert run(main, ["history", str(model), "--db", db, "--json"]).exit_code == 0
