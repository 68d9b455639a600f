from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from calibration.collect import collect
from calibration.histogram import Histogram
from calibration.methods import CHOICES, Method
from calibration.probes import Feed
from exporters.passes.place_quantizers import PlaceQuantizers
from exporters.range_choice import choose_methods, summary

Float = npt.NDArray[np.float32]
TEXT = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4,32] x) => (float[N,4,24] y) <float[32,24] w> { y = MatMul(x, w) }
"""


def model() -> ir.Model:
    graph = ir.from_onnx_text(TEXT)
    node = next(iter(graph.graph))
    weight = node.inputs[1]
    assert weight is not None
    values = np.random.default_rng(0).standard_normal((32, 24)).astype(np.float32)
    weight.const_value = ir.tensor(values, name=weight.name)
    graph.graph.register_initializer(weight)
    node.name = "fc"
    return graph


def chosen(x: Float) -> tuple[Method, str]:
    said: list[str] = []
    graph = model()
    found = collect(graph, ["x"], {"x": x})
    place = PlaceQuantizers("w8a8-linear", lambda model, names: amax(found), "float32")
    return choose_methods(graph, found, place, Feed({"x": x}, 8, tell=said.append))["x"], said[0]


def amax(found: Mapping[str, Histogram]) -> dict[str, float]:
    return {name: histogram.amax for name, histogram in found.items()}


def inputs(outlier: float) -> Float:
    x = np.random.default_rng(1).uniform(-1, 1, (512, 4, 32)).astype(np.float32)
    x[100, 0, 0] = outlier
    return x


def test_nothing_is_clipped_where_that_loses_the_least() -> None:
    assert chosen(inputs(1.0))[0] == Method("max")


def test_an_outlier_that_few_samples_have_is_clipped() -> None:
    method, said = chosen(inputs(40.0))
    assert method in CHOICES[1:]
    assert said.startswith(f"ranges by {method}: error ")


def test_what_decides_is_the_error_of_the_output() -> None:
    """The channel of the outlier has the only weights that matter: clipping it would be all there is to lose."""
    graph, x = model(), inputs(1.0)
    x[:4, 0, 0] = 40.0
    value = graph.graph.initializers["w"]
    weights = np.full((32, 24), 1e-4, np.float32)
    weights[0] = 1
    value.const_value = ir.tensor(weights, name="w")
    found = collect(graph, ["x"], {"x": x})
    place = PlaceQuantizers("w8a8-linear", lambda model, names: amax(found), "float32")
    assert Method("mse")(found["x"]) < 40
    assert choose_methods(graph, found, place, Feed({"x": x}, 8)) == {"x": Method("max")}


def test_a_histogram_alone_does_not_tell() -> None:
    with pytest.raises(ValueError, match="least-loss needs the model"):
        Method("least-loss")(Histogram())


def test_what_was_chosen_is_summed_up() -> None:
    assert summary({"a": Method(), "b": Method()}) == "by max"
    assert summary({"a": Method("mse"), "b": Method(), "c": Method("mse")}) == "1 by max, 2 by mse"
