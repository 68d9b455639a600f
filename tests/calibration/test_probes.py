from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from calibration.probes import Feed, measure_channel_amax, measure_channels
from exporters.module_names import MODULE_KEY
from profiles.errors import GpusqError

TEXT = """
    <ir_version: 8, opset_import: ["": 18]>
    g (float[N,3,4] x) => (float[N,3,4] y) { h = Neg(x) y = Sqrt(x) }
"""


def model() -> ir.Model:
    found = ir.from_onnx_text(TEXT)
    found.graph[0].outputs[0].shape = ir.Shape([None, 3, 4])
    return found


def random(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("axis", [1, -1])
def test_agrees_with_numpy(batch: int, axis: int) -> None:
    x = random(7, 3, 4)
    others = (0, 2) if axis == 1 else (0, 1)
    found = measure_channels(model(), {"h": axis}, Feed({"x": x}, batch))["h"]
    np.testing.assert_array_equal(found.amax, np.abs(x).max(axis=others))
    np.testing.assert_allclose(found.mean_square, np.square(x).mean(axis=others), rtol=1e-5)
    by_name = measure_channel_amax(model(), {"h": axis}, {"x": x}, batch)
    np.testing.assert_array_equal(by_name["h"], found.amax)


def test_changes_no_model_and_measures_nothing_where_nothing_is_asked() -> None:
    graph = model()
    before = ir.to_proto(graph)
    assert measure_channel_amax(graph, {}, {}, 2) == {}
    measure_channel_amax(graph, {"h": 1}, {"x": random(2, 3, 4)}, 2)
    assert ir.to_proto(graph) == before


def test_names_what_first_became_nan_its_operator_and_module() -> None:
    graph = ir.from_onnx_text(TEXT.replace("y = Sqrt(x)", "r = Sqrt(x) y = Neg(r)"))
    root, negated = list(graph.graph)[1:]
    negated.outputs[0].shape = ir.Shape([None, 3, 4])
    root.name, root.metadata_props[MODULE_KEY] = "node_sqrt", "blocks.0.norm"
    with pytest.raises(GpusqError, match=r"'r' became NaN or infinite in Sqrt 'node_sqrt' of 'blocks\.0\.norm'"):
        measure_channel_amax(graph, {"y": 1}, {"x": -np.ones((2, 3, 4), np.float32)}, 2)


def test_names_the_tensor_whose_squares_are_infinite() -> None:
    with pytest.raises(GpusqError, match="'h' became NaN or infinite"):
        measure_channel_amax(model(), {"h": 1}, {"x": np.full((2, 3, 4), 1e25, np.float32)}, 2)
