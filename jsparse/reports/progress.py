"""The progress of training and evaluation: a bar in a terminal; elsewhere, for runs, a line now and then."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_SECONDS = (
    60.0  # between two lines where there is no terminal, or a tenth of the steps if that is sooner
)
_TIMED_STEPS = 3  # that are measured, after the first, before a run's time is estimated


def progress_bar(enabled: bool) -> Progress:
    """A bar on stderr, off if ``enabled`` is false or stderr is not a terminal. A task's ``note`` field comes
    last.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not (enabled and console.is_terminal),
    )


@contextlib.contextmanager
def steps_shown(
    enabled: bool, name: str, *, steps: int, start: int = 0, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, str], None]]:
    """Within this context, ``show(step, note)`` tells on stderr that a step is done.

    In a terminal there is a bar. Elsewhere a line is printed for the first step, for the last, and between
    them for every tenth of the steps or every minute, whichever is sooner. Both print once how long the run
    takes, as soon as some steps after the first are measured.

    - enabled: nothing is shown if false.
    - name: what the run does, beside the bar.
    - steps, start: of the whole run, and how many of them were taken earlier.
    - clock: seconds.
    """
    began = shown_at = clock()
    shown_step = start
    with progress_bar(enabled) as bar:
        task = bar.add_task(name, total=steps, completed=start, note="compiling")

        def show(step: int, note: str) -> None:
            nonlocal began, shown_step, shown_at
            if not enabled:
                return
            now, measured = clock(), step - start - 1
            if measured == 0:
                began = now  # the first step may wait for what is compiled
            each = (now - began) / measured if measured else None
            bar.update(task, completed=step, note=note)
            if measured == _TIMED_STEPS and each is not None and step < steps:
                print_line(f"time: about {duration(each * (steps - start))} for {steps - start} steps")
            due = step - shown_step >= steps / 10 or now - shown_at >= _LINE_SECONDS
            if bar.disable and (due or step in (start + 1, steps)):
                left = (
                    "" if each is None or step == steps else f", about {duration(each * (steps - step))} left"
                )
                print_line(f"step {step}/{steps}: {note}{left}")
                shown_step, shown_at = step, now

        yield show


def print_line(text: str) -> None:
    """A line on stderr. While a bar is shown it appears above: rich then stands in for ``sys.stderr``."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float | int) -> str:
    """A time in one unit, or two where one would be rough.

    >>> duration(7.4), duration(240), duration(3720), duration(200_000)
    ('7 s', '4 min', '1 h 2 min', '2 d 7 h')
    """
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
