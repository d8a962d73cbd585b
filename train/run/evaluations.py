"""Held-out losses in the lines of metrics.jsonl: which one is best, and when a run stops early."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jsparse.train.step import TrainState

EVAL = "eval"  # in the line of a step: the held-out loss after it
BEFORE = "eval_before"  # in the line of the first step: the held-out loss before it


@dataclasses.dataclass(frozen=True)
class Evaluations:
    """The evaluations of a run.

    - measure: the held-out loss of a state, as it stands in metrics.jsonl: a dict with at least "loss", which
      is None if it is not finite.
    - every: steps from one to the next. The last step of a run has one too.
    - patience: this many without a better loss end the run; None: none do.
    """

    measure: Callable[[TrainState], dict[str, Any]]
    every: int
    patience: int | None = None


def best_line(lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The line of metrics.jsonl with the lowest held-out loss, the first of equal ones; None without any.

    The loss before the first step does not count: there is no checkpoint of it.

    >>> losses = enumerate([None, 2.0, 1.5, 1.5, None], start=1)
    >>> lines = [{"step": step, "eval": {"loss": loss}} for step, loss in losses]
    >>> best_line(lines)["step"], best_line(lines[:1])
    (3, None)
    """
    finite = [line for line in lines if EVAL in line and line[EVAL]["loss"] is not None]
    return min(finite, key=lambda line: line[EVAL]["loss"], default=None)


def is_spent(lines: Sequence[dict[str, Any]], patience: int | None) -> bool:
    """Whether the last ``patience`` evaluations have all found no loss lower than one before them.

    >>> lines = [{"eval": {"loss": loss}} for loss in (3.0, 2.0, 2.5, 2.0)]
    >>> is_spent(lines, 2), is_spent(lines[:3], 2), is_spent(lines, None)
    (True, False, False)
    """
    if patience is None:
        return False
    best, in_vain = float("inf"), 0
    for line in lines:
        if EVAL in line:
            loss = line[EVAL]["loss"]
            is_better = loss is not None and loss < best
            best, in_vain = (loss, 0) if is_better else (best, in_vain + 1)
            if in_vain >= patience:
                return True
    return False


def describe(lines: Sequence[dict[str, Any]]) -> str:
    """The last held-out loss and when it was measured, to follow other words; "" if there is none yet.

    >>> measured = {"step": 5, "eval": {"loss": 2.0, "perplexity": 7.389}}
    >>> describe([measured]), describe([measured, {"step": 6}])
    (', held-out loss 2.0000', ', held-out loss 2.0000 after step 5')
    """
    for line in reversed(lines):
        if EVAL in line:
            when = "" if line is lines[-1] else f" after step {line['step']}"
            return f", held-out loss {_rounded(line[EVAL]['loss'])}{when}"
        if BEFORE in line:
            return f", held-out loss {_rounded(line[BEFORE]['loss'])} before the first step"
    return ""


def _rounded(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
