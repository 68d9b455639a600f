"""compressed-tensors quantizes, trains and writes; what it writes is read back from safetensors and config.json."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporters.quantizer import Place
from exporters.scales import Hints, take_scales
from profiles.errors import GpusqError

Saved = tuple[dict[str, Tensor], dict[str, Any]]
CHANNELS = {"num_bits": 8, "strategy": "channel"}
TENSOR = {"num_bits": 8, "strategy": "tensor"}


@pytest.fixture
def quantize(compressed_tensors: Any) -> Callable[..., nn.Module]:
    """`quantize(module, x, weights, activations)`: calibrated with `x` by the library's own arithmetic."""

    def quantize(
        module: nn.Module, x: Tensor, weights: dict[str, Any], activations: dict[str, Any] | None = None
    ) -> nn.Module:
        from compressed_tensors.quantization import (  # type: ignore[import-untyped]
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
            apply_quantization_config,
        )

        inputs = _inputs_of_linears(module, x)
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**weights),
            input_activations=None if activations is None else QuantizationArgs(**activations),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            apply_quantization_config(module, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
        for name, linear in module.named_modules():
            if isinstance(linear, nn.Linear) and hasattr(linear, "quantization_scheme"):
                _calibrate(linear, inputs[name])
                linear.__dict__["quantization_status"] = QuantizationStatus.FROZEN
        return module.eval()

    return quantize


def _inputs_of_linears(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    linears = {name: linear for name, linear in module.named_modules() if isinstance(linear, nn.Linear)}
    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    with torch.inference_mode():
        module(x)
    for hook in hooks:
        hook.remove()
    return seen


def _calibrate(linear: nn.Linear, x: Tensor) -> None:
    from compressed_tensors.quantization.utils import calculate_qparams  # type: ignore[import-untyped]

    scheme: Any = linear.quantization_scheme
    weight: Any = linear.weight.detach()
    if scheme.weights.strategy == "group":
        weight = weight.unflatten(1, (-1, scheme.weights.group_size))
    low, high = weight.amin(-1), weight.amax(-1)
    if scheme.weights.strategy == "tensor":
        low, high = low.amin(), high.amax()
    _set(linear, "weight", calculate_qparams(low, high, scheme.weights))
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        _set(linear, "input", calculate_qparams(x.amin(), x.amax(), scheme.input_activations))


def _set(linear: nn.Linear, tensor: str, found: tuple[Tensor, Tensor]) -> None:
    for name, value in zip((f"{tensor}_scale", f"{tensor}_zero_point"), found, strict=True):
        if (held := getattr(linear, name, None)) is not None:
            held.data = value.reshape(held.shape).to(held.dtype)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Saved]:
    """`saved(module, compress)`: the tensors and the metadata, as they lie on disk."""

    def saved(module: nn.Module, *, compress: bool = True) -> Saved:
        from compressed_tensors.compressors import ModelCompressor  # type: ignore[import-untyped]

        compressor = ModelCompressor.from_pretrained_model(module)
        if compress:
            compressor.compress_model(module)
        save_file(
            {name: tensor.contiguous() for name, tensor in module.state_dict().items()}, tmp_path / "model.safetensors"
        )
        compressor.update_config(tmp_path)
        return load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())

    return saved


def answers(module: nn.Module, x: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    with torch.inference_mode():
        return np.asarray(module(x).float().numpy())


@pytest.mark.parametrize(
    ("weights", "activations", "compress"),
    [
        (CHANNELS, TENSOR, True),
        (CHANNELS, TENSOR, False),
        (TENSOR, TENSOR, True),
        (CHANNELS, None, True),
        ({"num_bits": 4, "strategy": "group", "group_size": 128}, None, True),
        ({"num_bits": 4, "strategy": "group", "group_size": 32}, None, False),
        ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, None, True),
        ({"num_bits": 4, "strategy": "channel", "symmetric": False}, None, True),
        ({"num_bits": 3, "strategy": "channel"}, TENSOR, True),
    ],
    ids=["w8a8", "w8a8-frozen", "per-tensor", "w8", "w4-g128", "w4-g32-frozen", "w4-g32-asym", "w4-asym", "w3a8"],
)
def test_answers_as_the_library_does_with_its_scales_bit_for_bit(
    weights: dict[str, Any],
    activations: dict[str, Any] | None,
    compress: bool,
    task: Any,
    quantize: Any,
    saved: Any,
    travel: Any,
) -> None:
    module = quantize(task.trained(), task.data(3, 64)[0], weights, activations)
    expected = answers(module, task.data(1)[0])
    scales = {
        n: t.detach().clone() for n, t in module.named_parameters() if n.endswith(("weight_scale", "input_scale"))
    }
    state, metadata = saved(module, compress=compress)
    road = travel(task, state, metadata)
    road.agrees(expected)
    assert len(scales) == len(road.taken.quantizers) == (6 if activations else 3)
    for name, scale in scales.items():
        assert road.scale(name).tobytes() == scale.numpy().tobytes(), name


