from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file

from exporters.kinds import Kind, kind_of
from profiles.errors import GpusqError


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")


def _torchscript(path: Path) -> None:
    module = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))  # type: ignore[no-untyped-call]
    torch.jit.save(module, path)


def _pt2(path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, path.with_suffix(".pt2"))
    path.with_suffix(".pt2").rename(path)


def _onnx(path: Path) -> None:
    graph = onnx.parser.parse_graph("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    path.write_bytes(onnx.helper.make_model(graph, producer_name="p", doc_string="d").SerializeToString())


WRITERS: dict[Kind, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file({"w": torch.ones(2)}, path),
    "torch-zip": lambda path: torch.save({"w": torch.ones(2)}, path),
    "torch-legacy": lambda path: torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
    "torchscript": _torchscript,
    "pt2": _pt2,
    "onnx": _onnx,
    "pickle": lambda path: path.write_bytes(pickle.dumps({"w": 1})),
    "json": lambda path: path.write_text('{"a": 1}'),
    "sharded": lambda path: path.write_text('{"metadata": {}, "weight_map": {"w": "1.safetensors"}}'),
    "zip": _zip,
    "gguf": lambda path: path.write_bytes(b"GGUF\3\0\0\0"),
    "html": lambda path: path.write_text("\n<!DOCTYPE html><html>not found</html>"),
    "lfs-pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "empty": lambda path: path.touch(),
    "unknown": lambda path: path.write_bytes(b"\x08\x07 no model"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", WRITERS)
def test_the_content_tells_the_kind_whatever_the_ending(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.bin"
    WRITERS[kind](path)
    assert kind_of(path) == kind


def test_folders_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    assert kind_of(tmp_path) == "folder"
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "1.safetensors"}}')
    assert kind_of(tmp_path) == "sharded"
    (tmp_path / "config.json").write_text("{}")
    assert kind_of(tmp_path) == "hf-folder"


def test_a_torch_file_without_its_end_is_still_of_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    assert kind_of(path) == "torch-zip"


def test_a_missing_path_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="no file or folder"):
        kind_of(tmp_path / "absent.pt")


def test_torch_is_not_imported() -> None:
    code = "import sys; import exporters.kinds; print(json.dumps('torch' in sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    printed = subprocess.run(
        [sys.executable, "-c", "import json; " + code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(printed) is False
