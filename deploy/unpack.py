"""Unpack what `gpusq pack` wrote, into a bundle that is the same, bit for bit.

An archive comes from elsewhere, so nothing in it is believed: a member must be a plain file below one folder that the
manifest, which comes first, names with its size; links, devices and other paths are refused. No more is decompressed
than the manifest allows, and the bundle takes its place only when every hash is right.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pydantic import ValidationError

from deploy.bundle import hash_file, staged
from deploy.manifest import FILE_NAME, SIGNATURE_NAME, Manifest, read_manifest
from deploy.pack import INDEX, PLACES, SCHEMA, VALUES, Index, members
from deploy.packed_weights import Cut, restore
from deploy.zstd import import_zstd
from profiles.errors import GpusqError

_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")
_HEAD_BYTES = 16 << 20  # of manifest, index and each header
_SIGNATURE_BYTES = 64
_ENTRY_BYTES = 4096  # of the headers of one member, at most


class _RefusedError(Exception):
    """Something in the archive is not what `gpusq pack` writes."""


def unpack(archive: str | Path, out: str | Path) -> Path:
    """Unpack `archive` into the folder `out` and return the bundle, `out/NAME`.

    Raises:
        GpusqError: it is no archive of `gpusq pack`, it is damaged, or the disk cannot take it.
    """
    archive, out = Path(archive), Path(out)
    zstd = import_zstd()
    with archive.open("rb") as raw:
        try:
            with zstd.ZstdFile(raw) as plain:
                return _unpack(_Limited(plain), out)
        except (_RefusedError, ValueError, tarfile.TarError, EOFError, zstd.ZstdError) as error:
            why = str(error) or type(error).__name__
            raise GpusqError(f"{archive} is no whole archive of gpusq pack: {why}", hint="copy it again") from error


def _unpack(plain: _Limited, out: Path) -> Path:
    with tarfile.open(fileobj=plain, mode="r|") as tar:  # type: ignore[call-overload]
        incoming = members(tar)
        first = next(incoming, None)
        if first is None or PurePosixPath(first.name).name != FILE_NAME:
            raise _RefusedError(f"it does not begin with {FILE_NAME}")
        name = first.name.removesuffix(f"/{FILE_NAME}")
        if not _NAME.fullmatch(name):
            raise _RefusedError(f"it has a folder called {name!r}")
        with staged(out, [name]) as staging:
            bundle = staging / name
            bundle.mkdir()
            (bundle / FILE_NAME).write_bytes(_read(tar, first, _HEAD_BYTES))
            manifest = read_manifest(bundle)
            plain.allow(manifest)
            reader = _Reader(tar, bundle, manifest)
            for member in incoming:
                reader.take(member)
            plain.drain()
            _check(bundle, manifest)
    return out / name


def _check(bundle: Path, manifest: Manifest) -> None:
    for path, entry in manifest.files.items():
        if not (bundle / path).is_file() or hash_file(bundle / path) != entry:
            raise _RefusedError(f"{path} is not the file that the manifest names")


class _Limited:
    """A stream that ends the reading where more comes than may."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._left = stream, 2 * _HEAD_BYTES

    def allow(self, manifest: Manifest) -> None:
        """Let the files of `manifest` through, with their headers."""
        total = sum(entry.bytes for entry in manifest.files.values())
        self._left = 2 * total + _ENTRY_BYTES * (2 * len(manifest.files) + 8) + 2 * _HEAD_BYTES

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        data: bytes = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise _RefusedError("more comes out of it than its manifest names")
        return data

    def drain(self) -> None:
        """Read to the end: what follows the last member tells whether the archive was cut."""
        while self.read(_ENTRY_BYTES):
            pass


class _Reader:
    """Takes the members of an archive behind its manifest, one by one."""

    def __init__(self, tar: tarfile.TarFile, bundle: Path, manifest: Manifest) -> None:
        self._tar, self._bundle, self._manifest = tar, bundle, manifest
        self._index = Index(files={})
        self._parts: dict[str, bytes] = {}

    def take(self, member: tarfile.TarInfo) -> None:
        """Write one member to the bundle, or keep it for the file that it belongs to."""
        path = member.name.removeprefix(f"{self._bundle.name}/")
        if path == SIGNATURE_NAME:
            self._write(path, _read(self._tar, member, _SIGNATURE_BYTES))
        elif path == INDEX:
            self._index = _parsed(_read(self._tar, member, _HEAD_BYTES))
        elif path.startswith((VALUES, PLACES)):
            file = path.removeprefix(VALUES).removeprefix(PLACES)
            self._parts[path] = _read(self._tar, member, self._known(file))
        else:
            content = _read(self._tar, member, self._known(path))
            if path in self._index.files:
                values, places = (self._parts.pop(folder + path, b"") for folder in (VALUES, PLACES))
                content = restore(Cut(content, values, places, self._index.files[path]))
            self._write(path, content)

    def _known(self, path: str) -> int:
        """The bytes of a file that the manifest names."""
        if path not in self._manifest.files or not _is_plain(path):
            raise _RefusedError(f"it holds {path!r}, which its manifest does not name")
        return self._manifest.files[path].bytes

    def _write(self, path: str, content: bytes) -> None:
        target = self._bundle / path
        if target.exists():
            raise _RefusedError(f"it holds {path!r} twice")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _is_plain(path: str) -> bool:
    """Whether a path stays below its folder: no root, no `..`, nothing that another system reads otherwise."""
    parts = path.split("/")
    return bool(path) and "\\" not in path and "\0" not in path and not {"", ".", ".."} & set(parts)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    if not member.isreg() or member.issparse():
        raise _RefusedError(f"{member.name!r} is not a plain file")
    if member.size > most:
        raise _RefusedError(f"{member.name!r} is larger than its manifest says")
    file: IO[bytes] | None = tar.extractfile(member)
    assert file is not None
    content = file.read()
    if len(content) != member.size:
        raise _RefusedError(f"{member.name!r} is cut short")
    return content


def _parsed(text: bytes) -> Index:
    try:
        index = Index.model_validate_json(text)
    except ValidationError:
        raise _RefusedError(f"{INDEX} cannot be read") from None
    if index.schema_version > SCHEMA:
        raise _RefusedError(f"{INDEX} has schema {index.schema_version}, this gpusq reads {SCHEMA}")
    return index