def test_a_weight_becomes_the_integers_that_the_library_stores(task: Any, quantize: Any, saved: Any) -> None:
    module = quantize(task.trained(), task.data(3, 64)[0], CHANNELS, TENSOR)
    frozen = take_scales(*saved(module, compress=False))
    state, metadata = saved(module)
    compressed = take_scales(state, metadata)
    assert state["0.weight"].dtype == torch.int8
    for name, tensor in compressed.state.items():
        assert torch.equal(frozen.state[name], tensor), name
    weight = compressed.quantizers[Place("0", "weight")]
    assert np.array_equal(weight.integers(compressed.state["0.weight"].numpy()), state["0.weight"].numpy())


def test_a_hugging_face_llama_in_bfloat16(quantize: Any, tmp_path: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    module: Any = LlamaForCausalLM(config)
    module = module.bfloat16().eval()
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
    quantize(module, torch.arange(16).reshape(2, 8), weights)
    expected = {
        name: (linear.weight_scale.detach().float().numpy(), _library_integers(linear))
        for name, linear in module.named_modules()
        if hasattr(linear, "weight_scale")
    }
    compressor = ModelCompressor.from_pretrained_model(module)
    compressor.compress_model(module)
    module.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    metadata = json.loads((tmp_path / "config.json").read_text())
    taken = take_scales(load_file(tmp_path / "model.safetensors"), metadata)
    assert taken.kind == "compressed-tensors, pack-quantized"
    assert len(expected) == len(taken.quantizers) == 7
    for name, (scale, integers) in expected.items():
        quantizer = taken.quantizers[Place(name, "weight")]
        assert quantizer.scale.tobytes() == scale.tobytes()
        assert np.array_equal(quantizer.integers(taken.state[f"{name}.weight"].numpy()), integers)
    LlamaForCausalLM(config).load_state_dict(taken.state)


def _library_integers(linear: Any) -> np.ndarray[Any, np.dtype[np.int8]]:
    from compressed_tensors.quantization.lifecycle.forward import quantize  # type: ignore[import-untyped]

    zero = getattr(linear, "weight_zero_point", None)
    integers = quantize(linear.weight, linear.weight_scale, zero, linear.quantization_scheme.weights, torch.int8)
    return np.asarray(integers.numpy())


def test_dynamic_activations_are_refused_and_left_out_only_when_asked(
    task: Any, quantize: Any, saved: Any, travel: Any
) -> None:
    dynamic = {"num_bits": 8, "strategy": "token", "dynamic": True}
    module = quantize(task.trained(), task.data(3, 64)[0], CHANNELS, dynamic)
    state, metadata = saved(module)
    with pytest.raises(GpusqError, match="input of '0' is quantized with scales computed while") as caught:
        take_scales(state, metadata)
    assert "TensorRT has no dynamic INT8" in caught.value.hint
    assert "--drop-dynamic" in caught.value.hint
    taken = take_scales(state, metadata, Hints(drop_dynamic=True))
    assert {place.tensor for place in taken.quantizers} == {"weight"}
    assert "they stay float" in taken.notes[0]


def test_an_asymmetric_activation_is_refused_by_name(task: Any, quantize: Any, saved: Any) -> None:
    module = quantize(task.trained(), task.data(3, 64)[0], CHANNELS, TENSOR | {"symmetric": False})
    with pytest.raises(GpusqError, match=r"'[024]\.input' is quantized asymmetrically"):
        take_scales(*saved(module))


def test_float8_is_refused_by_name(task: Any, quantize: Any, saved: Any) -> None:
    float8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    module = quantize(task.trained(), task.data(3, 64)[0], float8)
    state, metadata = saved(module)
    without: dict[str, Any] = {}
    for known in (metadata, without):
        with pytest.raises(GpusqError, match=r"'0\.weight' is quantized to FP8"):
            take_scales(state, known)


def plain(**more: Tensor) -> dict[str, Tensor]:
    """The names of the project's own format."""
    state = {
        "fc.weight": torch.arange(-6, 6, dtype=torch.int8).reshape(3, 4),
        "fc.weight_scale": torch.tensor([0.5, 0.25, 0.125]),
        "fc.input_scale": torch.tensor(0.1),
        "fc.bias": torch.zeros(3),
    }
    return state | {f"fc.{name}": tensor for name, tensor in more.items()}


def test_the_projects_own_names_need_no_configuration(student_file: Any) -> None:
    state = {name: torch.from_numpy(array.copy()) for name, array in student_file.tensors.items()}
    state |= {f"{m}.weight_scale": torch.from_numpy(s.copy()) for m, s in student_file.weight_scales.items()}
    state |= {f"{m}.input_scale": torch.tensor(s) for m, s in student_file.input_scales.items()}
    taken = take_scales(state)
    assert taken.state.keys() == student_file.tensors.keys()
    for module, scale in student_file.weight_scales.items():
        weight = taken.quantizers[Place(module, "weight")]
        assert weight.scale.tobytes() == scale.tobytes()
        assert np.array_equal(
            weight.integers(taken.state[f"{module}.weight"].numpy()), student_file.tensors[f"{module}.weight"]
        )
        assert taken.quantizers[Place(module, "input")].scale == student_file.input_scales[module]


def test_half_precision_scales_widen_without_loss() -> None:
    scale = torch.tensor([0.1, 0.2, 0.3]).to(torch.bfloat16)
    found = take_scales(plain(weight_scale=scale)).quantizers[Place("fc", "weight")].scale
    assert found.tobytes() == scale.float().numpy().tobytes()


def test_a_zero_point_is_folded_where_the_integers_stay_int8() -> None:
    taken = take_scales(plain(weight_zero_point=torch.tensor([3, 0, -2], dtype=torch.int8)))
    expected = (plain()["fc.weight"].float() - torch.tensor([[3.0], [0], [-2]])) * plain()["fc.weight_scale"][:, None]
    assert torch.equal(taken.state["fc.weight"], expected)
    assert taken.notes == ("fc.weight: its zero-point is folded into integers of -128 to 127",)


def test_a_dead_channel_gets_a_positive_scale_and_a_note() -> None:
    weight = plain()["fc.weight"].clone()
    weight[1] = 0
    taken = take_scales(plain(weight=weight, weight_scale=torch.tensor([0.5, 0.0, 0.125])))
    assert taken.quantizers[Place("fc", "weight")].scale.tolist() == [0.5, 1.0, 0.125]
    assert taken.notes == ("fc.weight: 1 dead channels, whose scale was 0, have the scale 1",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": torch.tensor([0.5, 0.0, 0.1])}, "scale of 'fc.weight' is 0 where its integers are not"),
        ({"weight_scale": torch.tensor([0.5, -0.1, 0.1])}, "scale of 'fc.weight' is -0.1 in channel 1"),
        ({"weight_scale": torch.tensor([0.5, torch.nan, 0.1])}, "scale of 'fc.weight' is nan in channel 1"),
        ({"weight_scale": torch.ones(4)}, r"scale of 'fc.weight' is \[4\], which does not fit \[3, 4\]"),
        ({"weight_scale": torch.ones(3, 3)}, r"scale of 'fc.weight' is \[3, 3\]"),
        ({"input_scale": torch.tensor(-0.5)}, "scale of 'fc.input' is -0.5"),
        ({"input_scale": torch.tensor(0.0)}, "scale of 'fc.input' is 0: its calibration"),
        ({"input_scale": torch.ones(4)}, "'fc.input' has 4 scales"),
        ({"input_zero_point": torch.tensor(5)}, "'fc.input' is quantized asymmetrically"),
        ({"weight_zero_point": torch.zeros(2)}, r"zero-point of 'fc.weight' is \[2\], its scale \[3\]"),
        ({"weight_zero_point": torch.tensor([-127, 0, 0])}, None),
        ({"weight_zero_point": torch.tensor([127, 0, 0])}, "'fc.weight' is quantized asymmetrically"),
        ({"k_scale": torch.tensor(1.0)}, "'fc' quantizes the KV cache"),
        ({"weight_g_idx": torch.zeros(4)}, "'fc.weight' has its columns in groups out of order"),
    ],
)
def test_unsound_scales_are_an_error_that_names_them(change: dict[str, Tensor], message: str | None) -> None:
    if message is None:
        assert take_scales(plain(**change)).notes
        return
    with pytest.raises(GpusqError, match=message):
        take_scales(plain(**change))


