"""Feed dicts: arrays by input name, one dict a batch or a sample, from Python or from a JSON file of polygraphy.

    def calibration():                                # my_package.data:calibration
        for image, _ in loader:
            yield {"image": image.numpy()}            # [B, …] or one sample, without the batch

A `label` among the arrays gives the classes. Feeds of a function are written into a temporary file while they come, so
any number of them may; with `--samples N` the first N are taken, and no more is asked of it.

Polygraphy's JSON is a list of feed dicts, as `polygraphy run --save-inputs` writes it: each array an object
{"polygraphy_class": "ndarray", "array": base64 of the bytes that numpy.save writes}.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import importlib
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration.array_file import LABEL, Convert, as_inputs, check_array
from calibration.input_spec import InputSpec, varying_axes
from calibration.rows import Array, Rows, chosen
from calibration.selection import Choice, Read, members_of
from calibration.user_code import working_directory_importable
from profiles.errors import GpusqError

FACTORY = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)")
_POLYGRAPHY, _POLYGRAPHY_OLD = "polygraphy_class", "__polygraphy_encoded_ndarray"
_RETURNS = "return or yield dicts of arrays by input name"


def read_factory(source: str, specs: Mapping[str, InputSpec], to_float: Convert, choice: Choice) -> Read:
    """Return what `module:function` gives: dicts of arrays, or one dict of arrays [N, …].

    Raises:
        GpusqError: there is no such function, or what it gives does not fit the inputs.
    """
    given = _called(source)
    return _read(source, [given] if isinstance(given, Mapping) else given, specs, to_float, Choice(), choice.count)


def read_polygraphy(path: Path, specs: Mapping[str, InputSpec], to_float: Convert, choice: Choice) -> Read:
    """Return the chosen samples of a JSON file that polygraphy's save_json wrote.

    Raises:
        GpusqError: the file is damaged or holds something else, or an array does not fit its input.
    """
    try:
        feeds = json.loads(path.read_bytes(), object_hook=_decoded)
    except (ValueError, RecursionError, binascii.Error, EOFError, OSError) as error:
        raise GpusqError(
            f"{path} cannot be read as polygraphy's JSON: {error}", hint="write it with polygraphy.json.save_json"
        ) from None
    if not isinstance(feeds, list) or not all(isinstance(feed, dict) for feed in feeds):
        raise GpusqError(f"{path} holds no list of feed dicts", hint="write one dict of arrays for each batch")
    return _read(str(path), feeds, specs, to_float, choice, None)


def _read(
    source: str,
    feeds: Iterable[Any],
    specs: Mapping[str, InputSpec],
    to_float: Convert,
    choice: Choice,
    first: int | None,
) -> Read:
    stored, labels = _spooled(source, feeds, specs, first)
    count = len(next(iter(stored.values())))
    names = [f"{Path(source).name}[{row}]" for row in range(count)]
    index = choice.of(names)
    used: dict[str, Rows] = {name: chosen(array, index) for name, array in stored.items()}
    return Read(
        inputs=as_inputs(used, specs, to_float),
        members=members_of([names[row] for row in index], used, source),
        available=count,
        labels=None if labels is None else labels[index],
    )


def _spooled(
    source: str, feeds: Iterable[Any], specs: Mapping[str, InputSpec], first: int | None
) -> tuple[dict[str, Array], Array | None]:
    """All feeds, one behind the other, in temporary files that go away with the arrays."""
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(tempfile.TemporaryFile()) for name in specs}
        shapes: dict[str, tuple[int, ...]] = {}
        types: dict[str, np.dtype[Any]] = {}
        labels: list[Array] = []
        count = 0
        for number, feed in enumerate(feeds):
            batch = _batch(f"{source}, feed {number}", feed, specs)
            for name in specs:
                array = batch[name]
                if (shapes.setdefault(name, array.shape[1:]), types.setdefault(name, array.dtype)) != (
                    array.shape[1:],
                    array.dtype,
                ):
                    raise GpusqError(
                        f"{source}, feed {number}: '{name}' has another shape or type than before",
                        hint="pad the samples to one length",
                    )
                array.tofile(files[name])
            count += len(batch[next(iter(specs))])
            labels += [batch[LABEL]] if LABEL in batch else []
            if first is not None and count >= first:
                break
        if not count:
            raise GpusqError(f"no samples in {source}", hint=_RETURNS)
        kept = count if first is None else min(count, first)
        found = {
            name: np.memmap(files[name], types[name], "r", 0, (kept, *shapes[name])).view(np.ndarray) for name in specs
        }
    if labels and sum(map(len, labels)) != count:
        raise GpusqError(f"{source}: not every sample has a '{LABEL}'", hint="add it, or remove it everywhere")
    return found, np.concatenate(labels).astype(np.int64)[:kept] if labels else None


def _batch(where: str, feed: Any, specs: Mapping[str, InputSpec]) -> dict[str, Array]:
    """One feed as contiguous arrays [B, …], checked."""
    if not isinstance(feed, Mapping):
        raise GpusqError(f"{where} is a {type(feed).__name__}", hint=_RETURNS)
    found = {}
    for name, spec in specs.items():
        if name not in feed:
            have = ", ".join(sorted(map(str, feed))) or "nothing"
            raise GpusqError(f"{where} has no '{name}' (it has {have})", hint="its keys must be the model's inputs")
        array = _array(feed[name])
        single = array.ndim == len(spec.shape) and (array.shape == spec.shape or bool(varying_axes(spec)))
        array = array[None] if single else array
        check_array(where, name, array, spec)
        found[name] = np.ascontiguousarray(array.astype(np.float32) if array.dtype.name == "bfloat16" else array)
    if len({len(array) for array in found.values()}) > 1:
        raise GpusqError(f"{where}: its inputs differ in the number of samples", hint="give every input of each sample")
    if LABEL in feed:
        found[LABEL] = np.atleast_1d(_array(feed[LABEL]))
    return found


def _array(value: Any) -> Array:
    """A numpy array of what may be a torch tensor."""
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def _called(source: str) -> Any:
    """What the function returns; its module may lie where the user is, as with `python -m`."""
    match = FACTORY.fullmatch(source)
    assert match is not None
    with working_directory_importable():
        try:
            module = importlib.import_module(match["module"])
        except ModuleNotFoundError as error:
            if error.name is None or not f"{match['module']}.".startswith(f"{error.name}."):
                raise
            raise GpusqError(
                f"there is no module {error.name!r}", hint="run gpusq where your code lies, or install it"
            ) from error
        function: Callable[[], Any] | None = getattr(module, match["function"], None)
        if not callable(function):
            raise GpusqError(f"{match['module']} has no function {match['function']!r}", hint="check its name")
        return function()


def _decoded(stored: dict[str, Any]) -> Any:
    """An object of the JSON file: an encoded array, or a dict as it is."""
    kind = stored.get(_POLYGRAPHY, "ndarray" if _POLYGRAPHY_OLD in stored else None)
    if kind is None:
        return stored
    if kind != "ndarray":
        raise ValueError(f"it holds a {kind}, and numpy arrays alone are read")
    try:
        content = base64.b64decode(stored["array"].encode(), validate=True)
    except binascii.Error:
        content = stored["array"].encode("latin-1")  # before polygraphy 0.27
    loaded = np.load(io.BytesIO(content), allow_pickle=False)
    return loaded if isinstance(loaded, np.ndarray) else next(iter(loaded.values()))
