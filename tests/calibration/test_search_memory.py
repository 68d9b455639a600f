from __future__ import annotations

from pathlib import Path

from calibration.output_loss import Loss
from calibration.search_memory import SearchMemory


def test_what_was_kept_is_known_to_the_next(tmp_path: Path) -> None:
    first = SearchMemory(tmp_path / "new" / "s.jsonl")
    first.keep_units({"a": 1.0, "b": 2.0})
    first.keep(["b", "a"], 8, Loss(0.5, float("inf")))
    again = SearchMemory(tmp_path / "new" / "s.jsonl")
    assert again.units == {"a": 1.0, "b": 2.0}
    assert again.loss({"a", "b"}, 8) == Loss(0.5, float("inf"))
    assert again.loss({"a", "b"}, 9) is None


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    first = SearchMemory(file)
    first.keep(["a"], 8, Loss(1, 1))
    first.keep(["b"], 8, Loss(2, 2))
    file.write_text(file.read_text()[:-9])
    again = SearchMemory(file)
    assert (again.loss(["a"], 8), again.loss(["b"], 8)) == (Loss(1, 1), None)
    again.keep(["c"], 8, Loss(3, 3))
    assert SearchMemory(file).loss(["c"], 8) == Loss(3, 3)


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = SearchMemory(tmp_path / "file" / "s.jsonl")
    memory.keep(["a"], 8, Loss(1, 1))
    assert memory.loss(["a"], 8) == Loss(1, 1)
    assert memory.file is None
