"""Pack a bundle into one `.tar.zst` for the way to its device.

    NAME/manifest.json              first, so that a reader knows what may follow
    NAME/.gpusq/index.json          what was cut out of which file
    NAME/.gpusq/values/model.onnx   of its 2:4 weights, the two of four that are kept (deploy.sparse_layout)
    NAME/.gpusq/places/model.onnx   where those stand
    NAME/model.onnx                 the file without its 2:4 weights
    NAME/…                          every other file that the manifest names, as it is

The same bundle gives the same bytes, with the same release of zstd: members come in one order, without times, owners
and rights. Values and places are zstd frames of their own: so they compress best, and their size on the disk is known.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field

from deploy.bundle import staged_files
from deploy.finish import check_files
from deploy.manifest import FILE_NAME, MODEL_FILE, SIGNATURE_NAME, Manifest, read_manifest
from deploy.packed_weights import Cut, Piece, cut_bundle
from deploy.zstd import import_zstd
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1
SUFFIX = ".tar.zst"
INDEX = ".gpusq/index.json"
VALUES, PLACES = ".gpusq/values/", ".gpusq/places/"
LEVEL = 12
_FP32_BYTES = 4


class Index(Record):
    """`.gpusq/index.json`: the pieces that were cut out of each file."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    files: dict[str, tuple[Piece, ...]]


class Packed(Record):
    """What `gpusq pack` wrote; every figure is of bytes on the disk."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    archive: Path
    archive_bytes: int
    bundle_bytes: int = Field(description="Of the files in the bundle, the engines among them.")
    fp32_bytes: int = Field(description="Every parameter of the student in FP32.")
    pruned_weights: int = Field(description="Of model.onnx, that were stored by their 2:4 layout.")
    pruned_fp32_bytes: int = Field(description="Those weights in FP32.")
    pruned_bytes: int = Field(description="Those weights in the archive; their scales lie in the graph.")
    pruned_ratio: float | None = Field(description="FP32 to archive; None without such weights.")

    def to_text(self) -> str:
        """What was measured, for the terminal."""
        lines = [f"{self.archive}: {self.archive_bytes:,} bytes"]
        for what, size in (("the bundle's files", self.bundle_bytes), ("the student in FP32", self.fp32_bytes)):
            lines.append(f"  {what}: {size:,} bytes, {size / self.archive_bytes:.2f} times as many")
        if self.pruned_ratio is None:
            return "\n".join([*lines, "  no weight of model.onnx is 2:4"])
        told = f"{self.pruned_weights} 2:4 weights: {self.pruned_bytes:,} bytes for {self.pruned_fp32_bytes:,} in FP32"
        return "\n".join([*lines, f"  {told}, a ratio of {self.pruned_ratio:.2f} (measured)"])


def pack(bundle: str | Path, archive: str | Path | None = None, *, level: int = LEVEL) -> Packed:
    """Write the bundle in the folder `bundle` to `archive`, by default NAME.tar.zst here.

    Args:
        bundle: the folder.
        archive: the file; one that is there is replaced when the new one is whole.
        level: of zstd, 1 to 22.

    Raises:
        GpusqError: it is no bundle, a file in it was changed, or the archive cannot be written.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    target = Path(archive or bundle.resolve().name + SUFFIX)
    if target.is_dir():
        raise GpusqError(f"{target} is a folder", hint=f"give the file to write, such as -o bundle{SUFFIX}")
    cuts = cut_bundle(bundle, sorted(manifest.files))
    with staged_files(target) as staging:
        with staging.open("wb") as file:
            sizes = _write(file, bundle, manifest, cuts, level)
        total = staging.stat().st_size
    return _packed(target, total, manifest, cuts, sizes)


def _write(file: BinaryIO, bundle: Path, manifest: Manifest, cuts: dict[str, Cut], level: int) -> dict[str, int]:
    """Write the archive; return the bytes that each file's weights take in it."""
    name, sizes = bundle.resolve().name, {}
    with _Frames(file, level) as frames, tarfile.open(fileobj=frames, mode="w", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
        _add(tar, f"{name}/{FILE_NAME}", (bundle / FILE_NAME).read_bytes())
        if (bundle / SIGNATURE_NAME).is_file():
            _add(tar, f"{name}/{SIGNATURE_NAME}", (bundle / SIGNATURE_NAME).read_bytes())
        index = Index(files={path: cut.pieces for path, cut in sorted(cuts.items())})
        _add(tar, f"{name}/{INDEX}", index.model_dump_json(by_alias=True).encode())
        for path, cut in sorted(cuts.items()):
            frames.end()
            _add(tar, f"{name}/{VALUES}{path}", cut.values)
            sizes[path] = frames.end()
            _add(tar, f"{name}/{PLACES}{path}", cut.places)
            sizes[path] += frames.end()
        for path in sorted(manifest.files):
            _add(tar, f"{name}/{path}", cuts[path].rest if path in cuts else (bundle / path).read_bytes())
    return sizes


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner, rights 644
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


class _Frames:
    """A file for tarfile that compresses what is written, in frames that are ended on demand."""

    def __init__(self, file: BinaryIO, level: int) -> None:
        zstd = import_zstd()
        self._file, self._end = file, zstd.ZstdCompressor.FLUSH_FRAME
        options = {zstd.CompressionParameter.compression_level: level, zstd.CompressionParameter.checksum_flag: 1}
        self._compressor: Any = zstd.ZstdCompressor(options=options)
        self._written = self._plain = 0

    def __enter__(self) -> _Frames:
        return self

    def __exit__(self, *raised: object) -> None:
        self.end()

    def write(self, data: bytes) -> int:
        """Compress `data`."""
        self._plain += len(data)
        self._written += self._file.write(self._compressor.compress(data))
        return len(data)

    def end(self) -> int:
        """End the frame; return the bytes that it takes."""
        written = self._written + self._file.write(self._compressor.flush(self._end))
        self._written = 0
        return written

    def tell(self) -> int:
        """The bytes that were given."""
        return self._plain


def _packed(target: Path, total: int, manifest: Manifest, cuts: dict[str, Cut], sizes: dict[str, int]) -> Packed:
    pieces = cuts[MODEL_FILE].pieces if MODEL_FILE in cuts else ()
    fp32 = _FP32_BYTES * sum(piece.layout.elements for piece in pieces)
    return Packed(
        archive=target,
        archive_bytes=total,
        bundle_bytes=sum(entry.bytes for entry in manifest.files.values()),
        fp32_bytes=manifest.sizes.total_fp32,
        pruned_weights=len(pieces),
        pruned_fp32_bytes=fp32,
        pruned_bytes=sizes.get(MODEL_FILE, 0),
        pruned_ratio=fp32 / sizes[MODEL_FILE] if pieces else None,
    )


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive as they come."""
    while (member := tar.next()) is not None:
        yield member
