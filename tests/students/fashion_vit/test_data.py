from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from profiles.errors import GpusqError
from students.fashion_vit.data import SHIFT_PIXELS, augment, normalise, read_idx


def write_idx(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_reads_what_was_written(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", array)
    assert np.array_equal(read_idx(tmp_path / "a.gz"), array)


def test_missing_file_tells_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="cannot read") as caught:
        read_idx(tmp_path / "nothing.gz")
    assert "dataset-fashion-mnist" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x0d\x01\0\0\0\x01abcd"])
def test_what_is_no_idx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    with pytest.raises(GpusqError, match="is not an idx file"):
        read_idx(tmp_path / "a.gz")


def test_truncated_gzip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(1000))[:-9])
    with pytest.raises(GpusqError, match="cannot read"):
        read_idx(tmp_path / "a.gz")


def test_normalises_to_the_documented_formula() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8)
    assert normalise(pixels).tolist() == pytest.approx([-0.286 / 0.353, (1 - 0.286) / 0.353])


def test_augmentation_only_shifts_and_mirrors() -> None:
    pixels = torch.zeros(200, 1, 28, 28, dtype=torch.uint8)
    pixels[:, 0, 10, 5] = 200
    moved = augment(pixels, torch.Generator().manual_seed(0))
    assert (moved.dtype, moved.shape) == (pixels.dtype, pixels.shape)
    _, _, rows, columns = torch.nonzero(moved, as_tuple=True)
    assert len(rows) == 200
    assert set(rows.tolist()) == set(range(10 - SHIFT_PIXELS, 11 + SHIFT_PIXELS))
    places = {c + d for c in (5, 22) for d in range(-SHIFT_PIXELS, SHIFT_PIXELS + 1)}
    assert set(columns.tolist()) == places
