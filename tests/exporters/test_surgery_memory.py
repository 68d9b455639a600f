"""The surgery of a graph whose weights do not fit in memory: which passes read them, and how many at a time."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from exporters.linears import find_linears
from exporters.onnx_file import read_onnx
from exporters.passes.annotate_sparsity import AnnotateSparsity
from exporters.passes.lower_fake_quantize import LowerFakeQuantize
from exporters.passes.outcome import Pass
from exporters.passes.place_quantizers import PlaceQuantizers
from exporters.passes.type_floats import TypeFloats
from exporters.placement import Placement
from exporters.surgery import Target, passes_for
from profiles.device import load_device
from tests.exporters.llama_decoder import Decoder
from tests.exporters.measure_surgery import in_a_process

SMALL = Decoder(layers=2, width=64, heads=4, hidden=128, vocabulary=320)
WIDE = Decoder(layers=2, vocabulary=1024)  # 0.41 billion parameters
# The libraries take 110 MiB, the largest weights 172 and, of q, k and v, 192, and what is made of it 96: 511 to 554
# were measured. The weights as INT8 would be 394 MiB more, as float16 788, and the file they are mapped from is 1576.
RESIDENT_MIB = 600


class WasReadError(Exception):
    """Someone read the values of a weight."""


def unread() -> ir.TensorProtocol:
    raise WasReadError


def make_unreadable(model: ir.Model) -> None:
    """Let it be an error to read a matrix of SMALL; smaller constants are sizes, scales and gains."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.size >= SMALL.width**2:
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.LazyTensor(unread, tensor.dtype, shape, name=value.name)


def steps(placement: Placement) -> list[Pass]:
    return passes_for(Target(load_device("a100"), "float16", placement), lambda _, names: dict.fromkeys(names, 8.0))


@pytest.mark.parametrize(
    ("dtype", "placement", "readers"),
    [
        ("float16", "fp16", {AnnotateSparsity}),
        ("float", "fp16", {TypeFloats, AnnotateSparsity}),
        ("float", "w8a8-linear", {PlaceQuantizers, TypeFloats, AnnotateSparsity}),
        ("float", "w4", {PlaceQuantizers, TypeFloats, AnnotateSparsity}),
    ],
)
def test_only_passes_that_need_the_weights_read_them(
    tmp_path: Path, dtype: str, placement: Placement, readers: set[type]
) -> None:
    """Float16 needs the range of what it narrows, a scale the weight's amax, 2:4 the zeros."""
    sizes = SMALL if dtype == "float" else Decoder(2, 64, 4, 128, 320, dtype)
    model = read_onnx(sizes.save(tmp_path))
    found = set()
    for step in steps(placement):
        blind = model.clone()
        make_unreadable(blind)
        try:
            step(blind)
        except WasReadError:
            found.add(type(step))
        step(model)
    assert found == readers


def test_integers_are_made_of_the_weight_when_they_are_read(tmp_path: Path) -> None:
    model = read_onnx(SMALL.save(tmp_path))
    for step in steps("w8a8-linear"):
        if isinstance(step, LowerFakeQuantize):
            make_unreadable(model)
        step(model)
        if isinstance(step, LowerFakeQuantize):
            break
    for linear in find_linears(model.graph):
        assert linear.weight_type == "int8"
        with pytest.raises(WasReadError):
            _ = linear.values


@pytest.mark.parametrize("placement", ["fp16", "w8a8-linear", pytest.param("w4", marks=pytest.mark.slow)])
def test_one_weight_at_a_time_is_in_memory(tmp_path: Path, placement: Placement) -> None:
    stages = in_a_process(WIDE.save(tmp_path), placement)
    assert max(stages.peak_mib.values()) < RESIDENT_MIB
    assert len(stages.tensors["AnnotateSparsity"]) == 2 * 7 + 1
    assert stages.tensors["save"].keys() == WIDE.shapes.keys()
