"""One case of the CPU benchmark: its contenders made, compared, and timed in turns by their workers."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import agreement, describe, judge

from cpu.rows import FLOOR, NOBODY, Case, Pair, Who
from cpu.workers import Worker, WorkerError
from jsparse.evaluate.speed.turns import ratios, repeats_in, take_turns

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "none": 0.0}  # relative, in the worst tile
PAUSE_S = 0.05  # between turns: threads that wait for work spin for a while before they sleep


@dataclasses.dataclass(frozen=True)
class Pace:
    """How often everything runs: ``rounds`` times, but at most three if a call takes longer than ``slow_s``,
    and two from ``very_slow_s`` on. A timing lasts ``target_s``, or one call.
    """

    rounds: int = 7
    target_s: float = 0.1
    slow_s: float = 2.0
    very_slow_s: float = 8.0

    def rounds_for(self, seconds: float) -> int:
        if seconds > self.very_slow_s:
            return min(self.rounds, 2)
        return min(self.rounds, 3) if seconds > self.slow_s else self.rounds


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds by name, then by round, then by metric; errors by name; what is to be noted."""

    times: Mapping[str, Mapping[int, Mapping[str, float]]]
    errors: Mapping[str, str]
    about: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Workplace:
    """What a case runs with: both workers, a folder for arrays and weights, and the time that is left."""

    workers: Mapping[str, Worker]
    folder: Path
    small: bool
    pace: Pace
    seconds_left: Callable[[], float]

    def ask(self, who: Who, do: str, **request: Any) -> dict[str, Any]:
        # A little longer than is left: what runs when the time is up may finish.
        timeout = min(max(self.seconds_left(), 0) + 60, 400)
        return self.workers[who.side].ask(timeout, do, name=who.name, **request)


def measure(case: Case, at: Workplace) -> Measured:
    """Every contender is made and warmed up, outputs are compared, and those that agree are timed."""
    errors: dict[str, str] = {}
    outputs: dict[str, dict[str, np.ndarray]] = {}
    for worker in at.workers.values():
        if worker.process is not None:
            worker.ask(60, "drop")
    for who in case.contenders:
        try:
            at.ask(who, "make", spec=case.spec(who.name, small=at.small, folder=str(at.folder / "llama")))
            if who.compared:
                path = at.folder / "outputs.npz"
                at.ask(who, "outputs", path=str(path))
                with np.load(path) as arrays:
                    outputs[who.name] = dict(arrays)
            elif case.row != "generate":  # which warms up by itself
                at.ask(who, "run", repeats=1)
        except (WorkerError, OSError) as error:
            errors[who.name] = str(error)
    wrong, notes = compare(case, outputs)
    errors |= wrong
    running = [who for who in case.contenders if who.timed and who.name not in errors]
    if not any(who.side == "ours" for who in running):
        return Measured({}, errors, {}, notes)
    about: dict[str, Mapping[str, Any]] = {}

    def run(who: Who, repeats: int) -> Mapping[str, float]:
        time.sleep(PAUSE_S)
        answer = at.ask(who, "run", repeats=repeats)
        about[who.name] = answer["about"]
        return answer["seconds"]

    times, broken = alternate(running, run, at.pace, at.seconds_left)
    return Measured(times, errors | broken, about, notes)


