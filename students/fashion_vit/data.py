"""Fashion-MNIST from its four gzipped idx files, the fixed validation split, and augmentation on tensors.

The files are Debian's package `dataset-fashion-mnist`; the idx layout is the one of http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from profiles.errors import GpusqError

DEFAULT_ROOT = Path("/usr/share/datasets/fashion-mnist")
SCALE = 1 / 255
MEAN = 0.286
STD = 0.353
VALIDATION_SIZE = 5_000
SPLIT_SEED = 2_305_10727
SHIFT_PIXELS = 1


@dataclass(frozen=True)
class Images:
    """Pixels uint8 [N, 1, 28, 28] and labels int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Images:
        """The rows that `index` (int64 [M]) names."""
        return Images(self.pixels[index], self.labels[index])


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The uint8 array of one gzipped idx file; raises GpusqError where the file is missing or is no idx file."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise GpusqError(
            f"cannot read {path}: {error}",
            hint="install Debian's dataset-fashion-mnist, or name the folder of its .gz files with --dataset",
        ) from error
    rank = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank]) if len(raw) >= 4 + 4 * rank else ()
    if rank == 0 or len(raw) != 4 + 4 * rank + int(np.prod(shape)):
        raise GpusqError(f"{path} is not an idx file of uint8", hint="download the data set again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_split(part: str, root: Path = DEFAULT_ROOT) -> Images:
    """All images of `part`, "train" (60,000) or "t10k" (10,000), in the files' order."""
    pixels = read_idx(root / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(root / f"{part}-labels-idx1-ubyte.gz")
    return Images(torch.from_numpy(pixels.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def train_and_validation(root: Path = DEFAULT_ROOT) -> tuple[Images, Images]:
    """55,000 training and 5,000 validation images; the split is the same for every seed."""
    everything = read_split("train", root)
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(everything)))
    return everything.take(order[VALIDATION_SIZE:]), everything.take(order[:VALIDATION_SIZE])


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [N, 1, 28, 28] → float32 `(x * SCALE - MEAN) / STD`."""
    return (pixels.float() * SCALE - MEAN) / STD


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to SHIFT_PIXELS both ways and mirrored half of the time; uint8 in, uint8 out."""
    count, _, height, width = pixels.shape
    shift = torch.randint(0, 2 * SHIFT_PIXELS + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = shift[0] + torch.arange(height)
    columns = shift[1] + torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width))
    padded = torch.nn.functional.pad(pixels, [SHIFT_PIXELS] * 4)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
