"""Take the placement that is predicted fastest on a device and loses no more accuracy than may be lost.

    student ─ surgery for each placement ─► model.onnx ─┬─ compiled, timed by the cost model ─► ms, predicted
                                                        └─ run on the samples ────────────────► points lost, measured

Which placements are tried is in `deploy.placement_candidates`. Points are those of `calibration.output_loss`, of the
graph as it is written beside the student as training left it. Of placements within 1 % of the fastest the one that
changes fewest numbers is taken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from calibration.output_loss import Tally, without_padding
from deploy import tensorrt_api, verify
from deploy.cache_key import Key
from deploy.costly import TARGET_DROP
from deploy.job import Job, Precision
from deploy.manifest import MODEL_FILE
from deploy.placement_candidates import candidates
from deploy.placement_choice import Choice, Trial, choose
from deploy.predict import check_predictable, predict_point
from deploy.stages import own_code, surgery_key
from deploy.tensorrt_api import ShapeRange
from exporters.improvement import Improvement
from exporters.placement import Placement, places
from exporters.signature import Input
from profiles.cost_parameters import load_parameters
from profiles.device import Device
from profiles.errors import GpusqError

BEST: Literal["best"] = "best"
Make = Callable[[Job, Device, Path], object]


@dataclass(frozen=True)
class BestPlacement:
    """Chooses a placement for each device.

    Attributes:
        make: writes `model.onnx` of a job for a device into a folder.
        batch: that latencies are predicted at.
        asked_target: points that may be lost; None is half a point.
        improve: what is done so that less is lost, by the placements that quantize.
    """

    make: Make
    batch: int = 1
    asked_target: float | None = None
    improve: tuple[Improvement, ...] = ()

    def __call__(self, job: Job, device: Device) -> tuple[Job, Choice]:
        """Return the job with the placement that was taken, and the choice.

        Raises:
            GpusqError: the device's latency cannot be predicted, or no placement loses little enough.
        """
        jobs = {placement: self._placed(job, placement) for placement in candidates(job, device)}
        trials = tuple(self._trial(job, placed, placement, device) for placement, placed in jobs.items())
        choice = choose(trials, self.batch, self.target)
        if choice is None:
            reasons = "; ".join(f"{trial.placement}: {_refusal(trial, self.target)}" for trial in trials)
            raise GpusqError(
                f"no placement is left for {device.name}: {reasons}", hint="allow more with --target-drop POINTS"
            )
        job.progress.found("placement", f"{device.name} {choice.to_text()}")
        taken = jobs[choice.taken]
        taken.ranging.chosen = {}  # as if it had been asked for
        return taken, choice

    @property
    def target(self) -> float:
        """Points that may be lost."""
        return TARGET_DROP if self.asked_target is None else self.asked_target

    def _placed(self, job: Job, placement: Placement) -> Job:
        return job.placed(placement, self.improve if places(placement) else ())

    def _trial(self, job: Job, placed: Job, placement: Placement, device: Device) -> Trial:
        """What is predicted of a placement and lost by it; what the surgery or the compiler refuses is told."""
        key = _key(placed, device, self.batch)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / device.name
            folder.mkdir()
            try:
                self.make(placed, device, folder)
                with job.progress.working(f"trying {placement}"):
                    return _fetched(job, key, folder, lambda: _tried(job, device, self.batch, folder, placement))
            except GpusqError as error:
                return Trial(placement=placement, refused=error.message)


def check_asked(devices: list[Device], precision: Precision, *, samples: bool, scales: bool) -> None:
    """Raise GpusqError where a best placement cannot be told, before any work is done."""
    for device in devices:
        check_predictable(device)
    if precision != "auto":
        raise GpusqError(
            f"placement {BEST} chooses the precision, and {precision} was asked for", hint="leave out --precision"
        )
    if not samples:
        raise GpusqError("there is nothing to judge the placements on", hint="give samples with --data calib.npz")
    if scales:
        raise GpusqError(f"a file of scales is of one placement, and {BEST} tries several", hint="leave out --scales")


def _key(job: Job, device: Device, batch: int) -> Key:
    """Everything that decides about a trial: its graph, the compiler and the cost model."""
    parts = {"batch": batch, "compilers": tensorrt_api.versions(), "cost model": load_parameters().model_dump()}
    return Key("trial", {**surgery_key(job, device).parts, **parts})


def _fetched(job: Job, key: Key, folder: Path, make: Callable[[], Trial]) -> Trial:
    """The trial, from the cache where it was made before; what the user's own code decides is always made."""
    return make() if own_code(job) else job.cache.fetch(key, folder, make, Trial, bundle=folder.name)


def _tried(job: Job, device: Device, batch: int, folder: Path, placement: Placement) -> Trial:
    model = folder / MODEL_FILE
    point = predict_point(model, device, batch, usual_inputs(job))
    return Trial(
        placement=placement,
        latency_ms=point.latency_ms,
        low_ms=point.low_ms,
        high_ms=point.high_ms,
        bound_by=point.bound_by,
        kernels=point.kernels,
        sparse_kernels=point.sparse_kernels,
        drop=points_lost(job, model),
    )


def points_lost(job: Job, model: Path) -> float:
    """Points that `model` loses on the samples beside the student as training left it."""
    found = verify.outputs(verify.session_of(model), job.samples, job.batch)
    rows, tally = np.arange(len(job.samples)), Tally()
    masks = {name: np.asarray(value[rows]) for name, value in job.samples.inputs.items() if name == "attention_mask"}
    tally.add(without_padding(job.trained, masks), without_padding(found, masks), job.samples.labels)
    return tally.loss.drop


def usual_inputs(job: Job) -> list[Input]:
    """The shapes of the samples, at the usual batch."""
    usual = ShapeRange().usual
    return [
        Input(spec.name, (usual if 0 in spec.dynamic else spec.shape[0], *job.samples.inputs[spec.name].shape[1:]))
        for spec in job.student.inputs
    ]


def _refusal(trial: Trial, target: float) -> str:
    return trial.refused or f"{trial.drop:.2f} points lost, {target:g} allowed"
