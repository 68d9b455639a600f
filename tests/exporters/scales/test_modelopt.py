"""ModelOpt writes the files, in this process; taking the scales out of them imports nothing of it."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporters.quantizer import Place
from exporters.scales import Hints, take_scales
from exporters.tensors import read_tensors
from profiles.errors import GpusqError

BLOCKS_OF_32 = {-1: 32}


def config(weight: dict[str, Any], activation: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    quant_cfg = [{"quantizer_name": "*", "enable": False}]
    quant_cfg.append({"quantizer_name": "*weight_quantizer", "cfg": weight})
    if activation is not None:
        quant_cfg.append({"quantizer_name": "*input_quantizer", "cfg": activation})
    return {"quant_cfg": quant_cfg, "algorithm": "max", **more}


W8A8 = config({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None})


@pytest.fixture
def quantize(modelopt: Any) -> Callable[..., nn.Module]:
    """`quantize(task, config, steps)`: a trained network, calibrated, and trained on for a few steps."""

    def quantize(task: Any, cfg: dict[str, Any], steps: int = 3, module: nn.Module | None = None) -> nn.Module:
        module = task.trained() if module is None else module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = modelopt.quantization.quantize(module, copy.deepcopy(cfg), lambda m: m(task.data(3, 64)[0]))
            return task.train(module, steps, 1e-3) if steps else module.eval()

    return quantize


@pytest.fixture
def saved(modelopt: Any, tmp_path: Path) -> Callable[[nn.Module], tuple[dict[str, Tensor], dict[str, Any]]]:
    """`saved(module)`: what mto.save wrote, read back safely."""

    def saved(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        modelopt.opt.save(module, tmp_path / "student.pt")
        read = read_tensors(tmp_path / "student.pt")
        return read.state, dict(read.metadata)

    return saved


def answers(module: nn.Module, x: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    with torch.inference_mode():
        return np.asarray(module(x).numpy())


def quantizers(module: nn.Module) -> dict[str, Any]:
    return {
        name.removesuffix("_quantizer"): quantizer
        for name, quantizer in module.named_modules()
        if name.endswith("_quantizer") and hasattr(quantizer, "_amax") and quantizer.is_enabled
    }


def stored(quantizer: Any) -> bytes:
    """The scales of a ModelOpt quantizer, by its own arithmetic."""
    return bytes(quantizer.step_size.to(torch.float32).contiguous().numpy().tobytes())


def assert_quantizes_alike(module: nn.Module, road: Any, x: Tensor) -> None:
    """Each quantizer of ModelOpt's, and ours on the same tensor: the weights equal, activations within one step."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0], output

        return hook

    hooks = [quantizer.register_forward_hook(watch(name)) for name, quantizer in quantizers(module).items()]
    answers(module, x)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(quantizers(module))
    for name, (before, after) in seen.items():
        layer, _, tensor = name.rpartition(".")
        if tensor == "weight":
            assert torch.allclose(road.taken.state[name], after, rtol=1e-6, atol=0), name
            assert torch.allclose(road.reference.get_submodule(layer).weight, after, rtol=1e-6, atol=0), name
        else:
            factor = road.taken.factors.get(layer)
            ours = getattr(road.reference.get_submodule(layer), f"{tensor}_quantizer")
            difference = (ours(before if factor is None else before * torch.from_numpy(factor)) - after).abs()
            assert difference.max() <= ours.scale * (1 + 1e-6), name
            assert (difference > 1e-3 * ours.scale).float().mean() < 1e-3, name  # two roundings differ at ties only


@pytest.mark.parametrize(
    ("task", "cfg"),
    [
        ("mlp", "INT8_DEFAULT_CFG"),
        ("conv", "INT8_DEFAULT_CFG"),
        ("vit", "INT8_DEFAULT_CFG"),
        ("mlp", "INT8_SMOOTHQUANT_CFG"),
        ("mlp", "INT8_WEIGHT_ONLY_CFG"),
        ("conv", "INT8_WEIGHT_ONLY_CFG"),
    ],
    indirect=["task"],
)
def test_int8_answers_as_modelopt_does_with_its_scales_bit_for_bit(
    task: Any, cfg: str, modelopt: Any, quantize: Any, saved: Any, travel: Any
) -> None:
    module = quantize(task, getattr(modelopt.quantization, cfg))
    road = travel(task, *saved(module))
    road.agrees(answers(module, task.data(1)[0]))
    assert_quantizes_alike(module, road, task.data(1)[0])
    assert len(road.taken.quantizers) == len(quantizers(module)) > 0
    for name, quantizer in quantizers(module).items():
        assert road.scale(f"{name}_scale").tobytes() == stored(quantizer), name


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        ({"num_bits": 4, "block_sizes": BLOCKS_OF_32}, None),
        ({"num_bits": 4, "block_sizes": {-1: 96}}, None),  # 256 and 128 are no multiples of 96
        ({"num_bits": 4, "axis": 0}, {"num_bits": 8, "axis": None}),
        ({"num_bits": 4, "block_sizes": BLOCKS_OF_32}, {"num_bits": 8, "axis": None}),
        ({"num_bits": 8, "axis": 0, "narrow_range": True}, {"num_bits": 8, "axis": None, "narrow_range": True}),
        ({"num_bits": 8, "axis": None}, {"num_bits": 8, "axis": None}),
        ({"num_bits": 2, "axis": 0}, None),
    ],
    ids=["int4-blocks", "int4-ragged-blocks", "w4a8", "w4-blocks-a8", "narrow", "per-tensor", "int2"],
)
def test_other_integers_answer_alike(
    weight: dict[str, Any], activation: dict[str, Any] | None, task: Any, quantize: Any, saved: Any, travel: Any
) -> None:
    module = quantize(task, config(weight, activation))
    road = travel(task, *saved(module))
    road.agrees(answers(module, task.data(1)[0]))
    assert_quantizes_alike(module, road, task.data(1)[0])
    for name, quantizer in quantizers(module).items():
        assert road.scale(f"{name}_scale").tobytes() == stored(quantizer), name


