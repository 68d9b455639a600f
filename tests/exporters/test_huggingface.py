from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from exporters.architecture import Architecture, build_architecture
from exporters.huggingface import architecture_from_state
from exporters.signature import Input
from exporters.tensors import read_tensors
from profiles.errors import GpusqError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = SMALL | {"vocab_size": 50, "max_position_embeddings": 64}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
WHISPER = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 20,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
CLIP = {
    "text_config": TEXT, "vision_config": SMALL | {"image_size": 32, "patch_size": 16}, "projection_dim": 16,
}  # fmt: skip
BODY = ["last_hidden_state", "pooler_output"]
DISTILBERT = {"vocab_size": 50, "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2}
LLAMA = TEXT | {"num_key_value_heads": 1}


def loaded(directory: Path, part: str = "") -> Architecture:
    """The model in `directory` with its weights."""
    return architecture_from_state(directory, read_tensors(directory).state, part)


def folder(path: Path, name: str, config: dict[str, Any], *, weights: bool = True) -> Any:
    """Save a small model with random weights as transformers does, and return it."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).eval()
    if weights:
        model.save_pretrained(path)
    else:
        model.config.architectures = [name]
        model.config.save_pretrained(path)
    return model


def answers(built: Architecture, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """The outputs by name for random inputs."""
    torch.manual_seed(seed)
    assert built.outputs is not None
    with torch.no_grad():
        return dict(zip(built.outputs, built.module(*map(example, built.inputs)), strict=True))


def example(spec: Input) -> torch.Tensor:
    if "mask" in spec.name:
        return torch.ones(spec.shape, dtype=torch.int64)
    if spec.name == "token_type_ids":
        return torch.zeros(spec.shape, dtype=torch.int64)
    if spec.name == "position_ids":
        return torch.arange(16, 32)[None]
    return torch.randint(3, 50, spec.shape) if spec.dtype == "int64" else torch.randn(spec.shape)


@pytest.mark.parametrize(
    ("name", "config", "inputs", "outputs"),
    [
        ("ViTForImageClassification", SMALL | {"image_size": 32, "patch_size": 16}, ["pixel_values"], ["logits"]),
        ("ViTModel", SMALL | {"image_size": 32, "patch_size": 16}, ["pixel_values"], BODY),
        ("BertModel", TEXT, ["input_ids", "attention_mask", "token_type_ids"], BODY),
        ("DistilBertForSequenceClassification", DISTILBERT,
         ["input_ids", "attention_mask"], ["logits"]),
    ],
)  # fmt: skip
def test_takes_its_main_inputs_and_returns_what_its_head_does(
    tmp_path: Path, name: str, config: dict[str, Any], inputs: list[str], outputs: list[str]
) -> None:
    folder(tmp_path, name, config, weights=False)
    built = build_architecture(f"hf:{tmp_path}")
    assert [one.name for one in built.inputs] == inputs
    assert list(answers(built)) == outputs


def test_the_state_dict_loads_into_the_weights_module_and_gives_the_same_numbers(tmp_path: Path) -> None:
    model = folder(tmp_path, "BertModel", TEXT)
    built = build_architecture(f"hf:{tmp_path}")
    built.weights_module.load_state_dict(model.state_dict())
    whole = loaded(tmp_path)
    for name, value in answers(built).items():
        assert (value - answers(whole)[name]).abs().max() <= 1e-6 * value.abs().max()


def test_keywords_change_the_config(tmp_path: Path) -> None:
    folder(tmp_path, "BertForSequenceClassification", TEXT, weights=False)
    assert answers(build_architecture(f"hf:{tmp_path}?num_labels=7"))["logits"].shape == (1, 7)


@pytest.mark.parametrize(
    ("stored", "size"),
    [
        ({"size": {"height": 48, "width": 64}}, (48, 64)),
        ({"do_center_crop": True, "crop_size": 64, "size": {"shortest_edge": 80}}, (64, 64)),
        ({"size": {"shortest_edge": 80}}, (32, 32)),
    ],
)
def test_the_preprocessor_tells_the_size_of_images_before_the_config_does(
    tmp_path: Path, stored: dict[str, Any], size: tuple[int, int]
) -> None:
    folder(
        tmp_path,
        "ConvNextModel",
        {"image_size": 32, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
        weights=False,
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    assert build_architecture(f"hf:{tmp_path}").inputs[0].shape == (1, 3, *size)


def test_a_decoder_with_its_cache_continues_as_the_model_does_without(tmp_path: Path) -> None:
    model = folder(tmp_path, "LlamaForCausalLM", LLAMA)
    built = loaded(tmp_path)
    tokens = torch.randint(0, 50, (1, 32))
    with torch.no_grad():
        expected = model(tokens).logits[:, 16:]
        layers = model(tokens[:, :16], use_cache=True).past_key_values.layers
        past = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        mask, positions = torch.ones(1, 32, dtype=torch.int64), torch.arange(16, 32)[None]
        logits, *present = built.module(tokens[:, 16:], mask, positions, *past)
    assert built.outputs is not None
    assert [one.name for one in built.inputs[3:5]] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert built.outputs[:3] == ("logits", "present.0.key", "present.0.value")
    assert [tuple(tensor.shape) for tensor in present] == [(1, 1, 32, 16)] * 4
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "config", "part", "inputs", "shapes"),
    [
        ("T5ForConditionalGeneration", T5, "encoder", ["input_ids", "attention_mask"],
         {"last_hidden_state": (1, 16, 32)}),
        ("T5ForConditionalGeneration", T5, "decoder",
         ["decoder_input_ids", "encoder_hidden_states", "encoder_attention_mask"], {"logits": (1, 16, 50)}),
        ("WhisperForConditionalGeneration", WHISPER, "encoder", ["input_features"], {"last_hidden_state": (1, 20, 32)}),
        ("WhisperForConditionalGeneration", WHISPER, "decoder", ["decoder_input_ids", "encoder_hidden_states"],
         {"logits": (1, 16, 50)}),
        ("CLIPModel", CLIP, "text", ["input_ids", "attention_mask"], {"text_embeds": (1, 16)}),
        ("CLIPModel", CLIP, "vision", ["pixel_values"], {"image_embeds": (1, 16)}),
    ],
)  # fmt: skip
def test_each_network_of_a_folder_is_one_part(
    tmp_path: Path, name: str, config: dict[str, Any], part: str, inputs: list[str], shapes: dict[str, tuple[int, ...]]
) -> None:
    folder(tmp_path, name, config, weights=False)
    built = build_architecture(f"hf:{tmp_path}#{part}")
    assert [one.name for one in built.inputs] == inputs
    assert {name: tuple(value.shape) for name, value in answers(built).items()} == shapes


def test_encoder_and_decoder_together_answer_as_the_whole_does(tmp_path: Path) -> None:
    model = folder(tmp_path, "T5ForConditionalGeneration", T5)
    encoder, decoder = (loaded(tmp_path, part).module for part in ("encoder", "decoder"))
    tokens, started, mask = torch.randint(2, 50, (1, 16)), torch.randint(2, 50, (1, 16)), torch.ones(1, 16)
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=started).logits
        (logits,) = decoder(started, *encoder(tokens, mask), mask)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "config", "part", "message", "hint"),
    [
        ("T5ForConditionalGeneration", T5, "", "holds 2 networks", "#encoder or #decoder"),
        ("CLIPModel", CLIP, "#encoder", "CLIPModel has no part 'encoder'", "#text or #vision"),
        ("BertModel", TEXT, "#encoder", "BertModel has no part 'encoder'", "leave out what follows '#'"),
        ("ResNetModel", {"hidden_sizes": [8], "depths": [1]}, "", "nothing tells what ResNetModel takes", "--input"),
    ],
)
def test_what_the_spec_does_not_settle_is_a_clear_error(
    tmp_path: Path, name: str, config: dict[str, Any], part: str, message: str, hint: str
) -> None:
    folder(tmp_path, name, config, weights=False)
    with pytest.raises(GpusqError, match=re.escape(message)) as caught:
        build_architecture(f"hf:{tmp_path}{part}")
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "holds no config.json"),
        ({"model_type": "vitt"}, "describes no model that transformers knows"),
        ({"model_type": "vit"}, "names no architectures"),
        ({"model_type": "vit", "architectures": ["ViTForMyself"]}, "names architectures = ['ViTForMyself']"),
    ],
)
def test_a_folder_that_describes_no_model_is_a_clear_error(
    tmp_path: Path, config: dict[str, Any] | None, message: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GpusqError, match=re.escape(message)):
        build_architecture(f"hf:{tmp_path}")


def test_code_that_a_folder_brings_along_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(GpusqError, match="transformers knows") as caught:
        build_architecture(f"hf:{tmp_path}")
    assert "is not run" in caught.value.hint


def test_missing_weights_are_a_clear_error(tmp_path: Path) -> None:
    folder(tmp_path, "BertModel", TEXT, weights=False)
    with pytest.raises(GpusqError, match=r"holds no weights|no weights"):
        loaded(tmp_path)
