from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from calibration.collect import CollectOptions, collect
from calibration.histogram import Histogram
from calibration.resume import Resume
from profiles.errors import GpusqError

TEXT = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N,3] x, float[N,3] mask) => (float[N,2] y, float[N,3] unused)
    <float[3,2] w = {1, -2, 3, -4, 5, -6}>
    {
        h = MatMul(x, w)
        r = Relu(h)
        y = Neg(r)
        unused = Mul(x, mask)
    }
"""
W = np.array([[1, -2], [3, -4], [5, -6]], np.float32)
NAMES = ["y", "x", "h", "w"]
INTERRUPTED = """
import sys, time
from pathlib import Path
import numpy as np, onnx_ir as ir
from calibration.collect import CollectOptions, collect
from calibration.resume import Resume
model, samples, state = sys.argv[1:]
x = np.load(samples, mmap_mode="r")
collect(Path(model), ["h"], {"x": x}, CollectOptions(batch=1, resume=Resume(Path(state), "s", every_s=0)),
        progress=lambda share: time.sleep(0.05))
"""


def random(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def counted(values: npt.NDArray[np.float32]) -> Histogram:
    histogram = Histogram()
    histogram.add(values)
    return histogram


def assert_same(found: Histogram, expected: Histogram) -> None:
    assert found.bits == expected.bits
    assert np.array_equal(found.counts, expected.counts)


def expected_of(x: npt.NDArray[np.float32], batch: int) -> dict[str, Histogram]:
    """By numpy, with the products in whole numbers, which are exact in any order; the constant counts in each batch."""
    h = x @ W
    return {
        "x": counted(x),
        "w": counted(np.stack([W] * -(-len(x) // batch))),
        "h": counted(h),
        "y": counted(np.maximum(h, 0)),
    }


@pytest.mark.parametrize("batch", [1, 4, 100], ids=["one", "a last part of 2", "all at once"])
def test_counts_as_numpy_does(batch: int) -> None:
    x = np.round(random(10, 3) * 8)
    found = collect(ir.from_onnx_text(TEXT), NAMES, {"x": x}, CollectOptions(batch))
    assert list(found) == NAMES
    for name, expected in expected_of(x, batch).items():
        assert_same(found[name], expected)


def test_where_memory_is_short_the_tensors_take_turns() -> None:
    text = TEXT.replace("N,3]", "N,300000]").replace("w = {1, -2, 3, -4, 5, -6}", "w").replace("[3,2]", "[300000,2]")
    text = text.replace("h = MatMul(x, w)", "a = Abs(x) b = Exp(a) h = ReduceSum(b)").replace("<float[300000,2] w>", "")
    x = random(2, 300_000)
    names = ["x", "a", "b"]
    apart = collect(ir.from_onnx_text(text), names, {"x": x}, CollectOptions(batch=2, memory_mib=2))
    together = collect(ir.from_onnx_text(text), names, {"x": x}, CollectOptions(batch=2))
    for name in names:
        assert_same(apart[name], together[name])


def test_half_precision_is_counted_as_float32() -> None:
    x = random(5, 3).astype(np.float16)
    found = collect(ir.from_onnx_text(TEXT.replace("float[", "float16[")), ["x"], {"x": x})
    assert_same(found["x"], counted(x.astype(np.float32)))


def test_a_fixed_batch_is_filled_up_with_the_last_sample() -> None:
    x = random(6, 3)
    found = collect(ir.from_onnx_text(TEXT.replace("N,", "4,")), ["x"], {"x": x})
    assert_same(found["x"], counted(x[[0, 1, 2, 3, 4, 5, 5, 5]]))


def test_names_what_first_became_infinite_though_it_is_not_collected() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,2] x) => (float[N,2] z) <float minus_inf = {-inf}, float[2] keep = {1, 0}>
        {
            zero = Sub(keep, keep)
            masked = Where(allowed, x, minus_inf)
            [exponential] a = Exp(x)
            p = Softmax(masked)
            z = Mul(a, p)
        }""".replace("masked =", "allowed = Greater(keep, zero) masked =").replace("[exponential] ", "")
    model = ir.from_onnx_text(text)
    with pytest.raises(GpusqError, match="'a' became NaN or infinite in Exp"):
        collect(model, ["z"], {"x": np.full((1, 2), 1e9, np.float32)})


def test_says_how_far_it_is() -> None:
    shares: list[float] = []
    collect(ir.from_onnx_text(TEXT), ["h"], {"x": random(4, 3)}, CollectOptions(batch=1), progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1]


def test_goes_on_after_a_kill_and_counts_the_same(tmp_path: Path) -> None:
    ir.save(ir.from_onnx_text(TEXT), tmp_path / "m.onnx")
    x = random(60, 3)
    np.save(tmp_path / "x.npy", x)
    state = tmp_path / "state"
    command = [sys.executable, "-c", INTERRUPTED, *map(str, (tmp_path / "m.onnx", tmp_path / "x.npy", state))]
    with subprocess.Popen(command) as process:
        while not state.exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert state.exists()
    seen: list[float] = []
    options = CollectOptions(batch=1, resume=Resume(state, "s"))
    found = collect(tmp_path / "m.onnx", ["h"], {"x": x}, options, progress=seen.append)
    assert len(seen) < 60
    assert_same(found["h"], collect(tmp_path / "m.onnx", ["h"], {"x": x}, CollectOptions(batch=1))["h"])


@pytest.mark.parametrize("other", ["samples", "tensors", "model"])
def test_starts_anew_where_anything_differs(other: str, tmp_path: Path) -> None:
    def run(text: str, names: list[str], samples: str, stop: bool) -> Histogram:
        def progress(share: float) -> None:
            if stop and share >= 0.5:
                raise KeyboardInterrupt

        options = CollectOptions(batch=1, resume=Resume(tmp_path / "state", samples, every_s=0))
        x = random(6, 3) if samples == "s" else random(6, 3) * 2
        return collect(ir.from_onnx_text(text), names, {"x": x}, options, progress=progress)["h"]

    with pytest.raises(KeyboardInterrupt):
        run(TEXT, ["h"], "s", stop=True)
    text = TEXT.replace("{1, -2", "{7, -2") if other == "model" else TEXT
    names = ["h", "x"] if other == "tensors" else ["h"]
    samples = "t" if other == "samples" else "s"
    found = run(text, names, samples, stop=False)
    assert found.count == 12
    assert_same(found, run(text, names, samples, stop=False))


def test_a_damaged_state_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"PK\x03\x04 damaged")
    options = CollectOptions(batch=1, resume=Resume(tmp_path / "state", "s"))
    found = collect(ir.from_onnx_text(TEXT), ["x"], {"x": random(4, 3)}, options)
    assert_same(found["x"], counted(random(4, 3)))


def test_nothing_asked_is_nothing_collected() -> None:
    assert collect(ir.from_onnx_text(TEXT), [], {}) == {}
