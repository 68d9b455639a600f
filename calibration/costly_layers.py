"""Which layers cost the accuracy: the fewest, by what they cost the device, that have to stay float.

1. Everything quantized: if that loses no more than the target, nothing is left float.
2. One unit quantized at a time, all others float: the error that it makes. Where units are many, whole blocks first,
   and of these, worst first, only those that together make up 95 % of the error one by one.
3. Units in the order of error / cost. The shortest head of that order that meets the target when it is float is found
   by doubling its length and bisecting; each trial runs the whole graph with everything else quantized.
4. Of that head, the dearest units, 16 at most, are quantized again one by one if the target is met all the same.

Errors add up as long as they are independent, which makes the order of 3 the solution of the relaxed knapsack problem;
3 and 4 judge by what the whole graph really loses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from calibration.output_loss import Loss

MANY = 64
_SHARE = 0.95
_TRIED_AGAIN = 16


@dataclass(frozen=True)
class Costly:
    """A unit that stays float: the error that quantizing it alone makes, and its share of the whole cost.

    Attributes:
        name: of the module.
        error: power of the output's error as a share of the output's, with this unit quantized and nothing else.
        cost: share of all units' products.
    """

    name: str
    error: float
    cost: float


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        target: points that may be lost.
        before: points that are lost with everything quantized.
        after: points that are lost with `left` float.
        left: what stays float, the largest error first.
    """

    target: float
    before: float
    after: float
    left: tuple[Costly, ...]

    def to_text(self) -> str:
        """One sentence that names what stays float."""
        if not self.left:
            return f"{self.before:.2f} points lost on the samples, {self.target:g} allowed: every layer is quantized"
        names = ", ".join(one.name for one in self.left)
        cost = 100 * sum(one.cost for one in self.left)
        without = f"{self.before:.2f} with all quantized, {self.target:g} allowed"
        lost = f"{self.after:.2f} points lost on the samples, {without}"
        return f"{lost}; left float, {cost:.1f} % of the products: {names}"


@dataclass(frozen=True)
class Search:
    """Looks for the units to leave float.

    Attributes:
        costs: what each unit costs while it is float; any unit of measure.
        alone: the loss with these units quantized and nothing else.
        rest: the loss with these units float and everything else quantized.
        block: the name of the block that a unit belongs to.
        tell: is told what was found.
    """

    costs: Mapping[str, float]
    alone: Callable[[Collection[str]], Loss]
    rest: Callable[[Collection[str]], Loss]
    block: Callable[[str], str]
    tell: Callable[[str], None] = lambda text: None

    def __call__(self, target: float) -> Found:
        """Return the units that have to stay float so that no more than `target` points are lost."""
        before = self.rest(()).drop
        self.tell(f"{before:.2f} points lost with all of {len(self.costs)} layers quantized")
        if before <= target:
            return Found(target, before, before, ())
        errors = self._errors()
        order = sorted(errors, key=lambda name: (-errors[name] / max(self.costs[name], 1e-9), name))
        order += [name for name in self.costs if name not in errors]
        left = self._needed(order[: self._shortest(order, target)], target)
        total = sum(self.costs.values()) or 1.0
        found = [Costly(name, self._error(name, errors), self.costs[name] / total) for name in left]
        after = self.rest(left).drop
        self.tell(f"{after:.2f} points lost with {len(left)} of them float")
        return Found(target, before, after, tuple(sorted(found, key=lambda one: -one.error)))

    def _errors(self) -> dict[str, float]:
        """The error of each unit alone, but for those in blocks that make little of it."""
        blocks: dict[str, list[str]] = {}
        for name in self.costs:
            blocks.setdefault(self.block(name) if len(self.costs) > MANY else name, []).append(name)
        by_block = {block: self.alone(names).error for block, names in blocks.items()}
        self.tell(f"the errors of {len(blocks)} {'layers' if len(blocks) == len(self.costs) else 'blocks'} are known")
        worst = _most(by_block, _SHARE) if len(blocks) < len(self.costs) else list(by_block)
        return {name: self._error(name, {}) for block in worst for name in blocks[block]}

    def _error(self, name: str, known: Mapping[str, float]) -> float:
        return known[name] if name in known else self.alone([name]).error

    def _shortest(self, order: Sequence[str], target: float) -> int:
        """The length of the shortest head of `order` that meets the target."""
        low, high = 0, 1
        while high < len(order) and self.rest(order[:high]).drop > target:
            low, high = high, 2 * high
        high = min(high, len(order))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.rest(order[:middle]).drop <= target else (middle, high)
        return high

    def _needed(self, head: Sequence[str], target: float) -> list[str]:
        left = list(head)
        for name in sorted(head, key=lambda name: -self.costs[name])[:_TRIED_AGAIN]:
            others = [other for other in left if other != name]
            if self.rest(others).drop <= target:
                left = others
        return left


def _most(values: Mapping[str, float], share: float) -> list[str]:
    """The largest of `values` that together make up `share` of their sum."""
    chosen: list[str] = []
    missing = share * sum(values.values())
    for name in sorted(values, key=lambda name: -values[name]):
        if missing <= 0:
            break
        chosen.append(name)
        missing -= values[name]
    return chosen
