"""The files of a checkpoint that is given as one of them: the shards of an index, the data of an ONNX file."""

from __future__ import annotations

from pathlib import Path

from exporters.kinds import INDEX_KEY, kind_of, read_json
from profiles.errors import GpusqError


def parts_of(file: Path) -> list[str]:
    """The names of `file` and of the files that it refers to, relative to its folder, sorted by code point.

    Raises:
        GpusqError: it refers to nothing sound.
    """
    kind = kind_of(file)
    if kind == "sharded":
        return sorted({file.name, *weight_map(file).values()})
    return sorted({file.name, *_external_data(file)}) if kind == "onnx" else [file.name]


def weight_map(index: Path) -> dict[str, str]:
    """The name of the shard of each tensor, as an index JSON tells it.

    Raises:
        GpusqError: it is no such index, or names a file that does not lie in its folder.
    """
    content = read_json(index)
    found = content.get(INDEX_KEY) if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise GpusqError(f"{index}: {INDEX_KEY!r} is no object with names", hint="copy or download all of it again")
    for name, shard in found.items():
        if not isinstance(shard, str) or not _is_inside(shard):
            raise GpusqError(
                f"{index}: tensor {name!r} lies in {shard!r}, which is no file beside the index",
                hint="an index names files in its own folder only",
            )
    return found


def _is_inside(shard: str) -> bool:
    parts = Path(shard).parts
    return bool(parts) and "\0" not in shard and not Path(shard).is_absolute() and ".." not in parts


def _external_data(file: Path) -> set[str]:
    from exporters.external_data import external_files
    from exporters.onnx_proto import parse_onnx

    return {part.relative_to(file.parent).as_posix() for part in external_files(file, parse_onnx(file))}
