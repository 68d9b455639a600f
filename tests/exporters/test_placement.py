from __future__ import annotations

import pytest

from exporters.improvement import AUTO, IMPROVEMENTS, Improvement, check_improvable
from exporters.placement import PLACEMENTS, Placement, check_supported, format_of, rounds_to_integers
from exporters.surgery import Target
from profiles.device import load_device
from profiles.errors import GpusqError


@pytest.mark.parametrize(
    ("placement", "device", "says"),
    [
        ("fp8", "a100", "a100-sxm-80gb has no FP8: it needs compute capability 8.9, and has 8.0"),
        ("fp8-mha", "agx-orin", "agx-orin-64gb has no FP8: it needs compute capability 8.9, and has 8.7"),
        ("nvfp4", "rtx-4090", "rtx-4090 has no FP4: it needs compute capability 10.0, and has 8.9"),
        ("nvfp4", "cpu", "cpu runs onnxruntime, which has no FP4 kernels"),
    ],
)
def test_a_device_without_the_type_is_refused(placement: Placement, device: str, says: str) -> None:
    with pytest.raises(GpusqError) as caught:
        Target(load_device(device), "float16", placement)
    assert caught.value.message == says
    assert "--placement w8a8-linear" in (caught.value.hint or "")


def test_a_parser_without_the_type_is_refused() -> None:
    device = load_device("rtx-5090")
    older = device.model_copy(update={"onnx": device.onnx.model_copy(update={"opset": 20})})
    check_supported("fp8", older)
    with pytest.raises(GpusqError, match="takes opset 20, and FP4 came with opset 23"):
        check_supported("nvfp4", older)


@pytest.mark.parametrize("device", ["rtx-5090", "b200", "gb10"])
def test_devices_with_the_types_take_every_placement(device: str) -> None:
    for placement in PLACEMENTS:
        check_supported(placement, load_device(device))


@pytest.mark.parametrize(
    ("placement", "improve"), [("fp8", "mse-weights"), ("fp8-mha", "error-feedback"), ("nvfp4", "bias-correction")]
)
def test_an_improvement_of_integers_is_refused_for_floats(placement: Placement, improve: Improvement) -> None:
    with pytest.raises(GpusqError, match=f"{improve} is for integers, and placement {placement} rounds to floats"):
        Target(load_device("rtx-5090"), "float16", placement, improve=(improve,))


def test_what_searches_with_integers_is_refused_for_floats() -> None:
    with pytest.raises(GpusqError, match="--target-drop is for integers"):
        Target(load_device("rtx-5090"), "float16", "fp8", target_drop=0.5)
    with pytest.raises(GpusqError, match="--method entropy is for integers, and placement nvfp4 rounds to floats"):
        check_improvable("nvfp4", (), method="entropy")
    check_improvable("fp8", [IMPROVEMENTS[-1]], method="percentile")
    check_improvable("w8a8-linear", [name for name in IMPROVEMENTS if name != AUTO], target_drop=0.5, method="entropy")


def test_only_placements_of_integers_can_be_searched() -> None:
    found = {placement for placement in PLACEMENTS if rounds_to_integers(placement)}
    assert found == {"w8a8-linear", "w8a8-mha", "sparse-int8", "w4"}


def test_reports_call_a_placement_by_its_numbers() -> None:
    named = {placement: format_of(placement) for placement in PLACEMENTS}
    assert named["fp8-mha"] == named["fp8"] == "fp8"
    assert (named["nvfp4"], named["w4"], named["w8a8-mha"]) == ("nvfp4", "w4", "int8")
