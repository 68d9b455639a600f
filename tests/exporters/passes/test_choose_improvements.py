from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from calibration.probes import Feed
from calibration.ranges import measure_amax
from exporters.improvement import Improvement, tried_on
from exporters.passes.choose_improvements import ChooseImprovements, OnlyIf
from exporters.passes.outcome import Outcome
from exporters.surgery import Target, surgery
from profiles.device import load_device
from profiles.errors import GpusqError

Float = npt.NDArray[np.float32]
Run = Callable[..., Float]
TEXT = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,8,32] x) => (float[N,8,24] y)
    <float[32,32] w1, float[32,24] w2, float[N,8,32] h, float[N,8,32] r>
    { h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }
"""


def model(*, uneven: bool) -> ir.Model:
    """Two layers; where they are uneven, one channel between them is large, and its weights are small."""
    graph = ir.from_onnx_text(TEXT)
    generator = np.random.default_rng(0)
    for index, node in enumerate([node for node in graph.graph if node.op_type == "MatMul"]):
        weight = node.inputs[1]
        assert weight is not None
        assert weight.shape is not None
        values = generator.standard_normal(weight.shape.numpy(), np.float32) / 4
        if uneven:
            values[(slice(None), 5) if index == 0 else 5] *= 500.0 ** (1 if index == 0 else -1)
        weight.const_value = ir.tensor(values, name=weight.name)
        graph.graph.register_initializer(weight)
        node.name = f"fc{index + 1}"
    return graph


def feed(count: int = 32) -> Feed:
    return Feed({"x": np.random.default_rng(1).standard_normal((count, 8, 32)).astype(np.float32)}, 8)


def choose(graph: ir.Model, count: int = 32) -> tuple[ChooseImprovements, Outcome]:
    choice = ChooseImprovements("w8a8-linear", "float32", feed(count), tried_on("w8a8-linear"))
    return choice, choice(graph)


def placed(improve: tuple[Improvement, ...]) -> tuple[ir.Model, list[Outcome]]:
    def measure(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        return measure_amax(model, names, feed().samples, 8)

    graph = model(uneven=True)
    target = Target(load_device("cpu"), "float32", "w8a8-linear", improve=improve)
    return graph, surgery(graph, target, measure, feed=feed())


def test_what_lowers_the_error_on_samples_kept_apart_is_kept() -> None:
    choice, done = choose(model(uneven=True))
    assert choice.kept[0] == "smooth-quant"
    assert [change.where for change in done.changes] == choice.kept
    assert "of the output's power" in done.changes[0].what


def test_what_does_not_pay_is_told_with_its_error() -> None:
    choice, done = choose(model(uneven=False))
    assert "equalize" not in choice.kept
    assert "it finds nothing to scale" in [left.why for left in done.left_alone]


def test_few_samples_tell_nothing() -> None:
    choice, done = choose(model(uneven=True), count=7)
    assert not choice.kept
    assert {left.why for left in done.left_alone} == {"7 samples: fewer than 8 tell nothing about others"}


def test_the_graph_stays_as_it_is_and_a_second_run_chooses_the_same() -> None:
    graph = model(uneven=True)
    before = ir.to_proto(graph)
    choice, done = choose(graph)
    assert ir.to_proto(graph) == before
    kept = list(choice.kept)
    assert (choice(graph), choice.kept) == (done, kept)


def test_auto_is_what_was_kept_and_loses_less_on_other_inputs(run: Run) -> None:
    x = np.random.default_rng(2).standard_normal((16, 8, 32)).astype(np.float32)
    expected = run(model(uneven=True), x=x)
    (plain, _), (auto, steps) = placed(()), placed(("auto",))
    errors = [float(np.square(run(graph, x=x) - expected).mean()) for graph in (plain, auto)]
    assert errors[1] < 0.1 * errors[0]
    kept = next(step for step in steps if step.name == "choose improvements").changes
    asked: tuple[Improvement, ...] = tuple(change.where for change in kept)  # type: ignore[misc]
    np.testing.assert_array_equal(run(placed(asked)[0], x=x), run(auto, x=x))


def test_a_step_that_does_not_pay_is_not_done() -> None:
    def fail(model: ir.Model) -> Outcome:
        raise AssertionError(model)

    choice = ChooseImprovements("w8a8-linear", "float32", feed(), ())
    assert OnlyIf("equalize", choice, fail)(model(uneven=False)).changed == 0


def test_auto_stands_alone() -> None:
    with pytest.raises(GpusqError, match="auto chooses by itself, and equalize was asked for"):
        Target(load_device("cpu"), "float32", "w8a8-linear", improve=("auto", "equalize"))
    assert tried_on("nvfp4") == ()