def test_awq_keeps_its_factors_ahead_of_the_layer(
    task: Any, modelopt: Any, quantize: Any, saved: Any, travel: Any
) -> None:
    module = quantize(task, modelopt.quantization.INT4_AWQ_CFG, steps=0)
    road = travel(task, *saved(module))
    road.agrees(answers(module, task.data(1)[0]))
    assert set(road.taken.factors) == {"0", "2", "4"}
    assert not [place for place in road.taken.quantizers if place.tensor == "input"]


def test_a_2_4_sparse_student_keeps_its_zeros(task: Any, modelopt: Any, quantize: Any, saved: Any, travel: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last layer is too small to be pruned
        module = modelopt.sparsity.sparsify(task.trained(), "sparse_magnitude")
    module = quantize(task, W8A8, module=modelopt.sparsity.export(module), steps=0)
    road = travel(task, *saved(module))
    road.agrees(answers(module, task.data(1)[0]))
    weight = road.taken.state["2.weight"]
    assert ((weight.reshape(-1, 4) == 0).sum(1) >= 2).all()


def test_a_disabled_quantizer_is_left_out(task: Any, quantize: Any, saved: Any, modelopt: Any) -> None:
    module = quantize(task, W8A8, steps=0)
    modelopt.quantization.disable_quantizer(module, "2.*")
    taken = take_scales(*saved(module))
    assert {place.module for place in taken.quantizers} == {"0", "4"}
    assert set(taken.state) == {f"{index}.{name}" for index in (0, 2, 4) for name in ("weight", "bias")}
    assert torch.equal(taken.state["2.weight"], module.get_parameter("2.weight"))


def test_pytorch_quantizations_names_mean_the_same(task: Any, quantize: Any, saved: Any) -> None:
    state, metadata = saved(quantize(task, W8A8))
    old = {
        name.replace("input_quantizer", "_input_quantizer").replace("weight_quantizer", "_weight_quantizer"): tensor
        for name, tensor in state.items()
    }
    new, taken = take_scales(state, metadata), take_scales(old)
    assert taken.kind == "pytorch-quantization"
    assert "taken as enabled, signed, 8-bit" in taken.notes[0]
    assert taken.quantizers.keys() == new.quantizers.keys()
    for place, quantizer in new.quantizers.items():
        assert taken.quantizers[place].scale.tobytes() == quantizer.scale.tobytes()
        assert taken.quantizers[place].axis == quantizer.axis
    assert all(torch.equal(taken.state[name], tensor) for name, tensor in new.state.items())


def test_a_dead_channel_answers_zero_and_has_a_positive_scale(task: Any, quantize: Any, saved: Any) -> None:
    module = task.trained()
    with torch.no_grad():
        module.get_parameter("0.weight")[3] = 0
    module = quantize(task, W8A8, module=module, steps=0)
    with torch.no_grad():
        module.get_parameter("0.weight")[3] = 0.7  # trained on: ModelOpt rounds a channel whose amax is 0 to zeros
    taken = take_scales(*saved(module))
    assert float(taken.quantizers[Place("0", "weight")].scale[3]) == 1
    assert not taken.state["0.weight"][3].any()
    assert taken.notes == ("0.weight: 1 dead channels, whose scale was 0, have the scale 1",)


@pytest.mark.parametrize(
    ("weight", "activation", "message"),
    [
        ({"num_bits": (4, 3), "axis": None}, None, "'0.weight_quantizer' is quantized to FP8"),
        ({"num_bits": 8, "axis": 0}, {"num_bits": 8, "type": "dynamic"}, "computes its scale while the network runs"),
        ({"num_bits": 8, "axis": 0}, {"num_bits": 8, "unsigned": True}, "zero-point 0 with integers 0 to 255"),
        ([{"num_bits": 4, "axis": 0}, {"num_bits": 8, "axis": 0}], None, "a kind that is not taken"),
    ],
    ids=["fp8", "dynamic", "unsigned", "twice"],
)
def test_what_integers_around_0_cannot_hold_is_refused_by_name(
    weight: dict[str, Any], activation: dict[str, Any] | None, message: str, quantize: Any, saved: Any
) -> None:
    from tests.exporters.scales.conftest import Task

    positive = Task(lambda: nn.Sequential(nn.ReLU(), nn.Linear(32, 10)), (32,))
    module = quantize(positive, config(weight, activation), steps=0, module=positive.make())
    with pytest.raises(GpusqError, match=message.replace("'0.", "'1.")) as caught:
        take_scales(*saved(module))
    assert "1." in caught.value.message
    assert caught.value.hint


STATE = {
    "fc.weight": torch.ones(3, 4),
    "fc.weight_quantizer._amax": torch.full((3, 1), 2.0),
    "fc.input_quantizer._amax": torch.tensor(1.0),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight_quantizer._amax": torch.tensor([[2.0], [-1.0], [1.0]])}, "amax of 'fc.weight' is -1"),
        ({"fc.weight_quantizer._amax": torch.tensor([[2.0], [torch.nan], [1.0]])}, "amax of 'fc.weight' is nan"),
        ({"fc.weight_quantizer._amax": torch.ones(4, 1)}, r"amax of 'fc.weight' is \[4, 1\], .* fit \[3, 4\]"),
        ({"fc.weight_quantizer._amax": torch.ones(6, 1)}, r"amax of 'fc.weight' is \[6, 1\]"),
        ({"fc.weight_quantizer._amax": torch.ones(3, 4)}, r"amax of 'fc.weight' is \[3, 4\]"),
        ({"fc.input_quantizer._amax": torch.tensor(0.0)}, "scale of 'fc.input' is 0"),
        ({"fc.input_quantizer._amax": torch.tensor(torch.inf)}, "amax of 'fc.input' is inf"),
        ({"gone.weight_quantizer._amax": torch.ones(3, 1)}, "'gone.weight_quantizer._amax' belongs to no tensor"),
        (
            {"fc.k_bmm_quantizer._amax": torch.tensor(1.0)},
            "'fc.k_bmm_quantizer._amax' belongs to a quantizer of a kind",
        ),
        ({"fc.input_quantizer._bias_value": torch.tensor(1.0)}, "belongs to a quantizer of a kind"),
        ({"fc.input_quantizer._pre_quant_scale": torch.zeros(4)}, "factor of the input of 'fc' is 0"),
    ],
)
def test_unsound_scales_are_an_error_that_names_them(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(GpusqError, match=message):
        take_scales(STATE | change)


def test_a_quantizer_that_was_never_calibrated_is_an_error() -> None:
    described = {"fc.weight_quantizer": {}, "fc.input_quantizer": {}, "fc.output_quantizer": {"_disabled": True}}
    state = {name: tensor for name, tensor in STATE.items() if "input" not in name}
    metadata = {"modelopt_state": {"modelopt_state_dict": [("quantize", {"metadata": {"quantizer_state": described}})]}}
    with pytest.raises(GpusqError, match=r"'fc.input_quantizer' has no amax: .* never calibrated"):
        take_scales(state, metadata)


def test_a_dynamic_activation_is_left_out_only_when_asked(task: Any, quantize: Any, saved: Any) -> None:
    module = quantize(task, config({"num_bits": 8, "axis": 0}, {"num_bits": 8, "type": "dynamic"}), steps=0)
    state, metadata = saved(module)
    with pytest.raises(GpusqError, match=r"'0.input_quantizer' computes its scale while the network runs") as caught:
        take_scales(state, metadata)
    assert "--drop-dynamic" in caught.value.hint
    taken = take_scales(state, metadata, Hints(drop_dynamic=True))
    assert {place.tensor for place in taken.quantizers} == {"weight"}
    assert any(note.startswith("0.input_quantizer computed its scale") for note in taken.notes)


def test_half_precision_scales_widen_without_loss() -> None:
    amax = torch.tensor(0.1234, dtype=torch.bfloat16)
    taken = take_scales(STATE | {"fc.input_quantizer._amax": amax})
    expected = (amax.float() / 127).numpy()
    assert taken.quantizers[Place("fc", "input")].scale.tobytes() == expected.tobytes()


def test_hints_give_the_bits_that_a_bare_state_dict_does_not_say() -> None:
    taken = take_scales(STATE, hints=Hints(bits=4))
    assert (taken.quantizers[Place("fc", "weight")].low, taken.quantizers[Place("fc", "weight")].high) == (-8, 7)


def test_taking_scales_imports_nothing_of_the_library(task: Any, quantize: Any, modelopt: Any, tmp_path: Path) -> None:
    module = quantize(task, config({"num_bits": 4, "block_sizes": {-1: 96}}, None), steps=0)
    modelopt.opt.save(module, tmp_path / "student.pt")
    script = f"""
import sys
from exporters.scales import take_scales
from exporters.tensors import read_tensors
read = read_tensors({str(tmp_path / "student.pt")!r})
taken = take_scales(read.state, read.metadata)
assert len(taken.quantizers) == 3 and taken.kind == "NVIDIA ModelOpt", taken
assert not [name for name in sys.modules if name.startswith("modelopt")]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
