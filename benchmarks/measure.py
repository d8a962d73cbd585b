"""How implementations are compared: floors, agreement of outputs, times of launches.

What a benchmark reports of a peer are ratios of times within a round (jsparse.evaluate.speed.turns).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.evaluate.speed.turns import repeats_in, take_turns


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a device can do at best per second: floating-point operations, bytes to and from memory (read plus
    written), exponentials.
    """

    flops: float
    bytes: float
    exps: float


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that a computation needs. If it has no operations at all, it is bound by memory, and its rate
    is in bytes.
    """

    flops: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0

    def floor_us(self, ceilings: Ceilings) -> float:
        """The time that no implementation can beat: the largest of the three, which overlap at best.

        >>> Work(flops=4e6, bytes=2e6).floor_us(Ceilings(flops=2e12, bytes=4e12, exps=1e12))
        2.0
        """
        seconds = (
            self.flops / ceilings.flops,
            self.bytes / ceilings.bytes,
            self.exps / ceilings.exps,
        )
        return 1e6 * max(seconds)

    def rate(self, time_us: float) -> dict[str, float]:
        """{"tflops": ...}, or {"gb_per_s": ...} for work that is bound by memory."""
        if self.flops:
            return {"tflops": self.flops / time_us / 1e6}
        return {"gb_per_s": self.bytes / time_us / 1e3}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation of a row, ready to run.

    - launch() starts ``calls`` computations and may return before they end; wait(what it returned) returns
      after.
    - outputs() computes once, on the inputs that all contenders share, for the comparison: arrays [B, T, H,
      D].
    - same_work: False if it computes something else, for comparison (dense attention); outputs() is then not
      compared.
    """

    name: str
    launch: Callable[[], Any]
    wait: Callable[[Any], Any]
    outputs: Callable[[], Mapping[str, Any]]
    work: Work
    calls: int = 1
    same_work: bool = True


# Agreement ---------------------------------------------------------------------------------------------


@jax.jit
def _squares(x, y):
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.sum((x - y) ** 2, axis=-1), jnp.sum(y**2, axis=-1)


def tile_error(x, y, *, tile: int = 128) -> float:
    """The largest of ``|x - y| / |y|`` over tiles of ``tile`` tokens of one head: no wrong tile can hide.

    x and y are [B, T, H, D]. A tile that is nearly zero is compared with a thousandth of the usual norm of a
    tile. The error is NaN if anything is.

    >>> x = jnp.ones((1, 256, 2, 4))
    >>> tile_error(x, x), tile_error(x.at[:, 128:, 1].set(2.0), x)
    (0.0, 1.0)
    """
    if x.shape != y.shape:
        raise ValueError(f"outputs of unequal shapes cannot be compared: {x.shape} and {y.shape}")
    difference, norm = (np.asarray(square, np.float64) for square in _squares(x, y))
    starts = np.arange(0, difference.shape[1], tile)
    difference, norm = (np.add.reduceat(square, starts, axis=1) for square in (difference, norm))
    norm = np.maximum(norm, 1e-6 * norm.mean())
    return float(np.sqrt(np.max(difference / np.where(norm == 0, 1, norm))))


def agreement(outputs: Mapping[str, Mapping[str, Any]], ours: str) -> dict[str, float]:
    """How far each contender is from ``ours``: the largest :func:`tile_error` of its arrays."""
    return {
        name: max(tile_error(arrays[key], outputs[ours][key]) for key in outputs[ours])
        for name, arrays in outputs.items()
        if name != ours
    }


def judge(errors: Mapping[str, float], tolerance: float) -> dict[str, str]:
    """What to say of contenders that disagree with ours, by name; raises if all of them do.

    If ours agrees with at least one independent implementation, another that does not is taken to be wrong
    itself and is left out. If nobody agrees with ours, or there is nobody to compare with, nothing can be
    believed.

    >>> judge({"a": 0.003, "b": 0.4}, tolerance=0.02)
    {'b': 'its outputs differ from ours by 0.4 (worst tile), and another peer agrees with ours'}
    """
    if not errors:
        raise ArithmeticError("nothing to compare our outputs with: not timed")
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}  # NaN is wrong
    if len(wrong) == len(errors):
        listed = ", ".join(f"{name} by {error:.2g}" for name, error in wrong.items())
        raise ArithmeticError(
            f"wrong: our outputs differ from {listed} (relative, worst tile; allowed {tolerance}): not timed"
        )
    return {
        name: f"its outputs differ from ours by {error:.2g} (worst tile), and another peer agrees with ours"
        for name, error in wrong.items()
    }


# Timing ------------------------------------------------------------------------------------------------


def time_us(contender: Contender, repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Microseconds per computation: ``repeats`` launches and one wait at the end, divided by the number of
    computations launched.
    """
    started = clock()
    for _ in range(repeats):
        last = contender.launch()
    contender.wait(last)
    return (clock() - started) * 1e6 / (repeats * contender.calls)


def alternate(
    contenders: Sequence[Contender],
    *,
    rounds: int = 9,
    target_s: float = 0.05,
    seconds_left: Callable[[], float] = lambda: float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times in rounds A B C A B C ..., and the errors of contenders that failed on the way, by name.

    Each timing takes about ``target_s``, so the one wait in it (tens of microseconds) does not matter. Two
    untimed launches come first. When time runs out, the rounds so far count, but at least three are run.
    """
    repeats: dict[str, int] = {}

    def turn(contender: Contender, number: int) -> float:
        if number == 0:  # compiles, and decides how often a timing launches
            time_us(contender, 1, clock)
            once = time_us(contender, 1, clock) * contender.calls
            repeats[contender.name] = repeats_in(target_s * 1e6, once, most=1000)
            return once
        return time_us(contender, repeats[contender.name], clock)

    turns = take_turns(
        {contender.name: functools.partial(turn, contender) for contender in contenders},
        1 + rounds,
        goes_on=lambda number: number <= 3 or seconds_left() > 0,
        failures=Exception,  # of any library: the others go on
    )
    times = {
        name: [time for number, time in measured.items() if number]
        for name, measured in turns.measured.items()
        if name not in turns.errors
    }
    return times, {name: describe(error) for name, error in turns.errors.items()}


def describe(error: BaseException) -> str:
    """An exception in one line that fits a table's note."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
