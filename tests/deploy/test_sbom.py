from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.bundle import hash_files
from deploy.finish import check_files, seal
from deploy.manifest import read_manifest
from deploy.sbom import FILE_NAME, require_library, sbom
from profiles.errors import GpusqError
from tests.deploy.packable import make_bundle

pytest.importorskip("cyclonedx")


def test_lists_the_student_every_file_and_every_package(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "student")
    parts = json.loads(sbom(manifest, manifest.files))
    assert (parts["bomFormat"], parts["specVersion"]) == ("CycloneDX", "1.6")
    by_name = {(part["type"], part["name"]): part for part in parts["components"]}
    assert by_name["machine-learning-model", "small.safetensors"]["hashes"][0]["content"] == manifest.student.sha256
    for name, entry in manifest.files.items():
        assert by_name["file", name]["hashes"] == [{"alg": "SHA-256", "content": entry.sha256}]
    assert by_name["library", "onnx"]["purl"] == f"pkg:pypi/onnx@{manifest.versions['onnx']}"
    assert len(by_name) == 1 + len(manifest.files) + len(manifest.versions)


def test_the_same_bundle_has_the_same_list_and_another_has_another(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "student")
    assert sbom(manifest, manifest.files) == sbom(manifest, dict(reversed(manifest.files.items())))
    fewer = {name: entry for name, entry in manifest.files.items() if name != "model.onnx"}
    assert (
        json.loads(sbom(manifest, fewer))["serialNumber"] != json.loads(sbom(manifest, manifest.files))["serialNumber"]
    )


def test_it_is_sealed_with_the_bundle_and_written_anew_with_it(tmp_path: Path) -> None:
    bundle = tmp_path / "student"
    sealed = seal(make_bundle(bundle), bundle, parts_list=True)
    assert FILE_NAME in sealed.files
    (bundle / "engine.new").write_bytes(b"built on the device")
    check_files(bundle, again := seal(sealed, bundle))
    assert again == read_manifest(bundle)
    listed = {
        part["name"] for part in json.loads((bundle / FILE_NAME).read_text())["components"] if part["type"] == "file"
    }
    assert listed == hash_files(bundle).keys() - {FILE_NAME}


def test_nothing_is_listed_unless_asked(tmp_path: Path) -> None:
    assert FILE_NAME not in seal(make_bundle(tmp_path / "student"), tmp_path / "student").files


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GpusqError, match="needs cyclonedx-python-lib"):
        require_library()
