"""How far a graph's answers lie from those of the model that it was made of, on random inputs, on onnxruntime.

The error is ‖y − r‖ / ‖r‖ over all values of the first output, y the graph's and r the reference's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calibration.feed import fit
from deploy.onnxruntime_api import open_session
from deploy.timing.engine import fixed_batch, random_feed

BATCH = 16
_SEED = 0


def error_of(model: Path, reference: Path) -> float:
    """The error of `model` against `reference`, both ONNX files with the same inputs, on 16 random samples or more.

    Raises:
        GpusqError: an input varies in more than the batch.
    """
    ours, theirs = open_session(model), open_session(reference)
    batch = fixed_batch(ours.get_inputs()) or fixed_batch(theirs.get_inputs()) or BATCH
    random = np.random.default_rng(_SEED)
    difference = total = 0.0
    for _ in range(-(-BATCH // batch)):
        feed = random_feed(theirs.get_inputs(), batch, random, str(reference))
        found, wanted = (
            np.asarray(session.run(None, fit(session.get_inputs(), feed))[0], np.float64) for session in (ours, theirs)
        )
        difference += float(np.square(found - wanted).sum())
        total += float(np.square(wanted).sum())
    return float(np.sqrt(difference / total)) if total else float(difference > 0)
