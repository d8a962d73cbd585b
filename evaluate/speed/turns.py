"""Timing in turns: rounds A B C A B C, and statistics of the times.

In a round everything runs in immediate succession, and a ratio is taken within a round: what slows the
machine down for a while slows both sides. So ratios hold on a busy machine, where times do not.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Timing:
    """The times of all rounds, in order, with their median and their minimum."""

    median: float
    least: float
    rounds: tuple[float, ...]

    @classmethod
    def from_rounds(cls, rounds: Sequence[float]) -> "Timing":
        return cls(statistics.median(rounds), min(rounds), tuple(rounds))

    def ratio_to(self, other: "Timing") -> float:
        """The median, over the rounds, of the ratio of the two times of a round.

        >>> Timing.from_rounds([1.0, 10.0, 1.0]).ratio_to(Timing.from_rounds([2.0, 20.0, 4.0]))
        0.5
        """
        return ratios(self.rounds, other.rounds)["ratio_median"]


@dataclasses.dataclass(frozen=True)
class Turns(Generic[Key, Value]):
    """What was measured, by name and round number, and the errors of the calls that failed, by name."""

    measured: dict[Key, dict[int, Value]]
    errors: dict[Key, Exception]


def take_turns(
    calls: Mapping[Key, Callable[[int], Value | None]],
    rounds: int,
    *,
    goes_on: Callable[[int], bool] = lambda number: True,
    failures: type[Exception] | tuple[type[Exception], ...] = (),
) -> Turns[Key, Value]:
    """What each call measures, one after another in every round.

    - calls: by name; each is called with the number of the round, and returns None to sit it out.
    - rounds: how many there are; the first is round 0, which usually compiles and warms up.
    - goes_on: asked before each round, with its number; False ends the turns.
    - failures: exceptions that end the turns of their own call only. Others are raised.

    >>> take_turns({"a": lambda number: 2.0 * number, "b": lambda number: None}, rounds=2).measured
    {'a': {0: 0.0, 1: 2.0}, 'b': {}}
    """
    turns: Turns[Key, Value] = Turns({name: {} for name in calls}, {})
    for number in range(rounds):
        if not goes_on(number):
            break
        for name, call in calls.items():
            if name in turns.errors:
                continue
            try:
                value = call(number)
            except failures as error:
                turns.errors[name] = error.with_traceback(None)  # which would keep arrays alive
                continue
            if value is not None:
                turns.measured[name][number] = value
    return turns


def in_turns(
    calls: Mapping[Key, Callable[[], float]], rounds: int, *, uncounted: int = 1
) -> dict[Key, Timing]:
    """What each call measures once per round, after ``uncounted`` rounds that compile.

    >>> in_turns({"a": lambda: 2.0}, rounds=2)
    {'a': Timing(median=2.0, least=2.0, rounds=(2.0, 2.0))}
    """
    turns = take_turns(
        {name: lambda _, call=call: call() for name, call in calls.items()}, uncounted + rounds
    )
    return {
        name: Timing.from_rounds([time for number, time in times.items() if number >= uncounted])
        for name, times in turns.measured.items()
    }


def repeats_in(target: float, once: float, most: int) -> int:
    """How many calls that take ``once`` each fill the time ``target``: from 1 to ``most``.

    >>> repeats_in(0.1, once=0.03, most=10), repeats_in(0.1, once=5.0, most=10)
    (3, 1)
    """
    return min(max(round(target / once), 1), most)


def ratios(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """ours / peer, round by round: the median, the least and the largest. Below 1: ours is faster.

    >>> ratios([2.0, 3.0, 4.0], [4.0, 4.0, 4.0])
    {'ratio_median': 0.75, 'ratio_min': 0.5, 'ratio_max': 1.0}
    """
    each = [a / b for a, b in zip(ours, peer, strict=True)]
    return {"ratio_median": statistics.median(each), "ratio_min": min(each), "ratio_max": max(each)}


def milliseconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes until its arrays are computed, and what it returns."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - start), result
