from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from deploy.cli import main
from deploy.engine_fit import why_not_its_device
from deploy.environment import Gpu
from deploy.manifest import Manifest, read_manifest
from deploy.verify_bundle import verify_bundle
from profiles.device import load_device
from profiles.errors import GpusqError
from tests.deploy.packable import make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "student")
    return tmp_path / "student"


def rewrite(bundle: Path, **fields: object) -> None:
    known = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**known, **fields}))


def test_a_whole_bundle_is_told_with_its_engines(bundle: Path) -> None:
    found = verify_bundle(bundle)
    assert (found.profile, found.files, found.signature) == ("a100-sxm-80gb", 3, "none")
    (engine,) = found.engines
    assert not engine.fits
    assert "engine.sm80.rtx (tensorrt-rtx" in found.to_text()


@pytest.mark.parametrize("name", ["model.onnx", "engine.sm80.rtx", "logs/empty.log"])
def test_a_changed_or_missing_file_is_found(bundle: Path, name: str) -> None:
    with (bundle / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(GpusqError, match=f"{name} is not the file that the manifest names"):
        verify_bundle(bundle)
    (bundle / name).unlink()
    with pytest.raises(GpusqError, match=f"{name} is not the file that the manifest names"):
        verify_bundle(bundle)


def test_a_file_that_the_manifest_does_not_name_is_found(bundle: Path) -> None:
    (bundle / "engine.plan").write_bytes(b"foreign")
    with pytest.raises(GpusqError, match=r"engine\.plan is not in the manifest"):
        verify_bundle(bundle)


def test_an_engine_for_another_device_is_found(bundle: Path) -> None:
    engine = json.loads((bundle / "manifest.json").read_text())["engines"][0]
    rewrite(bundle, engines=[{**engine, "target": "SM120"}])
    with pytest.raises(GpusqError, match="it is for SM120, and a100-sxm-80gb takes SM80"):
        verify_bundle(bundle)


def test_an_engine_without_a_hash_is_found(bundle: Path) -> None:
    engine = json.loads((bundle / "manifest.json").read_text())["engines"][0]
    rewrite(bundle, engines=[{**engine, "file": "other.rtx"}])
    with pytest.raises(GpusqError, match="an engine without a hash"):
        verify_bundle(bundle)


def on_a_host_with(monkeypatch: pytest.MonkeyPatch, version: str | None, *gpus: Gpu) -> None:
    monkeypatch.setattr("deploy.engine._version", lambda runtime: version)
    monkeypatch.setattr("deploy.environment.gpus", lambda: gpus)


A100 = Gpu("NVIDIA A100-SXM4-80GB", "8.0", "580.1")


@pytest.mark.parametrize(
    ("version", "gpus", "words"),
    [
        ("same", (A100,), "fits this host"),
        (None, (A100,), "tensorrt-rtx is not installed"),
        ("1.6.0", (A100,), "and here is 1.6.0"),
        ("same", (), "not for this host: it has no NVIDIA GPU"),
        ("same", (Gpu("NVIDIA L4", "8.9", "580.1"),), "it is for SM80, and NVIDIA L4 is SM89"),
    ],
)
def test_says_whether_an_engine_fits_this_host(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, gpus: tuple[Gpu, ...], words: str
) -> None:
    (engine,) = read_manifest(bundle).engines
    on_a_host_with(monkeypatch, engine.runtime_version if version == "same" else version, *gpus)
    assert words in verify_bundle(bundle).to_text()


def test_a_processors_engine_is_none_for_a_gpu(bundle: Path) -> None:
    (engine,) = read_manifest(bundle).engines
    onnx = engine.model_copy(update={"runtime": "onnxruntime", "target": "cpu"})
    assert why_not_its_device(onnx, load_device("cpu")) == ""
    assert "is a GPU" in why_not_its_device(onnx, load_device("a100"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys as OpenSSL makes them: two Ed25519 pairs, and an RSA one."""
    pytest.importorskip("cryptography")
    folder = tmp_path_factory.mktemp("keys")
    for name, algorithm in (("mine", "ed25519"), ("other", "ed25519"), ("rsa", "rsa")):
        key, public = str(folder / f"{name}.pem"), str(folder / f"{name}.pub")
        for command in (
            ["genpkey", "-algorithm", algorithm, "-out", key],
            ["pkey", "-in", key, "-pubout", "-out", public],
        ):
            subprocess.run(["openssl", *command], check=True, capture_output=True)
    return folder


def gpusq(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_a_signature_is_the_owners_and_openssl_agrees(bundle: Path, keys: Path) -> None:
    assert gpusq("sign", bundle, "--key", keys / "mine.pem")[0] == 0
    code, said = gpusq("verify-bundle", bundle, "--public-key", keys / "mine.pub")
    assert (code, "signature: of the key in" in said) == (0, True)
    assert "there, not checked" in gpusq("verify-bundle", bundle)[1]
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", str(keys / "mine.pub")]
    files = ["-in", str(bundle / "manifest.json"), "-sigfile", str(bundle / "manifest.json.sig")]
    subprocess.run([*command, *files], check=True, capture_output=True)


def test_anothers_signature_and_a_changed_manifest_are_refused(bundle: Path, keys: Path) -> None:
    gpusq("sign", bundle, "--key", keys / "mine.pem")
    code, said = gpusq("verify-bundle", bundle, "--public-key", keys / "other.pub")
    assert (code, "was not signed by the key in" in said) == (1, True)
    rewrite(bundle, precision="fp32")
    code, said = gpusq("verify-bundle", bundle, "--public-key", keys / "mine.pub")
    assert (code, "or was changed since" in said) == (1, True)


def test_a_missing_signature_and_a_wrong_key_are_refused(bundle: Path, keys: Path) -> None:
    assert "is not signed" in gpusq("verify-bundle", bundle, "--public-key", keys / "mine.pub")[1]
    for key in ("rsa.pem", "mine.pub"):
        assert "is no private Ed25519 key" in gpusq("sign", bundle, "--key", keys / key)[1]
    for key in ("rsa.pub", "mine.pem"):
        assert "is no public Ed25519 key" in gpusq("verify-bundle", bundle, "--public-key", keys / key)[1]


def test_exits_with_3_where_an_engine_was_asked_for_and_none_fits(bundle: Path) -> None:
    assert gpusq("verify-bundle", bundle, "--runs-here")[0] == 3
    code, said = gpusq("verify-bundle", bundle, "--json")
    assert code == 0
    assert json.loads(said)["engines"][0]["fits"] is False


def test_the_manifest_of_the_fixture_is_one(bundle: Path) -> None:
    assert isinstance(read_manifest(bundle), Manifest)
