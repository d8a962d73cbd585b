"""SIGTERM, which schedulers send before they take a machine away."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np


@contextlib.contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Within this context SIGTERM does not end the process: ``asked()`` says whether any process got it.

    Several processes must all call ``asked`` at the same steps, and all get the same answer. Outside the main
    thread, where no signal arrives, this process notes none.
    """
    noted = threading.Event()

    def asked() -> bool:
        if jax.process_count() == 1:
            return noted.is_set()
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array(noted.is_set()))))

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noted.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
