from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporters.scales import Hints, TakenScales, take_scales
from profiles.errors import GpusqError

STATE = {
    "a.weight": torch.ones(3, 4),
    "a.weight_quantizer._amax": torch.full((3, 1), 2.0),
    "a.input_quantizer._amax": torch.tensor(1.0),
}
PACKED = {
    "b.weight_packed": torch.zeros(3, 2, dtype=torch.int32),
    "b.weight_shape": torch.tensor([3, 16]),
    "b.weight_scale": torch.ones(3, 1),
    "c.weight": torch.ones(3, 4, dtype=torch.int8),
    "c.weight_scale": torch.ones(3),
    "c.weight_zero_point": torch.zeros(3, dtype=torch.int8),
    "c.input_scale": torch.ones(1),
}
MODELOPT = {
    "modelopt_state": {
        "modelopt_state_dict": [
            (
                "quantize",
                {
                    "metadata": {
                        "quantizer_state": {
                            "a.weight_quantizer": {"_num_bits": 4, "_block_sizes": {-1: 2}},
                            "a.input_quantizer": {"_num_bits": 8},
                        }
                    }
                },
            )
        ]
    }
}
CONFIG = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "g": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "channel", "group_size": None},
                "input_activations": {"num_bits": 8, "dynamic": False},
            }
        },
    }
}
CHECKPOINTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (STATE, MODELOPT),
    (STATE, {}),
    (PACKED, CONFIG),
    (PACKED, {}),
]
VALUES = st.sampled_from([None, 0, 1, -1, 3, 4, 8, 64, "x", [], {}, [1, 2], {"a": 1}, (4, 3), True, 0.5])
SHAPES = st.lists(st.integers(0, 5), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something lies in nested dicts and lists."""
    items: Any = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [step for key, value in items for step in ((*path, key), *paths(value, (*path, key)))]


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """`tree` with `value` at `path`."""
    if not path:
        return value
    changed = list(tree) if isinstance(tree, tuple) else copy.copy(tree)
    changed[path[0]] = replaced(tree[path[0]], path[1:], value)
    return changed


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_a_damaged_checkpoint_is_an_error_in_words_or_is_taken(data: st.DataObject) -> None:
    state, metadata = map(dict[str, Any], data.draw(st.sampled_from(CHECKPOINTS)))
    for name in data.draw(st.lists(st.sampled_from(sorted(state)), max_size=2)):
        if data.draw(st.booleans()):
            state.pop(name, None)
            continue
        shape, dtype = data.draw(SHAPES), data.draw(DTYPES)
        filled: Tensor = torch.full(shape, data.draw(st.sampled_from([0.0, 1.0, 100.0]))).to(dtype)
        state[name] = -filled if dtype.is_signed and data.draw(st.booleans()) else filled
    for path in data.draw(st.lists(st.sampled_from(paths(metadata) or [("",)]), max_size=1 if metadata else 0)):
        metadata = replaced(metadata, path, data.draw(VALUES))
    hints = Hints(data.draw(st.booleans()), data.draw(st.sampled_from([None, 4])))
    taken, error = TakenScales({}), GpusqError("", hint="none")
    try:
        taken = take_scales(state, metadata, hints)
    except GpusqError as caught:
        error = caught
    assert "\n" not in error.message
    assert error.hint
    for place, quantizer in taken.quantizers.items():
        assert (quantizer.scale > 0).all()
        assert -128 <= quantizer.low < quantizer.high <= 127
        assert not quantizer.zero_point.any()
        if place.tensor == "weight":
            assert taken.state[str(place)].dtype == torch.float32
