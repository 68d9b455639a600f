"""The fit: that it finds figures, refits without a part of the data, and writes and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from profiles import cross_validate, fit
from profiles.cost_parameters import CostParameters, load_parameters
from profiles.cross_validate import Score, sign_right
from profiles.fit_gemm import all_series, fit_gemm
from profiles.fit_latency import used_rows
from profiles.least_squares import fit_figures
from profiles.toml_file import read_toml

Array = npt.NDArray[np.float64]
POWERS = np.random.default_rng(0).standard_normal((60, 2))
MODELS = ("resnet-50", "bert-large-384")
NOISE = 0.02 * np.random.default_rng(1).standard_normal(60)


def off(x: Array) -> Array:
    """log(predicted / published) of rows that are 3^p · 0.5^q."""
    return np.asarray(POWERS @ (x - np.log([3.0, 0.5])) + NOISE)


def test_finds_the_figures_that_the_rows_were_made_with_whatever_the_guess() -> None:
    found = fit_figures(off, [1.0, 1.0], ["one"] * 60, looseness=[2.0, 2.0])
    assert np.exp(found.x) == pytest.approx([3.0, 0.5], rel=0.02)


def test_a_tight_figure_stays_at_its_guess() -> None:
    found = fit_figures(off, [1.0, 1.0], ["one"] * 60, looseness=[1e-4, 2.0])
    assert np.exp(found.x[0]) == pytest.approx(1.0, abs=1e-3)


def test_a_refit_without_rows_is_nearly_the_fit_of_the_others() -> None:
    """Rows that are 2 % longer spoil the fit; one step without them is where the others alone lead to."""
    spoilt = np.arange(60) < 20
    groups = list(range(60))  # each counts whole, with the others or without

    def residuals(x: Array) -> Array:
        return off(x) + np.where(spoilt, np.log(1.02), 0.0)

    found = fit_figures(residuals, [1.0, 1.0], groups, looseness=[2.0, 2.0])
    others = fit_figures(lambda x: off(x)[~spoilt], [1.0, 1.0], groups[20:], looseness=[2.0, 2.0])
    assert np.abs(found.without(spoilt) - others.x).max() < 0.1 * np.abs(found.x - others.x).max()


def test_an_interval_covers_what_the_other_groups_say() -> None:
    score = Score("device", np.array([0.1, -0.1, 0.1, 0.9]), ("a", "a", "b", "b"))
    assert score.coverage == 0.75
    assert score.by_group() == pytest.approx({"a": 0.1, "b": 0.5})
    assert np.isnan(Score("device", np.array([0.1]), ("a",)).coverage)


def test_signs_count_beyond_five_percent_alone() -> None:
    assert sign_right(np.log([1.5, 0.5, 1.01]), np.log([1.2, 1.1, 0.5])) == 0.5


@pytest.fixture
def thinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The fit on every fiftieth GEMM and two models, which takes seconds; the file that it writes."""
    monkeypatch.setattr(fit, "fit_gemm", lambda: fit_gemm(50))
    monkeypatch.setattr(fit, "used_rows", lambda: [row for row in used_rows() if row.works in MODELS])
    monkeypatch.setattr(cross_validate, "all_series", lambda: all_series(50))
    monkeypatch.setattr(fit, "PATH", tmp_path / "cost_model.toml")
    return tmp_path / "cost_model.toml"


def test_a_part_of_the_data_leads_near_the_shipped_figures(thinned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit.main([])
    written, shipped = CostParameters.model_validate(read_toml(thinned)), load_parameters()
    assert written.kernel.launch_cycles == pytest.approx(shipped.kernel.launch_cycles, rel=0.3)
    assert written.gemm.dense_share["fp16"] == pytest.approx(shipped.gemm.dense_share["fp16"], rel=0.2)
    printed = capsys.readouterr().out
    median = re.search(r"one device, whole models +\d+ +([\d.]+) %", printed)
    assert median is not None
    assert float(median[1]) < 25
    for heading in ("FP16 to INT8, models", "not used for the fit:", "inconsistent series of GEMMs:"):
        assert heading in printed
