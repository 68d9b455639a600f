from __future__ import annotations

import pytest

from deploy.progress import TerminalProgress


def test_a_stage_is_one_line_on_stderr_and_its_text_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TerminalProgress()
    progress.found("surgery", "[bold]12 Q/DQ")
    with progress.working("building for [A100]") as advance:
        advance(0.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert "surgery" in err
    assert "[bold]12 Q/DQ" in err
