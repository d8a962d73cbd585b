"""SIGTERM, which schedulers send before they take a machine away, and Ctrl-C, which is SIGINT."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np

_STOPPING = b"\njsparse: Ctrl-C: the run ends after this step, with a checkpoint; again to end it at once\n"


@contextlib.contextmanager
def stop_noted() -> Iterator[Callable[[], int]]:
    """Within this context neither SIGTERM nor the first Ctrl-C ends the process: ``asked()`` is the number of
    the signal that any process got, or 0. A second Ctrl-C raises KeyboardInterrupt.

    Several processes must all call ``asked`` at the same steps, and all get the same answer. Outside the main
    thread, where no signal arrives, this process notes none. SIGINT stays ignored where it was ignored, as in
    a job that a shell runs in the background.
    """
    noted = [0]

    def asked() -> int:
        if jax.process_count() == 1:
            return noted[0]
        from jax.experimental import multihost_utils

        return int(np.max(multihost_utils.process_allgather(np.array(noted[0]))))

    def terminate(*_):
        noted[0] = signal.SIGTERM

    def interrupt(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        noted[0] = noted[0] or signal.SIGINT
        with contextlib.suppress(OSError):
            os.write(2, _STOPPING)  # not print: the signal may come while something is printed

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    handlers = {signal.SIGTERM: terminate}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        handlers[signal.SIGINT] = interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped_by(number: int) -> str:
    """What ended a run, in words.

    >>> stopped_by(signal.SIGINT), stopped_by(signal.SIGTERM)
    ('Ctrl-C', 'SIGTERM')
    """
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
