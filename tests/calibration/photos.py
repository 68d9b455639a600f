"""Some 600 distinct photos out of two Debian packages, for the agreement of CNNs with their float32 selves.

| package | what | |
|---|---|---|
| tuxpaint-stamps-default | 404 photos with a caption, cut out and laid on white | accuracy_subjects.stamps |
| gcompris-qt-data | 255 whole photos: animals, fish, tools, buildings, music | in Qt resource files, read here |

A Qt resource file, version 1 to 3, is a tree of entries, names, and data: each piece of data is its length in 4 bytes
and that many bytes. Images lie in it as they are; an entry that is compressed is none.
"""

from __future__ import annotations

import importlib
import io
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.exporters.accuracy_subjects import IMAGENET, LITE, SEED, SUBJECTS, Array, Subject, photo, stamps

RESOURCES = Path("/usr/share/gcompris-qt/rcc")
SIDE = 224
_CALIBRATION = 64
_HEADER = struct.Struct(">4sIIII")  # magic, version, and where tree, data and names begin
_FOLDER, _COMPRESSED = 2, 1 | 4
_NODE_BYTES = {1: 14}
_NEWER_NODE_BYTES = 22
_PHOTOS = {
    "categorization": "resource/images/",
    "erase": "resource/",
    "explore_world_animals": "resource/animals/",
    "explore_farm_animals": "resource/animals/",
    "explore_monuments": "resource/",
    "explore_world_music": "resource/music/",
}
_NO_PHOTOS = ("/numbers/", "/alphabets/")
_CROP = 7 / 8  # of the shorter side, as ImageNet's validation does


def agreement(name: str, folder: Path = RESOURCES) -> Subject:
    """The row `name` of accuracy_subjects, a CNN, on all photos without a label; 64 that SEED draws calibrate it."""
    subject = SUBJECTS[name]()
    mean, std = (np.asarray(part, np.float32) for part in {"mobilenet": IMAGENET, "efficientnet": LITE}[name])
    whole = np.concatenate([photos(SIDE, folder), np.stack([photo(path, SIDE) for path, _ in stamps()])])
    drawn = np.random.default_rng(SEED).permutation(len(whole))
    ((input_name, _),) = subject.inputs.items()

    def pixels(of: npt.NDArray[np.int64]) -> dict[str, Array]:
        x = (whole[of] / np.float32(255) - mean) / std
        return {input_name: np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32)}

    given, asked = pixels(drawn[:_CALIBRATION]), pixels(drawn[_CALIBRATION:])
    return replace(subject, name=f"{subject.name}, photos", calibration=given, inputs=asked, labels=None)


def photos(side: int, folder: Path = RESOURCES) -> npt.NDArray[np.uint8]:
    """The photos of GCompris, the middle of each: uint8 [255, side, side, 3]."""
    return np.stack([_middle(data, side) for name in _PHOTOS for data in _images(folder / f"{name}.rcc", name)])


def _images(file: Path, activity: str) -> Iterator[bytes]:
    for path, data in sorted(_entries(file.read_bytes())):
        within = path.partition(f"/{activity}/")[2]
        if within.startswith(_PHOTOS[activity]) and path.endswith(".webp") and not any(no in path for no in _NO_PHOTOS):
            yield data


def _entries(stored: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file in a Qt resource file that is not compressed."""
    magic, version, tree, data, names = _HEADER.unpack_from(stored)
    assert magic == b"qres"
    size = _NODE_BYTES.get(version, _NEWER_NODE_BYTES)

    def walk(index: int, path: str) -> Iterator[tuple[str, bytes]]:
        name, flags, first, second = struct.unpack_from(">IHII", stored, tree + index * size)
        (length,) = struct.unpack_from(">H", stored, names + name)
        path += "/" + stored[names + name + 6 : names + name + 6 + 2 * length].decode("utf-16-be") if index else ""
        if flags & _FOLDER:
            for child in range(second, second + first):
                yield from walk(child, path)
        elif not flags & _COMPRESSED:
            (length,) = struct.unpack_from(">I", stored, data + second)
            yield path, stored[data + second + 4 : data + second + 4 + length]

    return walk(0, "")


def _middle(data: bytes, side: int) -> npt.NDArray[np.uint8]:
    image = importlib.import_module("PIL.Image")
    whole = image.open(io.BytesIO(data)).convert("RGB")
    kept = round(min(whole.size) * _CROP)
    left, top = ((length - kept) // 2 for length in whole.size)
    return np.array(whole.crop((left, top, left + kept, top + kept)).resize((side, side), image.Resampling.BICUBIC))
