"""TensorRT's timing cache needs a GPU; its module stands in here for what the code does with the file."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.timing_cache import default_folder, load_timing_cache, save_timing_cache, timing_cache_file

TENSORRT = SimpleNamespace(__name__="tensorrt")


class Config:
    """An IBuilderConfig that takes no cache that begins with `bad`."""

    def __init__(self) -> None:
        self.cache = b"none"

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.startswith(b"bad"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: self.cache + b"+timed")


def test_a_gpu_cuda_and_version_have_a_file_of_their_own(tmp_path: Path) -> None:
    names = {
        timing_cache_file(tmp_path, gpu=gpu, cuda=cuda, version=version).name
        for gpu in ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB")
        for cuda in ("12.9", "13.4")
        for version in ("10.16.1", "11.4.0")
    }
    assert len(names) == 8
    assert "nvidia-a100-sxm4-80gb-cuda-13-4-tensorrt-11-4-0.timing" in names


def test_what_was_timed_is_there_for_the_next_build(tmp_path: Path) -> None:
    file, first, second = tmp_path / "new" / "a.timing", Config(), Config()
    load_timing_cache(TENSORRT, first, file)
    assert first.cache == b""
    save_timing_cache(TENSORRT, first, file)
    load_timing_cache(TENSORRT, second, file)
    assert second.cache == b"+timed"
    assert list(file.parent.iterdir()) == [file]


def test_a_cache_that_tensorrt_refuses_is_made_anew_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, config = tmp_path / "a.timing", Config()
    file.write_bytes(b"bad")
    with caplog.at_level(logging.WARNING):
        load_timing_cache(TENSORRT, config, file)
    assert config.cache == b""
    assert "is of another device or version" in caplog.text


def test_a_folder_that_cannot_be_written_does_not_fail_the_build(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        save_timing_cache(TENSORRT, Config(), tmp_path / "file" / "a.timing")
    assert "cannot be written" in caplog.text


def test_tensorrt_rtx_keeps_none(tmp_path: Path) -> None:
    config, module = Config(), SimpleNamespace(__name__="tensorrt_rtx")
    load_timing_cache(module, config, tmp_path / "a.timing")
    save_timing_cache(module, config, tmp_path / "a.timing")
    assert config.cache == b"none"
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "gpusq" / "timing"
