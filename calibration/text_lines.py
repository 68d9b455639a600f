"""Lines of JSON as samples: texts for a tokenizer, or the inputs themselves.

    {"text": "The cat sat on the mat."}                  one text a line; `text_pair` may follow it
    {"input_ids": [101, 1996, …], "label": 3}            or the inputs by name, as nested lists

A text becomes the inputs that the model asks for: `input_ids`, `attention_mask`, `token_type_ids`, `position_ids`, and
a cache `past_key_values.*` that is empty, or of masked zeros where its length is fixed. Texts are cut and padded to the
length of the input; where that may vary, to the longest text that was chosen, at most 512 tokens. The tokenizer is the
`tokenizer.json` of a Hugging Face folder; its padding follows `tokenizer_config.json` (`pad_token`, `padding_side`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.array_file import LABEL, Convert, as_inputs, check_array
from calibration.input_spec import InputSpec, varying_axes
from calibration.rows import Array, Rows, zeros
from calibration.selection import Choice, Member, Read
from profiles.errors import GpusqError

TEXT, PAIR = "text", "text_pair"
TOKENIZER = "tokenizer.json"
LONGEST = 512
_IDS = frozenset({"input_ids", "tokens"})
_MASK = frozenset({"attention_mask", "input_mask"})
_TYPES = frozenset({"token_type_ids", "segment_ids"})
_POSITIONS = frozenset({"position_ids"})
_PAST = "past_key_values"
Json = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """One text as tokens, not padded."""

    ids: list[int]
    types: list[int]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with what its folder says about padding.

    Attributes:
        encode: makes tokens of texts or pairs of them, cut to a length.
        pad: the id that fills up.
        left: whether it fills up on the left.
    """

    encode: Callable[[Sequence[Any], int], list[Encoded]]
    pad: int
    left: bool


@dataclass(frozen=True)
class _Line:
    """One line: its number, the object in it, and the SHA-256 of its bytes."""

    number: int
    content: Json
    sha256: str


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in `path`, a folder with tokenizer.json, or that file.

    Raises:
        GpusqError: it is not there or not whole, or the package tokenizers is not installed.
    """
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise GpusqError(
            f"there is no {file}",
            hint="give its folder with --tokenizer; transformers' save_pretrained writes it for a fast tokenizer",
        )
    try:
        from tokenizers import Tokenizer as Library
    except ModuleNotFoundError:
        raise GpusqError("texts need the package tokenizers", hint="pip install 'gpusq[data]'") from None
    try:
        library = Library.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise GpusqError(f"{file} is no tokenizer: {error}", hint="copy it again") from None
    stored_pad = (library.padding or {}).get("pad_id")
    library.no_padding()
    config = _config(file.parent)
    pad = _pad(library, config, stored_pad)

    def encode(texts: Sequence[Any], length: int) -> list[Encoded]:
        library.enable_truncation(length)
        return [Encoded(one.ids, one.type_ids) for one in library.encode_batch(texts)]

    return Tokenizer(encode, pad, config.get("padding_side") == "left")


def read_lines(
    path: Path,
    specs: Mapping[str, InputSpec],
    to_float: Convert,
    choice: Choice,
    tokenizer: Callable[[], Tokenizer],
) -> Read:
    """Return the chosen lines of `path` as samples; `tokenizer` is called where they hold texts.

    Raises:
        GpusqError: a line is no JSON object, has no text and not every input, or does not fit its input.
    """
    lines = list(_objects(path))
    if not lines:
        raise GpusqError(f"no samples in {path}", hint="write one JSON object a line")
    index = choice.of([str(line.number) for line in lines])
    taken = [lines[row] for row in index]
    used, where = [line.content for line in taken], [f"{path}, line {line.number}" for line in taken]
    if TEXT in used[0]:
        inputs, notes = _of_texts(_texts(used, where), specs, tokenizer())
    else:
        inputs, notes = as_inputs(_of_fields(used, where, specs), specs, to_float), ()
    members = tuple(Member(f"{path.name}:{line.number}", line.sha256) for line in taken)
    return Read(inputs, members, len(lines), _labels(used, where), notes)


def _objects(path: Path) -> Iterator[_Line]:
    """The lines of the file that are not empty."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise GpusqError(f"{path}, line {number}: {error}", hint="write one JSON object a line") from None
            if not isinstance(found, dict):
                raise GpusqError(f"{path}, line {number} is no JSON object", hint='write {"text": "…"}')
            yield _Line(number, found, hashlib.sha256(line.strip()).hexdigest())


def _texts(lines: Sequence[Json], where: Sequence[str]) -> list[Any]:
    texts: list[Any] = []
    for line, place in zip(lines, where, strict=True):
        text, pair = line.get(TEXT), line.get(PAIR)
        if not isinstance(text, str) or not text.strip() or not isinstance(pair, (str, type(None))):
            raise GpusqError(f"{place} has no text", hint=f'write {{"{TEXT}": "…"}} in every line')
        texts.append(text if pair is None else (text, pair))
    return texts


