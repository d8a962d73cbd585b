"""The loop of a training run: progress, metrics.jsonl, evaluations, checkpoints, and an early end."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jsparse.reports.progress import steps_shown
from jsparse.train.run.evaluations import BEFORE, EVAL, Evaluations, best_line, describe, is_spent
from jsparse.train.run.identity import METRICS, metrics_until
from jsparse.train.run.processes import is_first_process, wait_for_all
from jsparse.train.run.stopping import stop_noted
from jsparse.train.step import TrainState

MetricsLine = dict[str, Any]


class Taken(NamedTuple):
    """What ``run_steps`` leaves: the last state, all lines of metrics.jsonl, and the number of the signal
    that ended the run before its last step, or None.
    """

    state: TrainState
    metrics: list[MetricsLine]
    stopped_by: int | None


def run_steps(
    state: TrainState,
    take_step: Callable[[int, TrainState], tuple[TrainState, MetricsLine]],
    *,
    output: Path,
    steps: int,
    checkpoint_every: int,
    save: Callable[[int, TrainState, int | None], None],
    name: str,
    note: Callable[[MetricsLine], str],
    progress: bool,
    evaluations: Evaluations | None = None,
    log: Callable[..., None] | None = None,
) -> Taken:
    """Take the steps that ``state`` has not taken yet, or fewer if the evaluations' patience is spent.

    - take_step: ``(step, state) -> (state, line)``, with steps counted from 0. It waits for the step to
      end and returns its line of metrics.jsonl.
    - output: the folder of metrics.jsonl; lines after the state's step are written again.
    - steps: the steps of the whole run.
    - save: ``save(n, state, best)`` writes a checkpoint after n steps and keeps that of step ``best``. It is
      called every ``checkpoint_every`` steps, after the last one, after one whose held-out loss is the best
      so far, and when a signal ends the run.
    - name, note: what is shown about the run, and about a line (``steps_shown``).
    - evaluations: what is measured during the run. All that is decided by it follows from metrics.jsonl, so a
      run that was interrupted decides the same. A signal does not wait for the evaluation of its step, which
      then comes first when the run is resumed.
    - log: called with each new line, after it is written, and with ``late=True`` for the evaluation of a step
      whose line was new in an earlier call.
    """
    start = int(state.step)
    metrics = metrics_until(output, start)

    def is_due(step: int) -> bool:
        return evaluations is not None and (step % evaluations.every == 0 or step == steps)

    def is_over(step: int) -> bool:
        return step == steps or (evaluations is not None and is_spent(metrics, evaluations.patience))

    def best() -> int | None:
        line = best_line(metrics)
        return None if line is None else line["step"]

    put_off = None
    if evaluations is not None and metrics and is_due(start) and EVAL not in metrics[-1]:
        put_off = metrics[-1][EVAL] = evaluations.measure(state)
    wait_for_all("metrics")  # all read it before the first process writes
    with (
        open(output / METRICS if is_first_process() else os.devnull, "w", encoding="utf-8") as file,
        steps_shown(progress and is_first_process(), name, steps=steps, start=start) as show,
        stop_noted() as asked_to_stop,
    ):
        file.writelines(json.dumps(line) + "\n" for line in metrics)
        file.flush()
        if put_off is not None and log is not None:
            log({"step": start, EVAL: put_off}, late=True)
        before = evaluations.measure(state) if evaluations is not None and start == 0 else None
        step, stopping = start, 0
        while not (stopping or is_over(step)):
            state, line = take_step(step, state)
            step += 1
            if before is not None:
                line, before = line | {BEFORE: before}, None
            stopping = asked_to_stop()
            if evaluations is not None and is_due(step) and (not stopping or step == steps):
                line = line | {EVAL: evaluations.measure(state)}
            metrics.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            if log is not None:
                log(line)
            show(step, note(line) + describe(metrics))
            is_best = EVAL in line and best() == step
            if step % checkpoint_every == 0 or is_over(step) or stopping or is_best:
                if is_first_process():
                    os.fsync(file.fileno())  # a checkpoint on disk has its metrics on disk too
                save(step, state, best())
    return Taken(state, metrics, stopping if stopping and not is_over(step) else None)
