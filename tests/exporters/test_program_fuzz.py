"""Damaged programs of torch.export: each loads or raises GpusqError. GPUSQ_FUZZ sets the number of files of each kind.

The bytes of the archive are damaged, those of one entry in a sound archive, and the tree of the graph's JSON.
"""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from exporters.checkpoint import load_student
from exporters.student import Student
from profiles.errors import GpusqError

EXAMPLES = int(os.environ.get("GPUSQ_FUZZ", "60"))
SECONDS_PER_FILE = 10
NAMES = ("float", "quantized")
GRAPH = "models/model.json"

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # by torch, about what it finds in the files
fuzzing = settings(
    max_examples=EXAMPLES,
    deadline=SECONDS_PER_FILE * 1000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Programs(dict[str, bytes]):
    """Archives by name; hypothesis prints its arguments."""

    def __repr__(self) -> str:
        return ", ".join(self)


@pytest.fixture(scope="module")
def programs() -> Programs:
    """A float program with a dynamic batch, and one that PT2E converted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        from tests.exporters.test_program import Symmetric

        torch.manual_seed(0)
        module, example = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), (torch.randn(2, 4),)
        batch = ({0: torch.export.Dim.DYNAMIC},)
        plain = torch.export.export(module, example, dynamic_shapes=batch)
        prepared = prepare_pt2e(plain.module(), Symmetric())
        prepared(*example)
        converted = torch.export.export(convert_pt2e(prepared), example, dynamic_shapes=batch)
        return Programs({"float": _saved(plain), "quantized": _saved(converted)})


def _saved(program: torch.export.ExportedProgram) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "program.pt2"


@pytest.mark.parametrize("name", NAMES)
def test_the_programs_that_are_damaged_are_sound(name: str, programs: Programs, path: Path) -> None:
    student = check(path, programs[name])
    assert student is not None
    assert student.quantized == (2 if name == "quantized" else 0)


@pytest.mark.parametrize("name", NAMES)
@fuzzing
@given(data=st.data())
def test_damaged_bytes_of_the_archive(name: str, data: st.DataObject, programs: Programs, path: Path) -> None:
    check(path, data.draw(damaged(programs[name])))


@pytest.mark.parametrize("name", NAMES)
@fuzzing
@given(data=st.data())
def test_a_damaged_entry_in_a_sound_archive(name: str, data: st.DataObject, programs: Programs, path: Path) -> None:
    entries = unpacked(programs[name])
    entry = data.draw(st.sampled_from(sorted(entries)))
    check(path, packed(entries | {entry: data.draw(damaged(entries[entry]))}))


@pytest.mark.parametrize("name", NAMES)
@fuzzing
@given(data=st.data())
def test_a_damaged_graph_that_is_sound_json(name: str, data: st.DataObject, programs: Programs, path: Path) -> None:
    entries = unpacked(programs[name])
    (entry,) = [entry for entry in entries if entry.endswith(GRAPH)]
    tree = json.loads(entries[entry])
    for _ in range(data.draw(st.integers(1, 3))):
        damage(tree, data)
    check(path, packed(entries | {entry: json.dumps(tree).encode()}))


@pytest.mark.parametrize("name", NAMES)
@fuzzing
@given(data=st.data())
def test_damaged_descriptions_of_the_weights(name: str, data: st.DataObject, programs: Programs, path: Path) -> None:
    entries = unpacked(programs[name])
    entry = data.draw(st.sampled_from(sorted(entry for entry in entries if entry.endswith("_config.json"))))
    tree = json.loads(entries[entry])
    damage(tree, data)
    check(path, packed(entries | {entry: json.dumps(tree).encode()}))


def check(path: Path, content: bytes) -> Student | None:
    """The student in `content`, or None where it was refused in one line with a hint."""
    path.unlink(missing_ok=True)  # never in place: an earlier file may still be mapped
    path.write_bytes(content)
    refused: GpusqError | None = None
    student: Student | None = None
    try:
        student = load_student(path)
    except GpusqError as error:
        refused = error
    assert refused is None or ("\n" not in refused.message and refused.hint)
    return student


def unpacked(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as whole:
        return {name: whole.read(name) for name in whole.namelist()}


def packed(entries: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    return content.getvalue()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a few bytes changed, taken out, repeated or put in, or cut short."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place, length = draw(st.integers(0, max(len(changed) - 1, 0))), draw(st.integers(1, 16))
        kind = draw(st.sampled_from(["flip", "set", "put", "drop", "repeat", "cut"]))
        if kind == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and changed:
            changed[place] = draw(st.sampled_from([*b'09-"{}[],:.ae', 0, 127, 128, 255]))
        elif kind == "put":
            changed[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "drop":
            del changed[place : place + length]
        elif kind == "repeat":
            changed[place:place] = changed[place : place + length]
        elif kind == "cut":
            del changed[place:]
    return bytes(changed)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 127, 2**31, -(2**63), 10**30, 0.5, float("inf"), float("nan")]),
    st.sampled_from(["", "x", "0", "torch.ops.aten.relu.default", "torch.ops.aten.add.Tensor", "s77", "weight_0"]),
    st.sampled_from([[], {}, [[]], [0], {"as_int": 3}, {"as_tensor": {"name": "linear"}}, {"as_none": True}]),
)


def damage(tree: Any, data: st.DataObject) -> None:
    """Take out, replace, repeat or exchange one value somewhere in a JSON tree, in place."""
    places = list(_places(tree))
    if not places:
        return
    holder, key = data.draw(st.sampled_from(places))
    kind = data.draw(st.sampled_from(["drop", "replace", "copy", "repeat"]))
    if kind == "drop":
        del holder[key]
    elif kind == "replace":
        holder[key] = data.draw(VALUES)
    elif kind == "copy":
        other, at = data.draw(st.sampled_from(places))
        holder[key] = json.loads(json.dumps(other[at]))
    elif isinstance(holder, list):
        holder.insert(key, json.loads(json.dumps(holder[key])))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
