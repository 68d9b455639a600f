from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.exporters import accuracy_subjects, measure_accuracy
from tests.exporters.accuracy_subjects import SUBJECTS, UNKNOWN, Subject, missing, ridge
from tests.exporters.measure_accuracy import COLUMNS, MODELOPT, Judged, Share, by_modelopt, judge, lines, measure

TEXT = '<ir_version: 8, opset_import: ["": 17]> g (float[N,3] x) => (float[N,3] y) { y = Identity(x) }'
CALIBRATED = ["w8a8-linear", "w8a8-mha", "sparse-int8", "w4"]


@pytest.fixture(scope="module")
def student() -> Subject:
    return SUBJECTS["student"]()


def subject(labels: list[int], classes: bool = True) -> Subject:
    x = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    return Subject(
        "identity",
        ir.from_onnx_text(TEXT),
        {"x": x},
        {"x": x},
        lambda output, _: output,
        (lambda features: features) if classes else None,
        np.array(labels, np.int64) if labels else None,
    )


def test_wilsons_interval_as_published() -> None:
    """The example of Newcombe, Stat. Med. 17 (1998) 857, table I: 81 of 263."""
    assert Share(81, 263).interval == pytest.approx((25.53, 36.62), abs=0.01)
    assert Share(0, 20).interval == pytest.approx((0.0, 16.11), abs=0.01)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_share(pair: tuple[int, int]) -> None:
    share = Share(*pair)
    low, high = share.interval
    assert 0 <= low <= share.percent + 1e-9
    assert share.percent - 1e-9 <= high <= 100


def test_unknown_inputs_have_no_part_in_the_accuracy_but_in_the_agreement() -> None:
    reference = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    changed = reference[[0, 1, 2, 1]]  # the last input gets another class
    found = judge(subject([0, 2, 2, UNKNOWN]), changed, reference)
    assert found.top1 == Share(2, 3)
    assert found.same == Share(3, 4)
    assert (found.cosine, found.worst_cosine) == pytest.approx((0.75, 0.0))


def test_embeddings_have_a_cosine_alone() -> None:
    reference = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    assert judge(subject([], classes=False), 2 * reference, reference) == Judged(None, None, 1.0, 1.0)


def test_a_probe_finds_classes_that_are_linear_in_the_features() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((400, 8)), rng.standard_normal((8, 3))
    labels = (x @ w).argmax(axis=1)
    probe = ridge(x[:300], labels[:300], classes=3)
    assert (probe(x[300:]).argmax(axis=1) == labels[300:]).mean() > 0.9


def test_the_table_says_how_many_inputs_were_judged() -> None:
    row = subject([0, 1, 2, UNKNOWN])
    text = lines(row, {"fp32": judge(row, row.inputs["x"], row.inputs["x"])})
    assert "| identity | 4 | top-1 | 3 | 100.00 [43.9, 100.0] +0.00 |" in text
    assert "| identity | 4 | same class as fp32 | 4 | 100.00 [51.0, 100.0] |" in text
    assert "| identity | 4 | cosine to fp32 | 4 | 1.00000 (1.0000) |" in text


def test_sentences_are_the_same_each_time_and_none_is_there_twice() -> None:
    found = accuracy_subjects.sentences()
    assert len(found) == len(set(found))
    assert found == accuracy_subjects.sentences()  # drawn with a seed


@pytest.mark.parametrize("column", CALIBRATED)
def test_a_column_is_what_it_says(student: Subject, column: str, tmp_path: Path) -> None:
    COLUMNS[column](student, tmp_path / "model.onnx")
    graph = ir.load(tmp_path / "model.onnx").graph
    quantized = {node.op_type for node in graph}
    assert "DequantizeLinear" in quantized
    assert ("QuantizeLinear" in quantized) == (column != "w4")


def test_w8a8_keeps_the_students_accuracy(student: Subject) -> None:
    found = measure(student, ["fp32", "w8a8-linear"])
    float_, quantized = found["fp32"], found["w8a8-linear"]
    assert (float_.top1, float_.same) == (Share(912, 1000), Share(1000, 1000))
    assert quantized.same != float_.same  # it was quantized indeed
    assert quantized.top1 is not None
    assert quantized.top1.hits >= 907
    assert quantized.cosine >= 0.995


@pytest.mark.skipif(MODELOPT not in os.environ, reason=f"{MODELOPT} names no interpreter with nvidia-modelopt")
def test_w8a8_loses_no_more_than_modelopt_on_the_student(student: Subject, tmp_path: Path) -> None:
    by_modelopt(student, tmp_path / "model.onnx")
    assert "QuantizeLinear" in {node.op_type for node in ir.load(tmp_path / "model.onnx").graph}
    found = measure(student, ["w8a8-linear", "modelopt"])
    assert found["w8a8-linear"].cosine >= found["modelopt"].cosine


# The goal is 0.995 for each; what is below it is a gap that is open, and must not widen. On few inputs: the script
# takes them all.
@pytest.mark.parametrize(
    ("name", "reached"), [("dinov2", 0.995), ("efficientnet", 0.985), ("mobilenet", 0.93), ("minilm", 0.97)]
)
def test_w8a8_keeps_what_was_reached_of_a_real_models_answers(
    name: str, reached: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why := missing(name):
        pytest.skip(why)
    for fewer in ("_PROBE_TRAINED", "_PROBE_TESTED", "_UNLABELLED"):
        monkeypatch.setattr(accuracy_subjects, fewer, 48)
    found = measure(SUBJECTS[name](), ["w8a8-linear"])["w8a8-linear"]
    assert found.cosine >= reached


def test_the_script_leaves_out_modelopt_where_it_is_not(
    student: Subject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(accuracy_subjects.SUBJECTS, "student", lambda: student)  # exported once
    monkeypatch.delenv(MODELOPT, raising=False)
    monkeypatch.setattr("sys.argv", ["measure_accuracy.py", "--subjects", "student", "--columns", "fp32", "modelopt"])
    measure_accuracy.main()
    printed = capsys.readouterr()
    assert "modelopt" not in printed.out
    assert MODELOPT in printed.err
    assert "91.20 [89.3, 92.8] +0.00" in printed.out
