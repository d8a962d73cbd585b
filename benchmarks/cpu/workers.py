"""The two processes of the CPU benchmark: ours, and the peers', which may run in another environment.

They take turns, and one is blocked while the other runs: neither disturbs the other with its threads or its
memory. A worker reads requests on its standard input and answers on its standard output, each as one line
of JSON:

    {"do": "make", "name": ..., "spec": ...}    makes a contender ready to run
    {"do": "outputs", "name": ..., "path": ...} computes once and saves the arrays as .npz
    {"do": "run", "name": ..., "repeats": n}    {"seconds": {metric: of one call}}
    {"do": "drop"}                              forgets all contenders
    {"do": "about"}                             {"versions": ...}

Whatever else a library prints goes to the worker's log. The answer is {"error": ...} if something failed.

The GPU benchmark has another protocol (gpu/workers.py): there one process runs all libraries, as they share
one device and its memory, and it is replaced when a kernel hangs or crashes.
"""

import contextlib
import dataclasses
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BENCHMARKS = Path(__file__).resolve().parents[1]  # workers run as modules of this folder: python -m cpu.ours


def environment(threads: int) -> dict[str, str]:
    """Settings of both workers. Fresh memory would cost page faults in every call, so freed memory is kept.

    Threads that wait for work spin for a while, as their libraries prefer. In a pause between turns they fall
    asleep.
    """
    count = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC", "PJRT_NPROC")
    return {name: str(threads) for name in count} | {
        "MALLOC_MMAP_THRESHOLD_": "4000000000",
        "MALLOC_TRIM_THRESHOLD_": "8000000000",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # more would be extra processes, which stay
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


# In a worker -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ready:
    """A contender that can run: run(repeats) gives the seconds of one call by metric, outputs() arrays [B, T,
    H, D] to compare, about() what is noted beside its results.
    """

    run: Callable[[int], Mapping[str, float]]
    outputs: Callable[[], Mapping[str, np.ndarray]]
    about: Callable[[], Mapping[str, Any]] = dict


def load(module: str) -> Any:
    """A module that may not be installed, and that the type checker does not know."""
    return importlib.import_module(module)


def repeated(call: Callable[[], Any]) -> Callable[[int], Mapping[str, float]]:
    """Times a call that returns when it is done. Before several calls, an untimed one wakes the threads."""

    def run(repeats: int) -> Mapping[str, float]:
        if repeats > 1:
            call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return {"call": (time.perf_counter() - start) / repeats}

    return run


def serve(make: Callable[[Mapping[str, Any]], Ready], packages: Sequence[str]) -> None:
    """Answers requests until there are no more."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    made: dict[str, Ready] = {}
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), made, make, packages)
        except Exception as error:  # of any library: the worker goes on
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text}"[:300]}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def _answer(request, made: dict[str, Ready], make, packages) -> Mapping[str, Any]:
    match request["do"]:
        case "make":
            made[request["name"]] = make(request["spec"])
        case "outputs":
            np.savez(request["path"], allow_pickle=False, **made[request["name"]].outputs())
        case "run":
            ready = made[request["name"]]
            return {"seconds": ready.run(request["repeats"]), "about": ready.about()}
        case "drop":
            made.clear()
            gc.collect()
        case "about":
            return {"versions": {"python": platform.python_version()} | _versions(packages)}
        case other:
            raise ValueError(f"do={other!r} is no request")
    return {}


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# In the parent -----------------------------------------------------------------------------------------


class WorkerError(Exception):
    """What a worker answered in place of a result, or how it ended."""


class Worker:
    """One of the two processes, started when it is first asked, and again after it ended."""

    def __init__(self, command: Sequence[str], settings: Mapping[str, str], log: Path):
        self.command, self.settings, self.log = list(command), dict(settings), log
        self.process: subprocess.Popen | None = None

    def ask(self, timeout: float, do: str, **request: Any) -> dict[str, Any]:
        """The answer to one request. WorkerError if it failed, or if none came within ``timeout`` seconds."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": do} | request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._ended()) from None
        if not select.select([process.stdout], [], [], max(timeout, 0.1))[0]:
            self.close()
            raise WorkerError(f"no answer in {timeout:.0f} s; the worker was ended")
        line = process.stdout.readline()
        if not line:
            raise WorkerError(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _start(self) -> None:
        self.close()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self.settings},
                cwd=BENCHMARKS,
                start_new_session=True,  # to end it together with the processes that it starts
            )

    def _ended(self) -> str:
        process = self.process
        code = None if process is None else process.wait()
        self.close()
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"the worker ended with exit code {code}: {' '.join(last)}"[:300]

    def close(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