def _of_texts(
    texts: Sequence[Any], specs: Mapping[str, InputSpec], tokenizer: Tokenizer
) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """Every input of the model for `texts`, and what is to be told."""
    fixed = _fixed_length(specs)
    encoded = tokenizer.encode(texts, LONGEST + 1 if fixed is None else fixed + 1)  # one more tells what is cut
    longest = max(len(one.ids) for one in encoded)
    length = min(longest, LONGEST) if fixed is None else fixed
    cut = sum(len(one.ids) > length for one in encoded)
    if cut:
        encoded = tokenizer.encode(texts, length)
    padded = sum(len(one.ids) < length for one in encoded)
    notes = [f"{cut} of {len(texts)} texts are longer than {length} tokens and were cut"] if cut else []
    if padded and not _MASK & specs.keys():
        notes.append(f"{padded} of {len(texts)} texts are padded to {length} tokens, and the model takes no mask")
    return _tensors(encoded, length, specs, tokenizer), tuple(notes)


def _fixed_length(specs: Mapping[str, InputSpec]) -> int | None:
    """The number of tokens that the model takes, or None where it may vary."""
    ids = next((spec for name, spec in specs.items() if name in _IDS), None)
    if ids is None or len(ids.shape) != 1:
        raise GpusqError(
            f"the model takes {', '.join(specs)}, and none of them takes a text's tokens",
            hint="write the inputs themselves, by name, into each line",
        )
    return None if varying_axes(ids) else ids.shape[0]


def _tensors(
    encoded: Sequence[Encoded], length: int, specs: Mapping[str, InputSpec], tokenizer: Tokenizer
) -> dict[str, Rows]:
    count = len(encoded)
    ids, types = (np.full((count, length), fill, np.int64) for fill in (tokenizer.pad, 0))
    mask = np.zeros((count, length), np.int64)
    for row, one in enumerate(encoded):
        place = slice(length - len(one.ids), None) if tokenizer.left else slice(len(one.ids))
        ids[row, place], types[row, place], mask[row, place] = one.ids, one.types, 1
    past = _past_length(specs)
    of_past = np.zeros((count, past), np.int64)
    found: dict[str, Rows] = {}
    for name, spec in specs.items():
        if name.startswith(_PAST):
            found[name] = zeros(
                (count, *(past if axis == 1 else dim for axis, dim in enumerate(spec.shape))), spec.dtype
            )
            continue
        array = _of(name, ids, types, np.concatenate([of_past, mask], axis=1), past)
        found[name] = array.astype(spec.dtype, copy=False)
        check_array("the tokens", name, found[name], spec)
    return found


def _of(name: str, ids: Array, types: Array, mask: Array, past: int) -> Array:
    if name in _IDS:
        return ids
    if name in _MASK:
        return mask
    if name in _TYPES:
        return types
    if name in _POSITIONS:  # of what is not masked, as transformers' generate counts them
        positions: Array = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past:]
        return positions
    raise GpusqError(
        f"nothing tells how the input {name!r} is made of a text", hint="write the inputs themselves into each line"
    )


def _past_length(specs: Mapping[str, InputSpec]) -> int:
    """The length of the cache [heads, length, size] of one layer; 0 where it may vary or there is none."""
    cache = next((spec for name, spec in specs.items() if name.startswith(_PAST)), None)
    return 0 if cache is None or 1 in varying_axes(cache) else cache.shape[1]


def _of_fields(lines: Sequence[Json], where: Sequence[str], specs: Mapping[str, InputSpec]) -> dict[str, Rows]:
    """The inputs as they stand in the lines."""
    found: dict[str, Rows] = {}
    for name, spec in specs.items():
        rows = []
        for line, place in zip(lines, where, strict=True):
            if name not in line:
                have = ", ".join(sorted(line)) or "nothing"
                raise GpusqError(
                    f"{place} has no '{name}' (it has {have})", hint=f"give every input, or a field '{TEXT}'"
                )
            rows.append(_field(place, name, line[name], spec))
        if len({row.shape for row in rows}) > 1:
            raise GpusqError(f"{where[0]}: '{name}' differs in length from line to line", hint="pad it to one length")
        found[name] = np.stack(rows)
    return found


def _field(place: str, name: str, value: Any, spec: InputSpec) -> Array:
    try:
        array = np.array(value)
    except ValueError:
        raise GpusqError(f"{place}: '{name}' is ragged", hint="give a nested list with rows of one length") from None
    if array.dtype.kind not in "iufb":
        raise GpusqError(f"{place}: '{name}' holds no numbers", hint="give a nested list of numbers")
    wanted = np.dtype(spec.dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise GpusqError(f"{place}: '{name}' holds NaN or infinity", hint="clean the samples")
    array = array.astype(spec.dtype) if wanted.kind == "f" or array.dtype.kind in "iub" else array
    check_array(place, name, array[None], spec)
    return array


def _labels(lines: Sequence[Json], where: Sequence[str]) -> Any:
    """The classes, int64 [N], where the lines have them."""
    labelled = [LABEL in line for line in lines]
    if not any(labelled):
        return None
    for line, place in zip(lines, where, strict=True):
        if not isinstance(line.get(LABEL), int):
            raise GpusqError(f"{place} has no integer '{LABEL}'", hint="add it, or remove it everywhere")
    return np.array([line[LABEL] for line in lines], np.int64)


def _config(folder: Path) -> Json:
    file = folder / "tokenizer_config.json"
    try:
        found = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise GpusqError(f"{file} is not valid JSON: {error}", hint="copy it again") from None
    return found if isinstance(found, dict) else {}


def _pad(library: Any, config: Json, stored: int | None) -> int:
    """The id that fills up: the pad token, what tokenizer.json itself pads with, the end of a text, or 0."""
    for key in ("pad_token", "eos_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        number = None if token is None else library.token_to_id(token)
        if number is not None:
            return int(number)
        if stored is not None:
            return stored
    return 0