@pytest.mark.parametrize("name", ["weight_scale", "input_scale"])
def test_a_scale_without_its_layer_is_an_error(name: str) -> None:
    with pytest.raises(GpusqError, match=f"scale 'gone.{name}' belongs to no"):
        take_scales(plain() | {f"gone.{name}": torch.tensor(1.0)})


def packed(words: int) -> dict[str, Tensor]:
    return {
        "fc.weight_packed": torch.zeros(3, words, dtype=torch.int32),
        "fc.weight_shape": torch.tensor([3, 16]),
        "fc.weight_scale": torch.ones(3, 1),
    }


def test_packed_words_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(GpusqError, match=r"'fc.weight_packed' does not unpack: .* 4-bit"):
        take_scales(packed(9), hints=Hints(bits=4))


def test_words_of_an_unknown_width_ask_for_the_bits_that_would_fill_them() -> None:
    with pytest.raises(
        GpusqError, match=r"'fc\.weight_packed' has 3 words for 16 integers, which 8 bits do not"
    ) as said:
        take_scales(packed(3))
    assert said.value.hint.endswith("say --bits 5 or 6")
    assert take_scales(packed(3), hints=Hints(bits=6)).quantizers[Place("fc", "weight")].low == -32


def test_bits_that_are_too_few_for_a_plain_weight_are_an_error() -> None:
    with pytest.raises(GpusqError, match=r"'fc\.weight' holds integers beyond its 2 bits") as caught:
        take_scales(plain(), hints=Hints(bits=2))
    assert "--bits" in caught.value.hint


def test_a_plain_float_state_is_left_alone() -> None:
    state = {"fc.weight": torch.ones(2, 2), "fc.weight_scale": torch.ones(1)}
    taken = take_scales(state)
    assert (taken.state, taken.quantizers, taken.kind) == (state, {}, "")
