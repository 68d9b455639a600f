from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exporters.scales import take_scales
from profiles.errors import GpusqError

CODES = torch.zeros(4, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fc.weight_codes": CODES, "fc.weight_codebook": torch.randn(16)}, "weight of 'fc' is a codebook"),
        ({"fc.codes": CODES, "fc.codebooks": torch.randn(1, 16, 1, 8)}, "a codebook \\(AQLM\\)"),
        ({"fc.indices": CODES, "fc.lut": torch.randn(4, 16)}, "a table of levels"),
        # the names that bitsandbytes 0.4x gives a Linear4bit and a Linear8bitLt in a state dict
        (
            {
                "fc.weight": torch.zeros(16, 1, dtype=torch.uint8),
                "fc.weight.absmax": torch.ones(1),
                "fc.weight.quant_map": torch.randn(16),
                "fc.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
            },
            "codebook of bitsandbytes",
        ),
        ({"fc.weight": CODES.to(torch.int8), "fc.SCB": torch.ones(4)}, "LLM.int8"),
        ({"fc.qweight": torch.zeros(1, 8, dtype=torch.int32), "fc.scales": torch.ones(1, 8)}, "GPTQ or AWQ"),
    ],
)
def test_is_refused_with_the_layers_name(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(GpusqError, match=message) as caught:
        take_scales(state)
    assert "'fc'" in caught.value.message
    assert caught.value.hint


def test_a_layer_with_a_float_codebook_of_its_own_is_no_quantized_weight() -> None:
    state = {"quantizer.codebook": torch.randn(16, 8), "quantizer.weight": torch.randn(8, 8)}
    assert take_scales(state).state == state
