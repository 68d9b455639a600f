from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.passes.name_axes import NameAxes

TEXT = """
    <ir_version: 10, opset_import: ["": 20]>
    g (float[batch,4,8] x) => (float[rows,8] y)
    <float[FIRST,4,8] a, int64[3] heads = {0, 4, -1}, int64[2] flat = {-1, 8}>
    { a = Relu(x) b = Reshape(a, heads) y = Reshape(b, flat) }
"""


def model_of(first: str) -> ir.Model:
    return ir.from_onnx_text(TEXT.replace("FIRST", first))


def shapes(model: ir.Model) -> list[str]:
    return [str(node.outputs[0].shape) for node in model.graph]


def test_names_come_from_the_inputs_and_no_other_stays() -> None:
    models = [model_of("batch"), model_of("unk_3")]
    for model in models:
        NameAxes()(model)
    assert shapes(models[0]) == shapes(models[1]) == ["[batch,4,8]", "[batch,4,8]", "[rows,8]"]


def test_a_size_that_is_known_stays_though_it_cannot_be_inferred() -> None:
    model = model_of("5")
    NameAxes()(model)
    assert shapes(model)[0] == "[5,4,8]"


def test_an_operator_of_another_domain_keeps_its_sizes() -> None:
    text = """
        <ir_version: 10, opset_import: ["": 20, "own": 1]>
        g (float[batch,8] x) => (float[batch,8] y) <float[some,8] a> { a = own.Op(x) y = Relu(a) }
    """
    model = ir.from_onnx_text(text)
    NameAxes()(model)
    assert shapes(model)[0] == "[None,8]"


def test_changes_no_number(run: Callable[..., npt.NDArray[np.float32]]) -> None:
    model = model_of("unk_3")
    x = np.random.default_rng(0).standard_normal((3, 4, 8), np.float32)
    before = run(model, x=x)
    NameAxes()(model)
    assert np.array_equal(run(model, x=x), before)


def test_a_second_run_changes_nothing() -> None:
    model = model_of("unk_3")
    NameAxes()(model)
    once = ir.to_proto(model)
    assert NameAxes()(model).changed == 0
    assert ir.to_proto(model) == once
