"""Against transformers' own tokenizers."""

from __future__ import annotations

import importlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.image_input import ModelFacts, SampleSource
from calibration.rows import all_of
from calibration.samples import InputSpec, Samples, SampleSpec, load_samples
from profiles.errors import GpusqError

TEXTS = ["A cat.", "The quick brown fox jumps over the lazy dog, as it often did.", "Zürich 東京 😀", "one two three"]


def ids(*length: int) -> InputSpec:
    return InputSpec(length, "int64") if length else SampleSpec((1,), "int64", dynamic=(0,))


BERT = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM's tokenizer as its package has it; its file pads to 128 by itself."""
    package = importlib.util.find_spec("all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(package.origin).parent / "model.zip") as archive:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            archive.extract(name, folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer as GPT-2 has it, without a pad token, saved by transformers."""
    tokenizers = importlib.import_module("tokenizers")
    transformers = importlib.import_module("transformers")
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    folder = tmp_path_factory.mktemp("decoder")
    transformers.PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


def lines(path: Path, *objects: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(one) for one in objects), encoding="utf-8")
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return lines(tmp_path / "texts.jsonl", *({"text": text} for text in TEXTS))


def loaded(path: Path, specs: dict[str, InputSpec], tokenizer: Path, **given: Any) -> Samples:
    return load_samples(SampleSource(str(path), tokenizer=tokenizer, **given), specs)


@pytest.mark.parametrize("length", [8, 16, 40])
@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_are_those_of_transformers(texts: Path, minilm: Path, tmp_path: Path, length: int, side: str) -> None:
    transformers = importlib.import_module("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(minilm, padding_side=side)
    theirs.save_pretrained(tmp_path / "saved")
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    found = loaded(texts, {name: ids(length) for name in BERT}, tmp_path / "saved").inputs
    for name in BERT:
        assert np.array_equal(all_of(found[name]), expected[name]), name


def test_a_length_that_varies_is_that_of_the_longest_text(texts: Path, minilm: Path) -> None:
    transformers = importlib.import_module("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)(TEXTS, padding="longest", return_tensors="np")
    found = loaded(texts, {name: ids() for name in BERT}, minilm)
    assert np.array_equal(all_of(found.inputs["input_ids"]), theirs["input_ids"])
    assert not any("cut" in note for note in found.notes)


def test_pairs_of_texts(tmp_path: Path, minilm: Path) -> None:
    transformers = importlib.import_module("transformers")
    path = lines(tmp_path / "pairs.jsonl", {"text": TEXTS[0], "text_pair": TEXTS[1]})
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)(TEXTS[0], TEXTS[1], return_tensors="np")
    found = loaded(path, {name: ids() for name in BERT}, minilm).inputs
    for name in BERT:
        assert np.array_equal(all_of(found[name]), theirs[name]), name


def test_a_decoder_gets_positions_and_an_empty_cache(texts: Path, decoder: Path) -> None:
    transformers = importlib.import_module("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(decoder, pad_token="<|end|>")
    expected = theirs(TEXTS, padding="longest", return_tensors="np")
    names = ("input_ids", "attention_mask", "position_ids")
    cache = SampleSpec((3, 16, 8), "float32", dynamic=(1,))
    found = loaded(texts, {**{name: ids() for name in names}, "past_key_values.0.key": cache}, decoder).inputs
    for name in names[:2]:
        assert np.array_equal(all_of(found[name]), expected[name]), name
    for row, mask in zip(all_of(found["position_ids"]), expected["attention_mask"], strict=True):
        assert row[mask == 1].tolist() == list(range(int(mask.sum())))
    assert found["past_key_values.0.key"].shape == (4, 3, 0, 8)


def test_a_cache_of_fixed_length_is_masked(texts: Path, decoder: Path) -> None:
    specs = {"input_ids": ids(8), "attention_mask": ids(13), "past_key_values.0.key": InputSpec((3, 5, 8), "float32")}
    found = loaded(texts, specs, decoder).inputs
    assert not all_of(found["attention_mask"])[:, :5].any()
    assert all_of(found["past_key_values.0.key"]).shape == (4, 3, 5, 8)


def test_what_is_cut_or_padded_without_a_mask_is_told(texts: Path, minilm: Path) -> None:
    notes = loaded(texts, {"input_ids": ids(8)}, minilm).notes
    assert "1 of 4 texts are longer than 8 tokens and were cut" in notes
    assert "3 of 4 texts are padded to 8 tokens, and the model takes no mask" in notes


def test_the_hash_of_a_text_does_not_depend_on_the_tokenizer(texts: Path, minilm: Path, decoder: Path) -> None:
    assert loaded(texts, {"input_ids": ids()}, minilm).sha256 == loaded(texts, {"input_ids": ids()}, decoder).sha256


def test_the_models_own_tokenizer_is_found(texts: Path, minilm: Path) -> None:
    assert len(load_samples(texts, {"input_ids": ids()}, ModelFacts(tokenizer=minilm))) == 4


def test_inputs_may_stand_in_the_lines(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"x": [[1, 2]], "label": 3}, {"x": [[0.5, 4]], "label": 1})
    samples = load_samples(path, {"x": InputSpec((1, 2), "float32")})
    assert all_of(samples.inputs["x"]).tolist() == [[[1, 2]], [[0.5, 4]]]
    assert samples.labels is not None
    assert samples.labels.tolist() == [3, 1]
    assert [member.name for member in samples.members] == ["a.jsonl:1", "a.jsonl:2"]


X = {"x": InputSpec((2,), "float32")}


@pytest.mark.parametrize(
    ("content", "specs", "message"),
    [
        ('{"text": "a"}\n{"text": ', {"input_ids": ids()}, "line 2: "),
        ('{"text": "a"}\n[1]', {"input_ids": ids()}, "line 2 is no JSON object"),
        ('{"text": "a"}\n{"text": "  "}', {"input_ids": ids()}, "line 2 has no text"),
        ('{"text": "a"}', X, "none of them takes a text's tokens"),
        ('{"text": "a"}', {"input_ids": ids(), **X}, "nothing tells how the input 'x' is made of a text"),
        ('{"y": 1}', X, "line 1 has no 'x' \\(it has y\\)"),
        ('{"x": [1, [2]]}', X, "'x' is ragged"),
        ('{"x": ["a", "b"]}', X, "'x' holds no numbers"),
        ('{"x": [1, NaN]}', X, "'x' holds NaN or infinity"),
        ('{"x": [1, 2, 3]}', X, "'x' is 1×3, the model takes N×2"),
        ('{"x": [1.5]}', {"x": InputSpec((1,), "int64")}, "'x' is float64"),
        ('{"x": [1]}\n{"x": [1, 2]}', {"x": ids()}, "differs in length from line to line"),
        ('{"x": [1, 2], "label": 1}\n{"x": [1, 2]}', X, "line 2 has no integer 'label'"),
        ("{}\n", {"input_ids": ids()}, "line 1 has no 'input_ids' \\(it has nothing\\)"),
    ],
)
def test_lines_that_do_not_do_are_an_error(
    tmp_path: Path, minilm: Path, content: str, specs: dict[str, InputSpec], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(GpusqError, match=message) as caught:
        loaded(tmp_path / "a.jsonl", specs, minilm)
    assert caught.value.hint


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_tokenizer_that_is_missing_or_damaged_is_an_error(tmp_path: Path, texts: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(GpusqError, match=r"tokenizer\.json") as caught:
        loaded(texts, {"input_ids": ids()}, tmp_path)
    assert caught.value.hint
