"""A folder of images, in it and below it, as samples; what is an image is told by its first bytes.

Names of sub-folders are not taken for labels: nothing says which number a class has. `labels.csv` in the folder says
it, one `file,label` a line, the file relative to the folder and the label an integer.

Every chosen image is decoded once before anything else is done, so that a damaged one is found early; then again
whenever its row is asked for. EXIF rotation is not applied, as timm's and torchvision's loaders do not either.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from calibration.image_input import ImageInput
from calibration.input_spec import InputSpec, fits
from calibration.preprocessing import MODES, Preprocessing
from calibration.rows import Array, Computed, Index
from calibration.selection import Choice, Member, Read
from profiles.errors import GpusqError

if TYPE_CHECKING:
    from PIL import Image

LABELS = "labels.csv"
_HEAD = 16
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6")
_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
_WIDE_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
_WORDS = {
    "RGB": "coloured",
    "L": "grey",
    "1": "black and white",
    "LA": "grey with an alpha channel",
    "RGBA": "with an alpha channel",
}


def is_image(path: Path) -> bool:
    """Whether `path` is an image by its first bytes, or says so by its ending."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    by_content = head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
    return by_content or path.suffix.lower() in _ENDINGS


def images_in(folder: Path) -> list[Path]:
    """The images in `folder` and below it, by name; hidden files and folders are left out."""
    return [path for path in sorted(_files(folder)) if is_image(path)]


def read_images(
    files: Sequence[Path],
    folder: Path,
    image_input: ImageInput,
    choice: Choice,
    progress: Callable[[float], None],
) -> Read:
    """Return the chosen ones of `files`, which lie in `folder`, as rows of `image_input`.

    Raises:
        GpusqError: Pillow is not installed, an image is damaged, or its steps give another shape than the input's.
    """
    name, wanted, how = image_input.name, image_input.spec, image_input.steps
    _need_pillow()
    shape = _fitting_shape(name, wanted, how)
    names = [file.relative_to(folder).as_posix() for file in files]
    index = choice.of(names)
    paths, used = [files[row] for row in index], [names[row] for row in index]
    labels = _labels(folder / LABELS, used)
    members, modes = [], Counter[str]()
    for number, path in enumerate(paths):
        member, mode = _inspect(path, used[number], how)
        members.append(member)
        modes[mode] += 1
        progress((number + 1) / len(paths))

    def compute(rows: Index) -> Array:
        return how(np.stack([_pixels(paths[row], how) for row in rows])).astype(wanted.dtype, copy=False)

    inputs = {name: Computed((len(paths), *shape), np.dtype(wanted.dtype), compute)}
    folders = any("/" in one for one in used) and labels is None
    notes = (f"images become inputs by {image_input.origin}", *_notes(modes, how, folders))
    return Read(inputs, tuple(members), len(files), labels, notes)


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path)
        elif path.is_file():
            yield path


def _need_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError:
        raise GpusqError("images need Pillow", hint="pip install 'gpusq[data]'") from None


def _fitting_shape(name: str, wanted: InputSpec, how: Preprocessing) -> tuple[int, ...]:
    """The shape of what `how` makes of an image."""
    size = how.output_size
    found = size and ((how.channels, *size) if how.layout == "NCHW" else (*size, how.channels))
    if found is None:
        raise GpusqError(
            "the preprocessing gives every image another size", hint="let it crop, or resize to height and width"
        )
    if not fits(found, wanted):
        has, takes = ("×".join(map(str, shape)) for shape in (found, wanted.shape))
        raise GpusqError(
            f"the preprocessing makes {has} of an image, and {name!r} takes {takes}",
            hint="change its crop, colours or layout, in a file given with --preprocessing",
        )
    return found


def _inspect(path: Path, name: str, how: Preprocessing) -> tuple[Member, str]:
    """The image's hash and its mode; a JPEG is decoded at an eighth of its size, which reads all of the file."""
    content = path.read_bytes()
    with _opened(path, content) as image:
        mode = image.mode
        if mode in _WIDE_MODES:
            raise GpusqError(f"{path} has more than 8 bits a pixel ({mode})", hint="store it with 8 bits a channel")
        image.draft(MODES[how.colours], (1, 1))
        _decode(path, image)
    return Member(name, hashlib.sha256(content).hexdigest()), mode


def _pixels(path: Path, how: Preprocessing) -> npt.NDArray[np.uint8]:
    with _opened(path, path.read_bytes()) as image:
        _decode(path, image)
        return how.pixels(image)


def _opened(path: Path, content: bytes) -> Image.Image:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(content))
    except ImportError:  # ultralytics, where it is loaded, makes Pillow look for a plugin for what it does not know
        raise _damaged(path, ValueError("cannot identify image file")) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _damaged(path, error) from None


def _decode(path: Path, image: Image.Image) -> None:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> GpusqError:
    reason = str(error).partition(" <")[0]
    return GpusqError(f"{path} is no whole image: {reason}", hint="copy it again, or remove it from the folder")


def _labels(path: Path, names: Sequence[str]) -> npt.NDArray[np.int64] | None:
    """The labels of the files `names`, int64 [N], where there is a list of them."""
    if not path.is_file():
        return None
    found: dict[str, int] = {}
    for number, line in enumerate(csv.reader(path.read_text(encoding="utf-8").splitlines()), start=1):
        if len(line) == 2 and line[1].strip().isdecimal():
            found[line[0].strip()] = int(line[1])
        elif line and number > 1:  # the first line may be a heading
            raise GpusqError(f"{path}, line {number}: {','.join(line)!r} is no label", hint="write FILE,INTEGER")
    if missing := [name for name in names if name not in found]:
        raise GpusqError(f"{path} has no label for {missing[0]}", hint="label every image, or remove the list")
    return np.array([found[name] for name in names], np.int64)


def _notes(modes: Counter[str], how: Preprocessing, folders: bool) -> Iterator[str]:
    total, target = sum(modes.values()), MODES[how.colours]
    for mode, count in sorted(modes.items()):
        if mode != target:
            made = "grey" if target == "L" else "RGB"
            yield f"{count} of {total} images are {_WORDS.get(mode, f'of mode {mode}')}: made {made}"
    if folders:
        yield f"the names of sub-folders are not taken for labels: {LABELS} would tell them"
