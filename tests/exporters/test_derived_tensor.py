from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporters.derived_tensor import Array, derived_tensor, release

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)
F16, F32 = ir.DataType.FLOAT16, ir.DataType.FLOAT


def in_a_file(folder: Path) -> ir.ExternalTensor:
    VALUES.tofile(folder / "w.data")
    return ir.ExternalTensor("w.data", 0, 24, F32, shape=ir.Shape([2, 3]), name="w", base_dir=str(folder))


def is_mapped(folder: Path) -> bool:
    return str(folder / "w.data") in Path("/proc/self/maps").read_text()


def halved(array: Array) -> Array:
    return (array / 2).astype(np.float16)


def test_is_computed_each_time_it_is_read_and_unmaps_what_it_read(tmp_path: Path) -> None:
    tensor = derived_tensor([in_a_file(tmp_path)], halved, F16, [2, 3], "half")
    assert (tensor.dtype, tensor.shape, tensor.nbytes, tensor.name) == (F16, ir.Shape([2, 3]), 12, "half")
    for _ in range(2):
        assert tensor.numpy().tolist() == (VALUES / 2).tolist()
        assert not is_mapped(tmp_path)
    (VALUES + 2).tofile(tmp_path / "w.data")
    assert tensor.numpy().tolist() == (VALUES / 2 + 1).tolist()


def test_is_derived_from_what_is_derived(tmp_path: Path) -> None:
    half = derived_tensor([in_a_file(tmp_path)], halved, F16, [2, 3])
    both = derived_tensor([half, half], lambda *arrays: np.concatenate(arrays), F16, [4, 3])
    assert both.numpy().tolist() == [*(VALUES / 2).tolist()] * 2
    assert not is_mapped(tmp_path)


def test_an_array_that_is_part_of_the_file_keeps_it_mapped_until_it_is_gone(tmp_path: Path) -> None:
    turned = derived_tensor([in_a_file(tmp_path)], np.transpose, F32, [3, 2])
    array = turned.numpy()
    assert is_mapped(tmp_path)
    assert array.tolist() == VALUES.T.tolist()
    del array
    assert not is_mapped(tmp_path)


def test_a_released_tensor_is_mapped_again_when_it_is_read_again(tmp_path: Path) -> None:
    tensor = in_a_file(tmp_path)
    held = tensor.numpy()
    release(tensor)
    assert held.tolist() == tensor.numpy().tolist() == VALUES.tolist()
    del held
    release(tensor)
    assert not is_mapped(tmp_path)


def test_there_is_nothing_to_release_of_other_tensors() -> None:
    tensor = ir.tensor(VALUES)
    release(tensor)
    release(None)
    assert tensor.numpy() is VALUES
