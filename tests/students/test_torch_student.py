from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from exporters.fake_quantize import fake_quantize
from exporters.student_file import StudentFile
from exporters.torch_student import build_module, fake_quant_module
from profiles.errors import GpusqError
from students.fashion_vit.model import fashion_vit
from students.fashion_vit.pack import pack
from students.fashion_vit.prune import prune
from students.fashion_vit.quant import quantize

CONFIG: dict[str, Any] = {"width": 32, "depth": 1, "heads": 1}


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trained(image: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = fashion_vit(**CONFIG)
    prune(model)
    quantize(model, [image])
    return model.eval()


@pytest.fixture
def student(trained: nn.Module) -> StudentFile:
    return pack(trained, CONFIG, {})


def test_reference_equals_the_module_in_training_bit_for_bit(
    trained: nn.Module, student: StudentFile, image: torch.Tensor
) -> None:
    with torch.inference_mode():
        assert torch.equal(fake_quant_module(student)(image), trained(image))


def test_float_module_has_the_dequantized_weights_and_no_activation_rounding(
    student: StudentFile, image: torch.Tensor
) -> None:
    module = build_module(student)
    weight = module.get_submodule("blocks.0.attn.qkv").weight
    assert isinstance(weight, torch.Tensor)
    expected = student.tensors["blocks.0.attn.qkv.weight"] * student.weight_scales["blocks.0.attn.qkv"][:, None]
    assert np.array_equal(weight.detach().numpy(), expected)
    with torch.inference_mode():
        assert not torch.equal(module(image), fake_quant_module(student)(image))


def test_packed_weights_are_two_of_four_int8(student: StudentFile) -> None:
    assert len(student.weight_scales) == 6
    for name in student.weight_scales:
        weight = student.tensors[f"{name}.weight"]
        assert weight.dtype == np.int8
        kept = (weight.reshape(len(weight), -1, 4) != 0).sum(-1)
        assert name == "head" or kept.max() <= 2


def test_hook_quantizes_the_input_of_a_linear(student: StudentFile) -> None:
    module = fake_quant_module(student)
    linear = module.get_submodule("head")
    assert isinstance(linear, nn.Linear)
    x = torch.randn(3, 32)
    scale = torch.tensor(student.input_scales["head"])
    with torch.inference_mode():
        plain = nn.functional.linear(fake_quantize(x, scale), linear.weight, linear.bias)
        assert torch.equal(linear(x), plain)


def test_float16_weights_become_float32(image: torch.Tensor) -> None:
    dense = pack(fashion_vit(**CONFIG), CONFIG, {})
    halved = replace(dense, tensors={name: array.astype(np.float16) for name, array in dense.tensors.items()})
    assert all(parameter.dtype == torch.float32 for parameter in build_module(halved).parameters())


@pytest.mark.parametrize(
    "model",
    [
        "os:system",
        "subprocess:run",
        "students:fashion_vit",
        "students_evil.model:make",
        "students.fashion_vit.model",
        "students.fashion_vit.model:nn.Linear",
        "exporters.student_file:read_student",
        "students.fashion_vit.model:fashion_vit\n",
    ],
)
def test_only_factories_of_the_students_package_are_imported(student: StudentFile, model: str) -> None:
    with pytest.raises(GpusqError, match="not a factory of the students package") as caught:
        build_module(replace(student, model=model))
    assert caught.value.hint


def test_a_function_that_the_module_only_imports_is_no_factory(student: StudentFile) -> None:
    with pytest.raises(GpusqError, match="defines no factory 'read_student'"):
        build_module(replace(student, model="students.fashion_vit.__main__:read_student"))


def test_unknown_module_is_named(student: StudentFile) -> None:
    with pytest.raises(GpusqError, match=r"not installed: No module named 'students\.nothing'"):
        build_module(replace(student, model="students.nothing:make"))


def test_config_that_the_factory_does_not_take_is_named(student: StudentFile) -> None:
    with pytest.raises(GpusqError, match=r"does not take the config .*wide"):
        build_module(replace(student, config={"wide": 3}))


def test_tensors_that_do_not_fit_are_named_five_at_most(student: StudentFile) -> None:
    with pytest.raises(GpusqError, match=r"blocks\.1\.norm1\.weight is missing, \[32\] expected") as caught:
        build_module(replace(student, config={**CONFIG, "depth": 2}))
    assert caught.value.message.count("expected") == 5
    assert "more" in caught.value.message


def test_unexpected_and_misshapen_tensors_are_named(student: StudentFile) -> None:
    odd = {**student.tensors, "extra": np.ones(2, np.float32), "norm.bias": np.ones(3, np.float32)}
    with pytest.raises(GpusqError) as caught:
        build_module(replace(student, tensors=odd))
    assert "extra [2] is unexpected" in caught.value.message
    assert "norm.bias is [3], [32] expected" in caught.value.message


def test_input_scale_of_something_else_than_a_linear_is_named(student: StudentFile) -> None:
    with pytest.raises(GpusqError, match="'norm' has an input scale but is a LayerNorm"):
        fake_quant_module(replace(student, input_scales={"norm": np.array(0.1, np.float32)}))
