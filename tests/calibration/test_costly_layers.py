from __future__ import annotations

from collections.abc import Collection

from hypothesis import given
from hypothesis import strategies as st

from calibration.costly_layers import MANY, Search
from calibration.output_loss import Loss

Layers = dict[str, tuple[float, float]]  # error and cost by name


def search(layers: Layers, tried: list[int] | None = None) -> Search:
    """A network whose errors add up, and whose drop in points is its error."""

    def loss(on: Collection[str]) -> Loss:
        if tried is not None:
            tried.append(len(on))
        error = sum(layers[name][0] for name in on)
        return Loss(error, error)

    costs = {name: cost for name, (_, cost) in layers.items()}
    return Search(
        costs,
        alone=loss,
        rest=lambda left: loss([name for name in layers if name not in left]),
        block=lambda name: name.partition(".")[0],
    )


def test_nothing_stays_float_where_the_target_is_met() -> None:
    tried: list[int] = []
    found = search({"a": (0.1, 1), "b": (0.2, 1)}, tried)(0.5)
    assert (found.left, found.before, found.after) == ((), found.after, found.before)
    assert tried == [2]


def test_the_one_that_costs_is_found_and_only_it() -> None:
    found = search({"a": (0.1, 1), "b": (9.0, 3), "c": (0.2, 1)})(0.5)
    assert [one.name for one in found.left] == ["b"]
    assert found.left[0].cost == 0.6
    assert "left float, 60.0 % of the products: b" in found.to_text()


def test_a_cheap_layer_goes_before_a_dear_one_with_the_same_error() -> None:
    found = search({"dear": (1.0, 100), "cheap": (1.0, 1)})(1.0)
    assert [one.name for one in found.left] == ["cheap"]


def test_what_is_not_needed_in_the_end_is_quantized_again() -> None:
    found = search({"a": (1.0, 1), "b": (5.0, 10)})(1.5)
    assert [one.name for one in found.left] == ["b"]


def test_blocks_are_looked_at_first_where_layers_are_many() -> None:
    layers = {f"{block}.{layer}": (0.0001, 1.0) for block in range(20) for layer in range(4)}
    layers["7.2"] = (3.0, 1.0)
    assert len(layers) > MANY
    tried: list[int] = []
    found = search(layers, tried)(0.5)
    assert [one.name for one in found.left] == ["7.2"]
    assert len(tried) < 40  # and not 80


@given(
    st.dictionaries(st.text("abc", min_size=1), st.tuples(st.floats(0, 10), st.floats(0.1, 10)), min_size=1),
    st.floats(0, 20),
)
def test_the_target_is_always_met_and_nothing_stays_float_in_vain(layers: Layers, target: float) -> None:
    found = search(layers)(target)
    assert found.after <= target
    for one in found.left:
        rest = [name for name in layers if name == one.name or name not in {other.name for other in found.left}]
        assert sum(layers[name][0] for name in rest) > target
