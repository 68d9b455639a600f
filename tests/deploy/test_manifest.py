"""A manifest of schema 1, as a release wrote it, is read by this code and by all that comes after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.manifest import SCHEMA, Manifest, read_manifest
from profiles.errors import GpusqError

KEPT = sorted((Path(__file__).parent / "data").glob("manifest-*.json"))


def placed(tmp_path: Path, text: str) -> Path:
    (tmp_path / "manifest.json").write_text(text)
    return tmp_path


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_kept_manifest_is_read(path: Path, tmp_path: Path) -> None:
    manifest = read_manifest(placed(tmp_path, path.read_text()))
    assert manifest.student.file == "small.safetensors"
    assert manifest.engines[0].file in manifest.files
    assert manifest.verified is not None
    assert len(manifest.layers) == 10
    assert (manifest.measured is not None) == (manifest.profile == "cpu")
    assert manifest.plan is not None
    assert manifest.plan.kernels


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_nothing_of_a_kept_manifest_is_lost_when_it_is_written_again(path: Path) -> None:
    def within(old: object, new: object, where: str) -> None:
        if isinstance(old, dict):
            assert isinstance(new, dict), where
            for key, value in old.items():
                within(value, new[key], f"{where}.{key}")
        elif isinstance(old, list):
            assert isinstance(new, list), where
            assert len(old) == len(new), where
            for index, (one, two) in enumerate(zip(old, new, strict=True)):
                within(one, two, f"{where}.{index}")
        else:
            assert old == new, where

    text = path.read_text()
    within(json.loads(text), json.loads(Manifest.model_validate_json(text).to_json()), "")


def test_every_schema_up_to_this_one_has_a_kept_manifest() -> None:
    assert {json.loads(path.read_text())["schema"] for path in KEPT} == set(range(1, SCHEMA + 1))


def test_a_newer_schema_is_refused_whatever_else_it_holds(tmp_path: Path) -> None:
    fields = {**json.loads(KEPT[0].read_text()), "schema": SCHEMA + 1, "of the future": 1}
    with pytest.raises(GpusqError, match=f"has schema {SCHEMA + 1}, this gpusq reads {SCHEMA}") as caught:
        read_manifest(placed(tmp_path, json.dumps(fields)))
    assert caught.value.hint == "update gpusq"


def test_a_key_that_this_schema_does_not_know_is_refused(tmp_path: Path) -> None:
    fields = {**json.loads(KEPT[0].read_text()), "profil": 1}
    with pytest.raises(GpusqError, match="profil: extra inputs"):
        read_manifest(placed(tmp_path, json.dumps(fields)))
