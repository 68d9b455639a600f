from __future__ import annotations

import onnx_ir as ir
import pytest

from deploy.tensorrt_api import ShapeRange
from deploy.usual_shapes import usual_shapes
from exporters.signature import parse_input
from profiles.errors import GpusqError

TEXT = """<ir_version: 10, opset_import: ["": 21]>
g (float[batch, tokens, 4] ids, float[batch, tokens] mask, float[3] fixed) => (float[A, B, C] y) {
    a = Relu(ids) b = Relu(mask) c = Relu(fixed) y = Identity(a)
}"""


def shapes(*given: str, text: str = TEXT) -> tuple[ShapeRange, dict[str, tuple[int, ...]]]:
    return usual_shapes(ir.from_onnx_text(text), [parse_input(each) for each in given])


def test_axes_of_the_same_name_have_the_same_length() -> None:
    batch, usual = shapes("ids=2x128x4")
    assert batch == ShapeRange(1, 2, 32)
    assert usual == {"ids": (2, 128, 4), "mask": (2, 128)}


def test_a_batch_above_the_largest_widens_the_range() -> None:
    assert shapes("mask=64x16")[0] == ShapeRange(1, 64, 64)


def test_a_model_that_varies_in_the_batch_alone_needs_nothing() -> None:
    assert shapes(text=TEXT.replace("tokens", "7")) == (ShapeRange(), {})


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ([], "input 'ids' varies in axis 1 too, 'tokens'", "add --input ids=8x8x4"),
        (["x=1x2"], "the model has no input 'x'", "its inputs are: ids, mask, fixed"),
        (["ids=1x2"], "input 'ids' cannot have the shape [1, 2]", "it is batch×tokens×4"),
        (["ids=1x2x5"], "input 'ids' cannot have the shape [1, 2, 5]", "it is batch×tokens×4"),
    ],
)
def test_refuses_what_does_not_fit(given: list[str], message: str, hint: str) -> None:
    with pytest.raises(GpusqError) as caught:
        shapes(*given)
    assert (caught.value.message, caught.value.hint) == (message, hint)
