from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from calibration.rows import all_of
from calibration.samples import InputSpec, Samples, SampleSource, SampleSpec, load_samples
from profiles.errors import GpusqError

SPECS = {"image": InputSpec((1, 2, 2), "float32")}
POLYGRAPHY = Path(__file__).parent / "polygraphy" / "inputs.json"  # by save_json of polygraphy 0.53.6
MODULE = """
import itertools
import numpy as np
import torch

def batches():
    for number in range(3):
        yield {"image": torch.full((2, 1, 2, 2), float(number)), "label": np.array([number, number])}

def singles():
    return [{"image": np.full((1, 2, 2), number, np.float32)} for number in range(5)]

def whole():
    return {"image": np.arange(12, dtype=np.float32).reshape(3, 1, 2, 2)}

def endless():
    return ({"image": np.full((1, 2, 2), number, np.float32)} for number in itertools.count())

def none():
    return []

def wrong():
    yield np.zeros(3)

def misnamed():
    yield {"picture": np.zeros((1, 1, 2, 2), np.float32)}

def changing():
    yield {"image": np.zeros((1, 1, 2, 2), np.float32)}
    yield {"image": np.zeros((1, 1, 2, 2), np.float16)}

def partly():
    yield {"image": np.zeros((1, 1, 2, 2), np.float32), "label": 1}
    yield {"image": np.zeros((1, 1, 2, 2), np.float32)}

def nan():
    yield {"image": np.full((1, 1, 2, 2), np.nan, np.float32)}

value = 3
"""


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "feeds_of_a_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def called(function: str, count: int | None = None) -> Samples:
    return load_samples(SampleSource(f"feeds_of_a_test:{function}", count), SPECS)


@pytest.mark.usefixtures("given")
def test_batches_of_a_generator_follow_each_other() -> None:
    samples = called("batches")
    assert all_of(samples.inputs["image"])[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert samples.source == "feeds_of_a_test:batches"


@pytest.mark.usefixtures("given")
def test_samples_without_a_batch_and_whole_arrays_are_taken_too() -> None:
    assert all_of(called("singles").inputs["image"])[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert len(called("whole")) == 3


@pytest.mark.usefixtures("given")
def test_no_more_is_asked_for_than_is_used() -> None:
    assert all_of(called("endless", 4).inputs["image"])[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    labels = called("batches", 3).labels
    assert labels is not None
    assert labels.tolist() == [0, 0, 1]


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("none", "no samples in feeds_of_a_test:none"),
        ("wrong", "feed 0 is a ndarray"),
        ("misnamed", "has no 'image' \\(it has picture\\)"),
        ("changing", "feed 1: 'image' has another shape or type than before"),
        ("partly", "not every sample has a 'label'"),
        ("nan", "'image' holds NaN or infinity"),
        ("value", "has no function 'value'"),
        ("nothing", "has no function 'nothing'"),
    ],
)
def test_what_does_not_do_is_an_error(function: str, message: str) -> None:
    with pytest.raises(GpusqError, match=message) as caught:
        called(function)
    assert caught.value.hint


def test_a_module_that_is_not_there_is_an_error() -> None:
    with pytest.raises(GpusqError, match="there is no module 'feeds_of_nobody'"):
        load_samples("feeds_of_nobody:calibration", SPECS)


def test_polygraphys_json() -> None:
    samples = load_samples(POLYGRAPHY, SPECS)
    expected = np.concatenate([np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2) / 2, -np.ones((1, 1, 2, 2))])
    assert np.array_equal(all_of(samples.inputs["image"]), expected)
    assert len(load_samples(SampleSource(str(POLYGRAPHY), 2), SPECS)) == 2


def test_polygraphys_older_json(tmp_path: Path) -> None:
    """Before 0.27 an array was an .npz archive as latin-1 text."""
    np.savez(tmp_path / "a.npz", np.zeros((2, 1, 2, 2), np.float32))
    text = (tmp_path / "a.npz").read_bytes().decode("latin-1")
    encoded = {"array": text, "__polygraphy_encoded_ndarray": "polygraphy_serialized_json_type"}
    (tmp_path / "old.json").write_text(json.dumps([{"image": encoded}]))
    assert len(load_samples(tmp_path / "old.json", SPECS)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image": {"polygraphy_class": "Tensor", "tensor": ""}}]', "it holds a Tensor, and numpy arrays alone"),
        ('[{"image": {"polygraphy_class": "ndarray", "array": "k05V"}}]', "cannot be read as polygraphy's JSON"),
        ('[{"image": ', "cannot be read as polygraphy's JSON"),
        ("[1]", "holds no list of feed dicts"),
        ("[]", "no samples in"),
    ],
)
def test_other_json_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "inputs.json").write_text(content)
    with pytest.raises(GpusqError, match=message) as caught:
        load_samples(tmp_path / "inputs.json", SPECS)
    assert caught.value.hint


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    import base64

    array = base64.b64encode((tmp_path / "objects.npy").read_bytes()).decode()
    (tmp_path / "inputs.json").write_text(json.dumps([{"image": {"polygraphy_class": "ndarray", "array": array}}]))
    with pytest.raises(GpusqError, match="Object arrays cannot be loaded"):
        load_samples(tmp_path / "inputs.json", SPECS)


def test_a_sample_of_varying_length_gets_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "feeds_of_length.py").write_text(
        "import numpy as np\ndef feeds():\n    return [{'ids': np.arange(7)}, {'ids': np.arange(14).reshape(2, 7)}]\n"
    )
    monkeypatch.chdir(tmp_path)
    samples = load_samples("feeds_of_length:feeds", {"ids": SampleSpec((1,), "int64", dynamic=(0,))})
    assert samples.inputs["ids"].shape == (3, 7)
