"""Every command in the README and in docs/ is run, or is one that another test or CI runs."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from students.fashion_vit.sample import labelled_images, student_path, teacher_path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

# What cannot be run from within a test, and where it runs instead.
ELSEWHERE = {
    "make demo": "its command, `gpusq demo`, is run by tests/deploy",
    "make test": "it is running",
    "make lint": ".ci/run runs it",
    ".ci/run": "CI runs it",
    "sha256sum model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json"
    " | sha256sum": "tests/deploy/test_bundle.py compares with it",
    "gpusq verify measured/cpu --polygraphy": "tests/deploy/test_second_opinion.py, where Polygraphy is installed",
    "python -m students.fashion_vit train --seed 0": "half an hour; tests/students trains a smaller one",
}


def blocks(language: str) -> list[str]:
    found = [(page, match) for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [match["code"] for _, match in found if match["language"] == language]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    for name, path in (
        ("student.safetensors", student_path()),
        ("teacher.safetensors", teacher_path()),
        ("samples.npz", labelled_images()),
    ):
        (folder / name).symlink_to(path)
    _save_deit(folder / "deit.pth")
    _save_samples(folder)
    return folder


def _save_samples(folder: Path) -> None:
    """Photos and sentences, with a small BERT for them."""
    images = importlib.import_module("PIL.Image")
    (folder / "photos").mkdir()
    for level in range(10):
        images.new("RGB", (40, 30), (25 * level, 90, 9)).save(folder / "photos" / f"{level}.png")
    texts = ["A cat sat on the mat.", "Dogs bark."]
    (folder / "sentences.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    _save_bert(folder / "bert", texts)


def _save_bert(folder: Path, texts: list[str]) -> None:
    transformers, tokenizers = importlib.import_module("transformers"), importlib.import_module("tokenizers")
    tokenizer = tokenizers.BertWordPieceTokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=64, show_progress=False)
    transformers.BertTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)


def _save_deit(path: Path) -> None:
    import timm
    import torch

    torch.manual_seed(0)
    torch.save(timm.create_model("deit_tiny_patch16_224", num_classes=10).state_dict(), path)


# `gpusq` as it is installed, in a process whose torchvision finds its operators; tests/conftest.py says why.
LAUNCH = """
import sys
sys.path.insert(0, {root!r})
from tests.conftest import _operators
from deploy.cli import main
main()
"""


def test_every_command_of_the_pages_works(workplace: Path) -> None:
    commands = [line for code in blocks("bash") for line in code.replace("\\\n", " ").splitlines() if line.strip()]
    assert set(ELSEWHERE) <= set(commands)
    assert len(commands) >= 8
    for command in commands:
        if command in ELSEWHERE:
            continue
        program, *arguments = shlex.split(command)
        assert program == "gpusq", f"{command!r} is run by no test"
        done = subprocess.run(
            [sys.executable, "-c", LAUNCH.format(root=str(ROOT)), *arguments],
            cwd=workplace,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_every_python_example_of_the_pages_works(workplace: Path) -> None:
    examples = blocks("python")
    assert examples
    for code in examples:
        path = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, env=path)
        assert done.returncode == 0, f"{code}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:deploy|exporters|students|profiles|calibration|docs|tests)/[\w/.-]+)`", page.read_text()
    ):
        assert (ROOT / name).exists(), name
