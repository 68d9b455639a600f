from __future__ import annotations

import pytest

from deploy.progress import Progress, TerminalProgress, tell_all


def test_a_stage_is_one_line_on_stderr_and_its_text_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TerminalProgress()
    progress.found("surgery", "[bold]12 Q/DQ")
    with progress.working("building for [A100]") as advance:
        advance(0.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert "surgery" in err
    assert "[bold]12 Q/DQ" in err


def test_many_notes_are_counted_and_the_rest_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    progress = Told()
    with caplog.at_level("INFO", logger="deploy.progress"):
        tell_all(progress, "checkpoint", [f"mask of fc{index} folded" for index in range(7)])
    assert progress.said == [
        *(("checkpoint", f"mask of fc{index} folded") for index in range(5)),
        ("checkpoint", "and 2 more: all are in the report, and here with -v"),
    ]
    assert caplog.messages == ["checkpoint: mask of fc5 folded", "checkpoint: mask of fc6 folded"]


def test_a_few_notes_are_one_line_each() -> None:
    progress = Told()
    tell_all(progress, "checkpoint", ("mask of fc folded",))
    assert progress.said == [("checkpoint", "mask of fc folded")]


class Told(Progress):
    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def found(self, stage: str, text: str) -> None:
        self.said.append((stage, text))
