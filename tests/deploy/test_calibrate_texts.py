"""Lines of text and a tokenizer calibrate a decoder, beside what transformers computes of the same texts."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from calibration.samples import SampleSource
from deploy.calibrate import calibrate
from deploy.surgery import operate

TEXTS = [f"{first} cats sat on {second} mats" for first in ("ten", "two", "six") for second in ("old", "new", "red")]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block with a tokenizer of bytes, so that texts of one length have as many tokens."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    tokenizers = importlib.import_module("tokenizers")
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([], vocab_size=257, special_tokens=["<|end|>"], show_progress=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=False, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    return path


def read_by_the_head(folder: Path) -> float:
    """The largest magnitude of what the language model's head reads, by transformers."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    seen: list[Any] = []
    model.model.norm.register_forward_hook(lambda module, given, output: seen.append(output))
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt")
    with torch.no_grad():
        model(tokens["input_ids"])
    return float(seen[0].abs().max())


def test_ranges_are_those_that_transformers_gives_on_the_texts(decoder: Path, texts: Path, tmp_path: Path) -> None:
    made = calibrate(decoder, tmp_path / "s.json", SampleSource(str(texts)), profile="cpu").scales
    assert made.samples.count == len(TEXTS)
    assert made.tensors[-1].amax == pytest.approx(read_by_the_head(decoder), rel=1e-5)
    done = operate(decoder, tmp_path / "d.onnx", profile="cpu", placement="w8a8-linear", scales=tmp_path / "s.json")
    constants = [value.const_value for value in ir.load(done.files[0]).graph.initializers.values()]
    scalars = {one.numpy().item() for one in constants if one is not None and one.size == 1}
    assert {float(np.float32(tensor.scale)) for tensor in made.tensors} <= scalars
