from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporters.passes.fold_constants import FoldConstants
from exporters.passes.fuse_attention import FuseAttention
from exporters.passes.lower_einsum import LowerEinsum

Run = Callable[..., npt.NDArray[np.float32]]
SIZES = {"a": 2, "b": 3, "h": 2, "i": 4, "j": 5, "d": 3, "n": 6, "m": 1}

ATTENTION = """
<ir_version: 10, opset_import: ["" : 23]>
attention (float[2, 4, 2, 8] q, float[2, 4, 2, 8] k, float[2, 4, 2, 8] v) => (float[2, 4, 2, 8] y)
<float scale = {0.35355339}>
{
   [one] scores = Einsum<equation = "b i h d, b j h d -> b h i j">(q, k)
   scaled = Mul(scores, scale)
   weights = Softmax<axis = -1>(scaled)
   [two] y = Einsum<equation = "bhij,bjhd->bihd">(weights, v)
}
"""


def product(equation: str) -> ir.Model:
    operands, _, output = equation.partition("->")
    first, second = (",".join(str(SIZES[axis]) for axis in axes) for axes in operands.split(","))
    made = ",".join(str(SIZES[axis]) for axis in output)
    return ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        product (float[{first}] x, float[{second}] w) => (float[{made}] y)
        {{ y = Einsum<equation = "{equation}">(x, w) }}
    """)


def operands(model: ir.Model) -> dict[str, npt.NDArray[np.float32]]:
    random = np.random.default_rng(0)
    shapes = {value.name or "": value.shape for value in model.graph.inputs}
    return {name: random.standard_normal(shape.numpy(), np.float32) for name, shape in shapes.items() if shape}


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        ("bhid,bhjd->bhij", ["Transpose", "MatMul"]),
        ("bhid,bhdj->bhij", ["MatMul"]),
        ("bihd,bjhd->bhij", ["Transpose", "Transpose", "MatMul"]),
        ("bhij,bhjd->bihd", ["MatMul", "Transpose"]),
        ("bhjd,bhij->bhid", ["MatMul"]),
        ("bhid,hjd->bhij", ["Transpose", "MatMul"]),
        ("bid,dn->bin", ["MatMul"]),
        ("id,jd->ji", ["Transpose", "MatMul"]),
    ],
)
def test_a_product_of_matrices_becomes_matmul_with_few_transposes(equation: str, expected: list[str], run: Run) -> None:
    model = product(equation)
    given = operands(model)
    before = run(model, **given)
    assert LowerEinsum()(model).changed == 1
    assert operators(model) == expected
    assert np.abs(run(model, **given) - before).max() <= 1e-5
    assert LowerEinsum()(model).changed == 0


@pytest.mark.parametrize(
    ("equation", "why"),
    [
        ("bid,bjd->bj", "it sums over an axis of one operand"),
        ("bij,bij->b", "it sums over 2 axes"),
        ("bi,bj->bij", "it sums over 0 axes"),
        ("bhd,bhjd->bhj", "it multiplies a matrix by a vector"),
        ("abid,ajnd->abijn", "it has several axes for its rows and for its columns"),
        ("bii,bij->bij", "it takes a diagonal"),
    ],
)
def test_any_other_stays_with_the_reason(equation: str, why: str) -> None:
    model = product(equation)
    outcome = LowerEinsum()(model)
    assert (outcome.changed, [left.why for left in outcome.left_alone]) == (0, [why])
    assert operators(model) == ["Einsum"]


def test_an_ellipsis_and_a_single_operand_stay() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20]>
        others (float[2, 3, 4] x, float[2, 4, 5] w) => (float[2, 3, 5] y, float[2, 4, 3] z)
        { y = Einsum<equation = "...ij,...jk->...ik">(x, w)  z = Einsum<equation = "bij->bji">(x) }
    """)
    outcome = LowerEinsum()(model)
    assert [left.why for left in outcome.left_alone] == ["it has an ellipsis, or not two operands"] * 2


def test_operands_without_a_type_stay() -> None:
    model = product("bid,dn->bin")
    model.graph.inputs[1].type = None
    assert [left.why for left in LowerEinsum()(model).left_alone] == ["its types are not known"]


def test_the_order_of_an_output_that_is_not_given_is_that_of_the_alphabet(run: Run) -> None:
    model = product("jd,id->ij")
    model.graph[0].attributes["equation"] = ir.AttrString("equation", "jd,id")
    given = operands(model)
    before = run(model, **given)
    assert LowerEinsum()(model).changed == 1
    assert np.abs(run(model, **given) - before).max() <= 1e-5


def test_attention_that_is_written_with_einsum_is_fused(run: Run) -> None:
    model = ir.from_onnx_text(ATTENTION)
    given = operands(model)
    before = run(model, **given)
    FoldConstants()(model)  # infers the shapes
    assert LowerEinsum()(model).changed == 2
    assert FuseAttention()(model).changed == 1
    assert "Attention" in operators(model)
    assert np.abs(run(model, **given) - before).max() <= 1e-5


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(first=st.permutations("bhid"), second=st.permutations("bhjd"), output=st.permutations("bhij"))
def test_any_order_of_the_axes_keeps_the_numbers(
    first: list[str], second: list[str], output: list[str], run: Run
) -> None:
    model = product(f"{''.join(first)},{''.join(second)}->{''.join(output)}")
    given = operands(model)
    before = run(model, **given)
    assert LowerEinsum()(model).changed == 1
    assert np.abs(run(model, **given) - before).max() <= 1e-5