def compare(case: Case, outputs: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[dict[str, str], list[str]]:
    """Errors of those that disagree, by name, and notes. Ours is wrong if it agrees with none."""
    reference = next((who.name for who in case.contenders if who.compared and who.side == "ours"), None)
    if reference is None:
        return {}, []
    if reference not in outputs:
        return {}, []
    distances: dict[str, float] = {}
    unlike: dict[str, str] = {}
    for name in outputs:
        if name != reference:
            try:
                distances |= agreement({name: outputs[name], reference: outputs[reference]}, reference)
            except (ValueError, KeyError) as error:
                unlike[name] = describe(error)
    if not distances:
        return unlike, ["our outputs were compared with nobody's"]
    try:
        return unlike | judge(distances, TOLERANCE[case.dtype]), [
            "largest difference of outputs (relative, worst tile): "
            + ", ".join(f"{name} {distance:.1e}" for name, distance in distances.items())
        ]
    except ArithmeticError as error:
        return unlike | {who.name: str(error) for who in case.contenders if who.side == "ours"}, []


def alternate(
    contenders: Sequence[Who],
    run: Callable[[Who, int], Mapping[str, float]],
    pace: Pace,
    seconds_left: Callable[[], float],
) -> tuple[dict[str, dict[int, Mapping[str, float]]], dict[str, str]]:
    """Rounds A B C A B C. Round 0 has single calls, which say how often each is to run."""
    repeats: dict[str, int] = {}
    rounds: dict[str, int] = {}

    def turn(who: Who, number: int) -> Mapping[str, float] | None:
        if number == 0:
            times = run(who, 1)
            once = sum(times.values())
            repeats[who.name] = repeats_in(pace.target_s, once, most=10000)
            # For slow contenders round 0 counts, and there is one round fewer after it.
            rounds[who.name] = pace.rounds_for(once) - (once > pace.slow_s)
            return times
        return run(who, repeats[who.name]) if number <= rounds[who.name] else None

    turns = take_turns(
        {who.name: functools.partial(turn, who) for who in contenders},
        1 + pace.rounds,
        goes_on=lambda number: number == 0 or seconds_left() > 0,
        failures=WorkerError,
    )
    return turns.measured, {name: str(error) for name, error in turns.errors.items()}


def entry(case: Case, pair: Pair, measured: Measured, floor_s: float | None, pace: Pace) -> dict[str, Any]:
    """The result of one pair: the ratio round by round, and both medians."""
    result: dict[str, Any] = {
        "row": pair.row,
        "length": case.length,
        "dtype": case.dtype,
        "ours": pair.ours,
        "peer": pair.peer,
        "same_work": same_work(case, pair),
        "ratio_median": None,
        "ratio_min": None,
        "ratio_max": None,
    }
    if pair.goal is not None:
        result["goal"] = pair.goal
    notes = [note for note in (case.note, *(measured.notes if result["same_work"] else ())) if note]
    if notes:
        result["note"] = "; ".join(notes)
    mine = measured.times.get(pair.ours, {})
    for name in (pair.ours, pair.peer):
        if name in measured.errors:
            alone = [mine[number][pair.metric] * pair.share for number in mine if number]
            if alone and name == pair.peer:
                result |= {"ours_ms": 1e3 * statistics.median(alone)}
            return result | {"error": f"{name}: {measured.errors[name]}"}
    if pair.peer in (FLOOR, NOBODY):
        theirs = {number: {pair.metric: floor_s or 0.0} for number in mine}
        if pair.peer == FLOOR and floor_s is None:
            return result | {"error": "no matrix product was measured, and the floor is made from one"}
    else:
        theirs = measured.times.get(pair.peer, {})
    rounds = sorted(mine.keys() & theirs.keys())
    slow = any(sum(x[0].values()) > pace.slow_s for x in (mine, theirs) if 0 in x)
    if not slow and 0 in rounds:
        rounds.remove(0)
    if not rounds:
        return result | {"error": "not timed: the time was used up, or the other side did not run"}
    ours = [mine[number][pair.metric] * pair.share for number in rounds]
    peer = [theirs[number][pair.metric] for number in rounds]
    result |= {"rounds": len(rounds), "ours_ms": 1e3 * statistics.median(ours)}
    if pair.peer == NOBODY:
        return result
    result |= ratios(ours, peer) | {"peer_ms": 1e3 * statistics.median(peer)}
    tokens = [measured.about.get(name, {}).get("tokens", []) for name in (pair.ours, pair.peer)]
    if all(tokens) and same_work(case, pair):
        equal = next((i for i, (a, b) in enumerate(zip(*tokens)) if a != b), len(tokens[0]))  # noqa: B905
        result["note"] = "; ".join([*notes, f"the first {equal} of {len(tokens[0])} greedy tokens are equal"])
    return result


def same_work(case: Case, pair: Pair) -> bool:
    compared = {who.name for who in case.contenders if who.compared}
    return pair.ours in compared and pair.peer in compared
