from __future__ import annotations

from pathlib import Path
from types import TracebackType

import onnx_ir as ir
import pytest

from deploy.tensorrt_api import ShapeRange, build_engine
from profiles.errors import GpusqError

pytest.importorskip("tensorrt_rtx", reason="these compile ahead of time")


def save(text: str, path: Path) -> Path:
    ir.save(ir.from_onnx_text(text), path)
    return path


def frames(traceback: TracebackType | None) -> list[str]:
    names = []
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    return names


def test_a_refusal_keeps_no_object_of_tensorrt_alive(tmp_path: Path) -> None:
    """Else they die when garbage is collected inside the next build's log call, and that build waits for ever."""
    path = save(
        '<ir_version: 11, opset_import: ["": 23]> g (float[N,4] x) => (float[N,4] y) { y = Bernoulli(x) }',
        tmp_path / "model.onnx",
    )
    with pytest.raises(GpusqError) as caught:
        build_engine(path, "tensorrt-rtx", compute_capability="SM80")
    own = frames(caught.value.__traceback__)[1:]
    assert own == ["build_engine"]
    assert caught.value.__cause__ is None
    context = caught.value.__context__
    assert context is None or context.__traceback__ is None


def test_axes_behind_the_first_have_their_usual_length_and_the_first_the_batch(tmp_path: Path) -> None:
    path = save(
        '<ir_version: 11, opset_import: ["": 23]> g (float[N,T,4] x) => (float[N,T,4] y) { y = Relu(x) }',
        tmp_path / "model.onnx",
    )
    built = build_engine(
        path, "tensorrt-rtx", compute_capability="SM80", batch=ShapeRange(1, 2, 3), usual={"x": (9, 5, 4)}
    )
    (said,) = (line for message in built.log for line in message.splitlines() if line.startswith(" Name: x, IOMode"))
    assert "MinShape: [1,5,4], OptShape: [2,5,4], MaxShape: [3,5,4]" in said
