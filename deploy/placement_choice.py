"""What `--placement best` tells: the placements it tried, what is predicted of each and lost by it, which it took."""

from __future__ import annotations

from pydantic import Field

from deploy.text_table import text_table
from exporters.placement import Placement
from profiles.record import Record

TIE = 0.01  # of the latency: a difference that no prediction tells


class Trial(Record):
    """One placement on one device at one batch; the interval covers 80 %. None where nothing was compiled."""

    placement: Placement
    latency_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    bound_by: str | None = None
    kernels: int | None = None
    sparse_kernels: int | None = Field(default=None, description="For how many a 2:4 kernel is the faster.")
    drop: float | None = Field(default=None, description="Points lost on the samples beside the student.")
    refused: str = Field(default="", description="Why it was not taken into account; empty where it was.")


class Choice(Record):
    """Which placement was taken, and what it was taken from; latencies are predicted, losses measured."""

    taken: Placement
    batch: int
    target: float = Field(description="Points that may be lost.")
    why: str
    trials: tuple[Trial, ...]

    @property
    def headline(self) -> str:
        """What was taken and why, in one sentence."""
        return f"{self.taken} taken: {self.why}"

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """For each placement its name, latency, interval, loss, kernels and why it was refused."""
        return tuple(map(_row, self.trials))

    def to_text(self) -> str:
        """The trials for the terminal, and what was taken."""
        heading = ("placement", "predicted ms", "80 % interval", "points lost", "kernels", "2:4", "refused")
        return f"at batch {self.batch}\n{text_table([heading, *self.rows])}\n{self.headline}"


def choose(trials: tuple[Trial, ...], batch: int, target: float) -> Choice | None:
    """Take the fastest trial that loses no more than `target` points; of those within 1 % of it, the first.

    Args:
        trials: the placement that changes fewest numbers first.
        batch: that they are predicted at.
        target: points that may be lost.

    Returns:
        None where all of them are refused.
    """
    judged = tuple(_judged(trial, target) for trial in trials)
    left = [(trial.latency_ms, trial) for trial in judged if trial.latency_ms is not None and not trial.refused]
    if not left:
        return None
    fastest, first = min(left, key=lambda one: one[0])
    latency, taken = next(one for one in left if one[0] <= (1 + TIE) * fastest)
    why = f"{latency:.3f} ms predicted at batch {batch}, {taken.drop:.2f} points lost of {target:g} allowed"
    if taken is not first:
        why += f"; {first.placement} is within 1 % and changes more numbers"
    return Choice(taken=taken.placement, batch=batch, target=target, why=why, trials=judged)


def _judged(trial: Trial, target: float) -> Trial:
    if trial.refused or trial.drop is None or trial.drop <= target:
        return trial
    return trial.model_copy(update={"refused": f"{trial.drop:.2f} points lost, {target:g} allowed"})


def _row(trial: Trial) -> tuple[str, ...]:
    if trial.latency_ms is None:
        return (trial.placement, "", "", "", "", "", trial.refused)
    return (
        trial.placement,
        f"{trial.latency_ms:.3f}",
        f"{trial.low_ms:.3f} to {trial.high_ms:.3f}",
        "" if trial.drop is None else f"{trial.drop:.2f}",
        str(trial.kernels),
        str(trial.sparse_kernels),
        trial.refused,
    )
