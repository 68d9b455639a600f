"""Write bundles so that a folder holds whole bundles or none.

Bundles are made in `OUT/.gpusq-staging` and take their places in one rename each when all are done. The folder is
locked while that goes on. Whatever ends the process, the next run finds the old bundles or the new ones, and clears
the rest:

    OUT/.gpusq-staging/…       half-made; deleted
    OUT/.gpusq-replaced-NAME   an old bundle on its way out; put back if NAME is missing, else deleted

The lock is the kernel's (flock on the folder itself), so a killed process leaves none behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.manifest import FILE_NAME, SIGNATURE_NAME, FileEntry, is_bundle
from exporters.parts import parts_of
from profiles.errors import GpusqError

PARTIAL = ".gpusq-partial"  # what a conversion that was cut off leaves for the next one
_STAGING = ".gpusq-staging"
_REPLACED = ".gpusq-replaced-"
_MENDABLE = {
    errno.ENOSPC: "there is no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a part of the path is a file",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOLCK: "the file system has no locks",
    errno.EOPNOTSUPP: "the file system has no locks",
}


@contextlib.contextmanager
def staged(out: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield an empty folder to make the bundles `names` in; on leaving, they take their places in `out`.

    If the block raises, `out` is as it was before, and is removed if it was made here.

    Raises:
        GpusqError: `out` holds something else, is being written to by another gpusq, or cannot be written.
    """
    with _made_and_locked(out):
        _refuse_foreign(out)
        with _staging(out) as staging:
            yield staging
            for name in names:
                _publish(staging / name, out / name)


@contextlib.contextmanager
def staged_files(file: Path) -> Iterator[Path]:
    """Yield a path to write `file` at; on leaving, it and what was written beside it take their places, `file` last.

    Raises:
        GpusqError: the folder cannot be written, or another gpusq is writing in it.
    """
    with _made_and_locked(file.parent), _staging(file.parent) as staging:
        yield staging / file.name
        for part in sorted(staging.iterdir(), key=lambda part: part.name == file.name):
            part.replace(file.parent / part.name)


@contextlib.contextmanager
def staged_copy(bundle: Path) -> Iterator[Path]:
    """Yield a copy of `bundle` to work on; on leaving, it takes the bundle's place, unless the block raised.

    Raises:
        GpusqError: another gpusq is writing beside it, or the disk cannot be written.
    """
    bundle = bundle.resolve()
    if bundle.is_mount():
        raise GpusqError(f"{bundle} is a mount point and cannot be replaced", hint="mount the folder that it lies in")
    with _locked(bundle.parent), _staging(bundle.parent) as staging:
        copy = staging / bundle.name
        shutil.copytree(bundle, copy)
        yield copy
        _publish(copy, bundle)


def hash_files(bundle: Path) -> dict[str, FileEntry]:
    """Return size and SHA-256 of every file in `bundle`, by its path within, without the manifest and its signature."""
    own = {bundle / FILE_NAME, bundle / SIGNATURE_NAME}
    files = sorted(path for path in bundle.rglob("*") if path.is_file() and path not in own)
    return {path.relative_to(bundle).as_posix(): hash_file(path) for path in files}


def hash_checkpoint(path: Path) -> str:
    """Return the SHA-256 of a checkpoint.

    That of the file, where it is one. Where it is several, that of their list as sha256sum writes it, sorted by name:
    of a folder's files, of an index JSON and the shards that it names, of an ONNX file and its external data. It is
    the same as of `sha256sum model.safetensors.index.json model-1.safetensors model-2.safetensors | sha256sum`.
    """
    if path.is_dir():
        entries = hash_files(path)
    elif len(names := parts_of(path)) > 1:
        entries = {name: hash_file(path.parent / name) for name in names}
    else:
        return hash_file(path).sha256
    listed = "".join(f"{entry.sha256}  {name}\n" for name, entry in entries.items())
    return hashlib.sha256(listed.encode()).hexdigest()


def hash_file(path: Path) -> FileEntry:
    """Return size and SHA-256 of one file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return FileEntry(sha256=digest.hexdigest(), bytes=path.stat().st_size)


@contextlib.contextmanager
def _made_and_locked(out: Path) -> Iterator[None]:
    """Make `out`, lock it, and remove in the end what was made here and stayed empty."""
    made = _make(out)
    with _locked(out):
        try:
            yield
        finally:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _make(out: Path) -> list[Path]:
    """Make `out` and its parents; return those that were missing, innermost first."""
    if out.is_symlink() and not out.exists():
        raise GpusqError(f"{out} is a link that leads nowhere", hint="give --out a folder")
    if out.exists() and not out.is_dir():
        raise GpusqError(f"{out} is a file", hint="give --out a folder")
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    with _disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    return missing


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    with _disk_errors(out):
        handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(out) from None
        if not out.exists() or os.fstat(handle).st_ino != out.stat().st_ino:
            raise _busy(out)
        yield
    finally:
        os.close(handle)


def _busy(out: Path) -> GpusqError:
    return GpusqError(f"another gpusq is writing to {out}", hint="wait until it is done, or choose another --out")


def _refuse_foreign(out: Path) -> None:
    for path in sorted(out.iterdir()):
        ours = path.name == _STAGING or path.name.startswith((_REPLACED, PARTIAL)) or is_bundle(path)
        if not ours:
            raise GpusqError(f"{out} holds something else: {path.name}", hint="give --out a new or an empty folder")


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Clear what a killed process left in `out`, and yield an empty folder that goes away in the end."""
    staging = out / _STAGING
    with _disk_errors(out):
        shutil.rmtree(staging, ignore_errors=True)
        for path in out.glob(f"{_REPLACED}*"):
            place = out / path.name.removeprefix(_REPLACED)
            if place.exists():
                shutil.rmtree(path)
            else:
                path.rename(place)
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _publish(bundle: Path, place: Path) -> None:
    replaced = place.with_name(f"{_REPLACED}{place.name}")
    try:
        if place.exists():
            place.rename(replaced)
        bundle.rename(place)
    except BaseException:
        if replaced.exists() and not place.exists():
            replaced.rename(place)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error that the user can mend."""
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(out)
        if error.errno not in _MENDABLE or elsewhere:
            raise
        hint = "make room, or choose another --out"
        raise GpusqError(f"cannot write to {out}: {_MENDABLE[error.errno]}", hint=hint) from error
