"""The conformance suites on the device: pytest in a process of its own, and a verdict on how it ended."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUITES = {"attention": "tests/jsparse/test_attention.py", "decode": "tests/jsparse/test_decode.py"}

# A line of pytest -v, with xdist: "[gw0] [ 5%] PASSED tests/a.py::test_b", or without: "tests/a.py::test_b
# PASSED".
_OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|SKIPPED|ERROR) (\S+::.*)"
    r"|(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b.*)$"
)


def outcomes(log: str) -> dict[str, str]:
    """The outcome of each test by its id, from what ``pytest -v`` printed, complete or cut short.

    >>> outcomes("tests/a.py::test_b[causal, whole-x] PASSED [ 50%]\\n[gw1] [100%] FAILED tests/a.py::test_c")
    {'tests/a.py::test_b[causal, whole-x]': 'PASSED', 'tests/a.py::test_c': 'FAILED'}
    """
    found = {}
    for line in log.splitlines():
        if match := _OUTCOME.match(line):
            after, test, before_test, before = match.groups()
            found[(test or before_test).strip()] = after or before
    return found


def verdict(log: str, exit_code: int | None, implementation: str) -> dict[str, Any]:
    """{"passed": bool, "summary": text, "tests": {outcome: count}, "failures": ids}; exit_code None: cut
    short.

    Passed means: pytest ended with 0 and at least one test of this implementation ran. Anything else is not
    passed.
    """
    found = {test: outcome for test, outcome in outcomes(log).items() if implementation in test}
    counts = {outcome: list(found.values()).count(outcome) for outcome in sorted(set(found.values()))}
    listed = ", ".join(f"{count} {outcome.lower()}" for outcome, count in counts.items())
    failures = [test for test, outcome in found.items() if outcome in ("FAILED", "ERROR")]
    passed = exit_code == 0 and counts.get("PASSED", 0) > 0 and not failures
    if passed:
        summary = f"passed: {listed}"
    elif exit_code is None:
        summary = f"NOT FINISHED in its time: {listed or 'no test ended'}"
    elif not counts:
        summary = f"NOT RUN: no test for {implementation!r} was found (pytest ended with {exit_code})"
    else:
        summary = f"NOT PASSED: {listed} (pytest ended with {exit_code})"
    return {"passed": passed, "summary": summary, "tests": counts, "failures": failures}


def run_suite(
    tests: str, implementation: str, platform: str, seconds: float, *, root: Path = ROOT
) -> dict[str, Any]:
    """Runs a file of tests with ``implementation``, for at most ``seconds``; see :func:`verdict`.

    JSPARSE_TEST_IMPLEMENTATION tells the tests which implementation is meant. The project's pytest settings
    are left out: they name plugins that a machine with a GPU may lack.
    """
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        summary = "NOT RUN: pytest or hypothesis is not installed; nothing is known of this suite"
        return {"passed": False, "summary": summary, "tests": {}, "failures": []}
    # -P: the folder jsparse/ here is not the whole package, and must not come before the installed one.
    command = [sys.executable, "-P", "-m", "pytest", "-c", os.devnull, f"--rootdir={root}"]
    command += ["--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", "-v", "-rN", "--tb=short", "-k", implementation, tests]
    if importlib.util.find_spec("xdist") is not None and (cores := os.cpu_count() or 1) >= 8:
        command += ["--numprocesses", str(min(cores // 2, 6))]  # the tests mostly compile
    environment = os.environ | {
        "JSPARSE_TEST_IMPLEMENTATION": implementation,
        "JAX_PLATFORMS": platform,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "COLUMNS": "400",  # or long test names are cut
    }
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # to end it together with the processes that it starts
    )
    try:
        log, _ = process.communicate(timeout=max(seconds, 1))
        exit_code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
        exit_code = None
    found = verdict(log, exit_code, implementation)
    if not found["passed"]:
        print(log[-8000:], flush=True)
    return found
