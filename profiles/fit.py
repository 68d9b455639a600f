"""`python -m profiles.fit`: fit the cost model to the open data, write `cost_model.toml`, and print how good it is.

`--check` writes nothing. Everything that the data hold and the fit does not use is listed with the reason.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np

from profiles.cost_parameters import PATH, CostParameters, Uncertainty
from profiles.cross_validate import (
    SPLITS,
    Score,
    gemm_score,
    gemm_speedups,
    latency_score,
    sign_right,
    speedups,
)
from profiles.fit_gemm import SUSPECT, GemmFit, fit_gemm
from profiles.fit_latency import fit_latency, residuals, used_rows, with_figures
from profiles.least_squares import Fit
from profiles.pairs import STEPS
from profiles.published import PublishedLatency, read_latencies
from profiles.replay import replayed_ms

_HEADER = "# Written by `python -m profiles.fit`; profiles/cost_parameters.py says what each figure is."


def main(arguments: list[str]) -> None:
    """Fit, print, and write unless `--check` is among `arguments`."""
    rows = used_rows()
    gemm = fit_gemm()
    fit = fit_latency(gemm.parameters, gemm.sustained, rows)
    scores = [latency_score(what, fit, gemm, rows) for what in SPLITS]
    gemms = [gemm_score(what, gemm) for what in ("problem", "device")]
    parameters = with_figures(fit.x, gemm.parameters, gemm.sustained).model_copy(
        update={"uncertainty": _uncertainty(scores, gemms, rows)}
    )
    print("\n".join(_report(gemm, fit, scores, gemms, rows, parameters)))
    if "--check" not in arguments:
        PATH.write_text(to_toml(parameters), encoding="utf-8")


def _uncertainty(scores: list[Score], gemms: list[Score], rows: list[PublishedLatency]) -> Uncertainty:
    by_device = next(score for score in scores if score.what == "device")
    off = np.concatenate([np.subtract(*speedups(by_device, rows, kind)) for kind in STEPS])
    return Uncertainty(
        gemm=gemms[-1].sigma,
        end_to_end=max(score.sigma for score in scores),
        speedup=float(np.percentile(np.abs(off), 80)) / 1.2816,
    )


def _report(
    gemm: GemmFit,
    fit: Fit,
    scores: list[Score],
    gemms: list[Score],
    rows: list[PublishedLatency],
    parameters: CostParameters,
) -> Iterator[str]:
    yield "left out                  n    median    p90   covered of 80 %"
    yield _line("nothing, whole models", Score("", fit.residuals[: len(rows)], ("",) * len(rows)))
    yield from (_line(f"one {score.what}, whole models", score) for score in scores)
    yield from (_line(f"one {score.what}, GEMMs", score) for score in gemms)
    yield ""
    yield "speed-up                  n    median error   sign right"
    for step, name in zip(STEPS, ("FP16 to INT8, models", "dense to 2:4, models"), strict=True):
        yield _speedup(name, *speedups(scores[1], rows, step))
    yield _speedup("dense to 2:4, GEMMs", *gemm_speedups(gemm))
    for score in (*scores, *gemms):
        yield ""
        yield f"median error by {score.grouped_by}, {score.what} left out:"
        yield from (f"  {group:45} {100 * error:5.1f} %" for group, error in score.by_group().items())
    yield ""
    yield "not used for the fit:"
    unused = Counter(row.why_unused for row in read_latencies() if row.why_unused)
    yield from (f"  {count:4} rows: {why}" for why, count in unused.most_common())
    yield ""
    yield "inconsistent series of GEMMs:"
    yield from (f"  {d} {k}{' 2:4' if s else ''}: {why}" for (d, k, s), why in SUSPECT.items())
    yield ""
    yield from _inconsistent(parameters)
    yield ""
    yield from _other_software(parameters)


def _line(name: str, score: Score) -> str:
    covered = "" if not name.startswith("one") or np.isnan(score.coverage) else f"{100 * score.coverage:8.0f} %"
    return f"{name:24} {len(score.errors):4}   {100 * score.median:5.1f} %  {100 * score.p90:5.1f} % {covered}"


def _speedup(name: str, published: np.ndarray, predicted: np.ndarray) -> str:
    error = np.median(np.abs(published - predicted))
    return f"{name:24} {len(published):4}   {100 * error:5.1f} %        {100 * sign_right(published, predicted):5.1f} %"


def _inconsistent(parameters: CostParameters) -> Iterator[str]:
    """Rows that contradict others of the same device, model and batch, beside the prediction."""
    yield "rows inconsistent with other rows of the same device, model and batch (predicted / published):"
    suspect = [row for row in read_latencies() if row.why_unused == "inconsistent with itself"]
    ratios = np.array([replayed_ms(row, parameters) / row.latency_ms for row in suspect])
    yield f"  {len(suspect)} of {suspect[0].software} on {suspect[0].device}: median {np.median(ratios):.2f}"
    triton = [row for row in used_rows() if "Triton" in row.software]
    for row, off in zip(triton, residuals(parameters, triton), strict=True):
        yield f"  {row.device}, {row.model} {row.size} batch {row.batch}, {row.software[:18]}: {np.exp(off):.2f}"


def _other_software(parameters: CostParameters) -> Iterator[str]:
    """Rows that are not fitted, beside the prediction of TensorRT: how much slower that software is, and how evenly."""
    yield "other software, not fitted (published / predicted for TensorRT, spread around it, speed-ups FP16 to INT8):"
    reason = "other software's kernels"
    known = [row for row in read_latencies() if row.why_unused == reason and row.works and row.batch]
    for program in sorted({row.program for row in known}):
        rows = [row for row in known if row.program == program]
        errors = residuals(parameters, rows)
        pairs = Score(program, errors, (program,) * len(rows))
        spread = 100 * float(np.median(np.abs(errors - np.median(errors))))
        published, predicted = speedups(pairs, rows, "int8")
        told = (
            f", {len(published)} pairs {100 * np.median(np.abs(published - predicted)):.1f} % off"
            if len(published)
            else ""
        )
        yield f"  {program:12} {len(rows):4} rows: {np.exp(-np.median(errors)):.2f} times, {spread:.1f} %{told}"


def to_toml(parameters: CostParameters) -> str:
    """The parameters as the text of their file."""
    lines = [_HEADER, "", f"sustained = {_table(parameters.sustained)}"]
    for name in ("gemm", "kernel", "uncertainty"):
        lines += ["", f"[{name}]"]
        for key, value in getattr(parameters, name).model_dump().items():
            lines.append(f"{key} = {_table(value) if isinstance(value, dict) else f'{value:.4g}'}")
    for program, effect in parameters.software.items():
        lines += ["", f"[software.{program}]", *(f"{key} = {value:.4g}" for key, value in effect.model_dump().items())]
    return "\n".join(lines) + "\n"


def _table(values: dict[str, float]) -> str:
    return "{ " + ", ".join(f'"{key}" = {value:.4g}' for key, value in values.items()) + " }"


if __name__ == "__main__":
    main(sys.argv[1:])
