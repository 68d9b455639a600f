from __future__ import annotations

from pathlib import Path

import pytest

from deploy.timing import energy
from deploy.timing.energy import counters, joules_per_call
from deploy.timing.engine import Times


class Counted:
    """An engine whose every call makes a processor's counter go on by 2 J; the counter begins anew at 10 J."""

    def __init__(self, zone: Path) -> None:
        self.zone, self.calls = zone, 0

    def call(self) -> Times:
        self.calls += 1
        (self.zone / "energy_uj").write_text(f"{(9_000_000 + 2_000_000 * self.calls) % 10_000_000}\n")
        return 1, 1, 0


@pytest.fixture
def zone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    (folder / "energy_uj").write_text("9000000\n")
    (folder / "max_energy_range_uj").write_text("10000000\n")
    monkeypatch.setattr(energy, "counters", lambda: counters(tmp_path))
    return folder


def test_divides_what_the_processor_used_by_the_calls(zone: Path) -> None:
    """The counter passes its end on the way, once."""
    engine = Counted(zone)
    assert joules_per_call(engine, 0.0, on_gpu=False) == pytest.approx(2.0)
    assert engine.calls == 1


def test_says_nothing_where_the_counters_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "counters", lambda: counters(tmp_path))
    assert joules_per_call(Counted(tmp_path), 0.0, on_gpu=False) is None
