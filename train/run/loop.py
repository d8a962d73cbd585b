"""The loop of a training run: progress, metrics.jsonl, checkpoints, and an end when SIGTERM asks for one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsparse.reports.progress import steps_shown
from jsparse.train.run.identity import METRICS, metrics_until
from jsparse.train.run.processes import is_first_process, wait_for_all
from jsparse.train.run.stopping import sigterm_noted
from jsparse.train.step import TrainState

MetricsLine = dict[str, Any]


def run_steps(
    state: TrainState,
    take_step: Callable[[int, TrainState], tuple[TrainState, MetricsLine]],
    *,
    output: Path,
    steps: int,
    checkpoint_every: int,
    save: Callable[[int, TrainState], None],
    name: str,
    note: Callable[[MetricsLine], str],
    progress: bool,
    log: Callable[[MetricsLine], None] | None = None,
) -> tuple[TrainState, list[MetricsLine]]:
    """Take the steps that ``state`` has not taken yet.

    - take_step: ``(step, state) -> (state, line)``, with steps counted from 0. It waits for the step to
      end and returns its line of metrics.jsonl.
    - output: the folder of metrics.jsonl; lines after the state's step are written again.
    - steps: the steps of the whole run.
    - save: ``save(n, state)`` writes a checkpoint after n steps. It is called every ``checkpoint_every``
      steps, after the last one, and when SIGTERM ends the run.
    - name, note: what is shown about the run, and about a line (``steps_shown``).
    - log: called with each new line, after it is written.

    Returns the last state and all lines of metrics.jsonl.
    """
    start = int(state.step)
    metrics = metrics_until(output, start)
    wait_for_all("metrics")  # all read it before the first process writes
    with (
        open(output / METRICS if is_first_process() else os.devnull, "w", encoding="utf-8") as file,
        steps_shown(progress and is_first_process(), name, steps=steps, start=start) as show,
        sigterm_noted() as asked_to_stop,
    ):
        file.writelines(json.dumps(line) + "\n" for line in metrics)
        file.flush()
        for step in range(start, steps):
            state, line = take_step(step, state)
            metrics.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            if log is not None:
                log(line)
            show(step + 1, note(line))
            stopping = asked_to_stop()
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps or stopping:
                if is_first_process():
                    os.fsync(file.fileno())  # a checkpoint on disk has its metrics on disk too
                save(step + 1, state)
            if stopping:
                break
    return state, metrics
