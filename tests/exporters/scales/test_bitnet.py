from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporters.quantizer import Place
from exporters.scales import Hints, take_scales
from exporters.scales.factors import multiply_inputs
from profiles.errors import GpusqError

METADATA = {"quantization_config": {"quant_method": "bitnet", "linear_class": "bitlinear"}}
DROP = Hints(drop_dynamic=True)


@pytest.fixture
def ternary() -> Tensor:
    return torch.randint(-1, 2, (8, 16), generator=torch.Generator().manual_seed(0)).float()


@pytest.fixture
def state(bitnet: Any, ternary: Tensor) -> dict[str, Tensor]:
    scale = torch.tensor([1.3], dtype=torch.bfloat16)
    return {"fc.weight": bitnet.pack_weights(ternary.clone()), "fc.weight_scale": scale}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_computes_as_hugging_faces_layer_does_on_whole_inputs(
    bitnet: Any, state: dict[str, Tensor], ternary: Tensor, linear_class: str
) -> None:
    """Inputs whose quantization for each token is exact leave only the weight to compare."""
    x = torch.randint(-127, 128, (4, 16), generator=torch.Generator().manual_seed(1)).float()
    x[:, 0] = 127
    layer: Any = (bitnet.BitLinear if linear_class == "bitlinear" else bitnet.AutoBitLinear)(
        16, 8, bias=False, dtype=torch.float32
    )
    layer.weight_scale.copy_(state["fc.weight_scale"])
    if linear_class == "bitlinear":
        layer.weight.copy_(state["fc.weight"])
    else:
        layer.weight.data.copy_(ternary)
    with torch.inference_mode(), torch._dynamo.config.patch(disable=True):
        expected = layer(x)
    metadata = {"quantization_config": {"quant_method": "bitnet", "linear_class": linear_class}}
    taken = take_scales(state, metadata, DROP)
    assert torch.allclose(x @ taken.state["fc.weight"].T, expected, rtol=1e-5, atol=1e-4)
    quantizer = taken.quantizers[Place("fc", "weight")]
    assert (quantizer.low, quantizer.high) == (-1, 1)
    assert np.array_equal(quantizer.integers(taken.state["fc.weight"].numpy()), ternary.numpy())


def test_the_activations_are_refused_unless_the_weights_alone_are_asked_for(state: dict[str, Tensor]) -> None:
    with pytest.raises(GpusqError, match="input of 'fc' is quantized with scales computed while the network runs"):
        take_scales(state, METADATA)
    assert "stay float" in take_scales(state, METADATA, DROP).notes[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": torch.full((2, 16), 255, dtype=torch.uint8)}, "'fc.weight' holds a code that is none of"),
        ({"fc.weight_scale": torch.tensor([0.0])}, "scale of 'fc.weight' is inf"),
        ({"fc.weight_scale": torch.tensor([-1.0])}, "scale of 'fc.weight' is -1"),
    ],
)
def test_unsound_weights_are_an_error_that_names_them(
    state: dict[str, Tensor], change: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(GpusqError, match=message):
        take_scales(state | change, METADATA, DROP)


def test_training_in_progress_holds_no_scales(ternary: Tensor) -> None:
    online = {"quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}}
    with pytest.raises(GpusqError, match="holds no scales"):
        take_scales({"fc.weight": ternary}, online)


def test_a_factor_without_its_module_is_an_error() -> None:
    with pytest.raises(GpusqError, match="no module 'gone', whose input factor"):
        multiply_inputs(nn.Linear(2, 2), {"gone": np.ones(2, np.float32)})
