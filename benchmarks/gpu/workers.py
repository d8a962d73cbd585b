"""Rows in a process of their own: a kernel that hangs or crashes costs its row and not the run.

A worker is this benchmark once more, told where in the list of rows to begin. It reports in lines of JSON on
its standard output, each behind a mark:

    {"device": ..., "ceilings": ...}       once, at the start
    {"doing": "G4: torch Flex", "peer": "torch Flex"}    before each step; with the peer whose step it is
    {"done": [results of the row]}         after each row; then it goes on with the next, or ends

If it ends early, or says nothing for too long, a new worker goes on. If that was in the step of a peer, the
row is tried again without that peer, which gets an error. Otherwise the row gets one, and the next row runs.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

MARK = "\x1e"


def tell(message: Mapping[str, Any]) -> None:
    """In a worker: a message for :func:`run`."""
    print(f"{MARK}{json.dumps(message)}", flush=True)


def run(
    command: Callable[[int, Sequence[str]], Sequence[str]],
    count: int,
    *,
    failed: Callable[[int, str | None, str], Mapping[str, Any]],
    started: Callable[[Mapping[str, Any]], None],
    finished: Callable[[Sequence[Mapping[str, Any]]], None],
    seconds_left: Callable[[], float],
    silence_s: float = 100.0,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Runs rows 0 to count - 1 in workers ``command(first row, peers to leave out of it)``.

    Each row ends in one call of ``finished`` with its results: the worker's, and ``failed(row, peer, why)``
    of peers that broke it; peer None stands for the row itself. Returns how many rows were ended. Those from
    this number on were not run, because the time was used up or no worker could be started.
    """
    row, began = 0, time.monotonic()
    without: dict[str, str] = {}  # peers that broke the row in hand, and how
    while row < count and seconds_left() > 0:
        said, doing, peer, why = False, "starting", None, "the process ended"
        process = subprocess.Popen(
            command(row, tuple(without)),
            text=True,
            stdout=subprocess.PIPE,
            env=None if environment is None else {**os.environ, **environment},
            start_new_session=True,  # to end it together with the processes that it starts
        )
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=lambda out=process.stdout, to=lines: [to.put(line) for line in out])
        reader.start()
        try:
            for message in _messages(process, reader, lines, silence_s, seconds_left):
                if "device" in message:
                    said = True
                    started(message)
                elif "doing" in message:
                    doing, peer = message["doing"], message.get("peer")
                    print(f"{time.monotonic() - began:4.0f} s  {doing}", flush=True)
                else:
                    finished([*message["done"], *(failed(row, *each) for each in without.items())])
                    row, doing, without = row + 1, "", {}
                    if row == count:
                        break
        except TimeoutError as error:
            why = str(error)
        finally:
            _end(process, reader, grace_s=5.0 if why == "the process ended" else 0.0)
        if doing and seconds_left() > 0:  # it ended in the middle of a row, or before the first
            if not said:
                print(f"no worker could be started: {why} (exit code {process.returncode})", flush=True)
                break
            why = f"while doing {doing}: {why} (exit code {process.returncode})"
            if peer is not None and peer not in without:
                without[peer] = why
            else:
                finished([failed(row, None, why), *(failed(row, *each) for each in without.items())])
                row, without = row + 1, {}
    return row


def _messages(
    process: subprocess.Popen,
    reader: threading.Thread,
    lines: queue.Queue[str],
    silence_s: float,
    seconds_left: Callable[[], float],
) -> Iterator[Mapping[str, Any]]:
    """What the process says, until it ends. TimeoutError: silent for too long, or the time is used up."""
    heard = time.monotonic()
    while True:
        # Asked first, or a last line could be lost. Processes that it leaves behind keep the pipe open.
        ended = process.poll() is not None or not reader.is_alive()
        try:
            line = lines.get(timeout=0.2)
        except queue.Empty:
            if ended:
                return
            if seconds_left() <= 0:
                raise TimeoutError("the time was used up") from None
            if time.monotonic() - heard > silence_s:
                raise TimeoutError(f"no answer for {silence_s:.0f} s") from None
            continue
        if line.startswith(MARK):
            heard = time.monotonic()
            yield json.loads(line[len(MARK) :])
        else:
            print(line, end="", flush=True)


def _end(process: subprocess.Popen, reader: threading.Thread, grace_s: float) -> None:
    """Waits for the process to exit by itself, then kills it and all that it left behind."""
    try:
        process.wait(timeout=grace_s)
    except subprocess.TimeoutExpired:
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reader.join()
    if process.stdout is not None:
        process.stdout.close()
