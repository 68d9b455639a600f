from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deploy.bundle import hash_file, hash_files
from deploy.cli import main
from deploy.pack import Packed, pack
from deploy.packed_weights import cut_bundle, restore
from deploy.unpack import unpack
from profiles.errors import GpusqError
from tests.deploy.packable import make_bundle

zstd: Any = pytest.importorskip("backports.zstd")


@pytest.mark.parametrize("external", [False, True])
def test_unpacked_it_is_the_same_bit_for_bit(tmp_path: Path, external: bool) -> None:
    manifest = make_bundle(tmp_path / "student", external=external)
    (tmp_path / "student" / "manifest.json.sig").write_bytes(bytes(64))
    packed = pack(tmp_path / "student", tmp_path / "s.tar.zst")
    bundle = unpack(tmp_path / "s.tar.zst", tmp_path / "out")
    assert bundle == tmp_path / "out" / "student"
    assert hash_files(bundle) == manifest.files
    for name in ("manifest.json", "manifest.json.sig"):
        assert (bundle / name).read_bytes() == (tmp_path / "student" / name).read_bytes()
    assert packed.pruned_weights == (0 if external else 2)


def test_the_weights_take_at_most_the_papers_share(tmp_path: Path) -> None:
    make_bundle(tmp_path / "student")
    packed = pack(tmp_path / "student", tmp_path / "s.tar.zst")
    assert packed.pruned_fp32_bytes == 4 * 2 * 64 * 128
    assert packed.pruned_ratio == packed.pruned_fp32_bytes / packed.pruned_bytes >= 6.4
    assert packed.archive_bytes == (tmp_path / "s.tar.zst").stat().st_size > packed.pruned_bytes
    assert "a ratio of" in packed.to_text()


def test_the_shipped_student_is_packed_as_the_paper_counts(bundles: dict[str, Path], tmp_path: Path) -> None:
    packed = pack(bundles["a100"], tmp_path / "a100.tar.zst")
    assert packed.pruned_weights == 25
    assert packed.pruned_ratio is not None
    assert packed.pruned_ratio >= 6.4
    assert hash_files(unpack(tmp_path / "a100.tar.zst", tmp_path / "out")) == hash_files(bundles["a100"])


def test_the_same_bundle_gives_the_same_bytes_wherever_and_whenever_it_lies(tmp_path: Path) -> None:
    for place in ("one", "two"):
        make_bundle(tmp_path / place / "student")
        (tmp_path / place / "student" / "model.onnx").touch()
        pack(tmp_path / place / "student", tmp_path / place / "student.tar.zst")
    one, two = (tmp_path / place / "student.tar.zst" for place in ("one", "two"))
    assert hash_file(one) == hash_file(two)


def test_cuts_out_what_is_pruned_and_nothing_else(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "student", external=True)
    (file, cut), *more = cut_bundle(tmp_path / "student", sorted(manifest.files)).items()
    assert (file, more) == ("model.onnx.data", [])
    assert [piece.name for piece in cut.pieces] == ["w1", "w2"]
    assert restore(cut) == (tmp_path / "student" / file).read_bytes()
    assert len(cut.rest) == manifest.files[file].bytes - 2 * 64 * 128


def test_refuses_to_pack_a_bundle_with_a_changed_file(tmp_path: Path) -> None:
    make_bundle(tmp_path / "student")
    (tmp_path / "student" / "engine.sm80.rtx").write_bytes(b"another")
    with pytest.raises(GpusqError, match="is not the file that the manifest names"):
        pack(tmp_path / "student", tmp_path / "student.tar.zst")
    assert not (tmp_path / "student.tar.zst").exists()


def test_the_commands_print_what_they_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_bundle(tmp_path / "bundles" / "student")
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(main, ["pack", "bundles/student", "--json"])
    assert Packed.model_validate_json(shown.stdout).archive == Path("student.tar.zst")
    shown = CliRunner().invoke(main, ["unpack", "student.tar.zst", "--out", "out"])
    assert shown.stdout == "out/student\n"


Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "student")
    return pack(tmp_path / "student", tmp_path / "student.tar.zst").archive


def changed(archive: Path, change: Callable[[Members], None]) -> None:
    """Write the members of an archive again, changed."""
    with tarfile.open(fileobj=io.BytesIO(zstd.decompress(archive.read_bytes()))) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    change(members)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    archive.write_bytes(zstd.compress(plain.getvalue()))


def add(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Callable[[Members], None]:
    def change(members: Members) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        members.append((member, b""))

    return change


def drop(index: int) -> Callable[[Members], None]:
    return lambda members: members.__delitem__(index)


def grow(members: Members) -> None:
    members[-1] = (members[-1][0], members[-1][1] + b"x")


def swell(members: Members) -> None:
    members[1] = (members[1][0], bytes(17 << 20))


def replace(members: Members) -> None:
    members[-1] = (members[-1][0], bytes(len(members[-1][1])))


REFUSED: dict[str, tuple[Any, str]] = {
    "a path that leads out": (add("student/../../evil"), "does not name"),
    "an absolute path": (add("/etc/evil"), "does not name"),
    "another folder": (add("other/file"), "does not name"),
    "a symbolic link": (add("student/model.onnx", tarfile.SYMTYPE, "/etc/passwd"), "is not a plain file"),
    "a hard link": (add("student/model.onnx", tarfile.LNKTYPE, "/etc/passwd"), "is not a plain file"),
    "a device": (add("student/model.onnx", tarfile.CHRTYPE), "is not a plain file"),
    "a file twice": (add("student/engine.sm80.rtx"), "twice"),
    "no manifest": (drop(0), "does not begin with manifest.json"),
    "weights that are missing": (drop(2), "bytes are not those of"),
    "a file that is missing": (drop(-1), "is not the file that the manifest names"),
    "a file that is too long": (grow, "is not the file that the manifest names"),
    "an index that is too long": (swell, "larger than its manifest says"),
    "a file that was changed": (replace, "is not the file that the manifest names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_archive_from_elsewhere_is_not_believed(archive: Path, tmp_path: Path, case: str) -> None:
    change, words = REFUSED[case]
    changed(archive, change)
    with pytest.raises(GpusqError, match=words):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "C:\\x", ""])
def test_the_folder_has_a_plain_name(archive: Path, tmp_path: Path, name: str) -> None:
    def rename(members: Members) -> None:
        for member, _ in members:
            member.name = member.name.replace("student/", f"{name}/", 1)

    changed(archive, rename)
    with pytest.raises(GpusqError, match="no whole archive"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 3, 100, -40, -1])
def test_a_cut_archive_is_refused(archive: Path, tmp_path: Path, keep: int) -> None:
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(GpusqError, match="is no whole archive of gpusq pack") as caught:
        unpack(archive, tmp_path / "out")
    assert caught.value.hint == "copy it again"
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_is_found(archive: Path, tmp_path: Path) -> None:
    content = bytearray(archive.read_bytes())
    for place in range(10, len(content), len(content) // 7):
        flipped = content.copy()
        flipped[place] ^= 4
        archive.write_bytes(flipped)
        with pytest.raises(GpusqError):
            unpack(archive, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_bomb_is_not_blown_up(archive: Path, tmp_path: Path) -> None:
    def inflate(members: Members) -> None:
        member = tarfile.TarInfo("student/model.onnx")
        member.pax_headers = {"comment": "x" * (40 << 20)}
        members.insert(1, (member, b""))

    changed(archive, inflate)
    with pytest.raises(GpusqError, match="more comes out of it than its manifest names"):
        unpack(archive, tmp_path / "out")
