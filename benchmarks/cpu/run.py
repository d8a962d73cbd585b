"""jsparse on a CPU beside torch, FlexAttention, onnxruntime and transformers, row by row.

    python benchmarks/cpu                            # all of it, 30 to 40 minutes on two cores
    python benchmarks/cpu --rows decode-pages selection --lengths 32768
    python benchmarks/cpu --peers-python OTHER/bin/python    # the peers live in another environment
    python benchmarks/cpu --markdown                 # docs/results/cpu.md, from the file of results

Needs jsparse installed, and for the peers ``pip install -e '.[bench]'``; a peer that is missing is reported
as an error. rows.py has the rows and the goals; ours.py and peers.py have the contenders.

Ours and the peers run in one process each. The processes take turns on all threads: one is blocked while the
other runs. The outputs of all contenders that do the same work are compared first; then they are timed, in
rounds A B C A B C. A ratio is taken within a round, and its median, least and largest over the rounds are
reported, so what slows the machine down for a while slows both sides of a ratio. A timing lasts 0.1 s or one
call. Calls that take longer than 2 s have 3 rounds, and from 8 s on 2. Results are written after every row.

"other work": the peer computes more than ours (dense attention beside a sparse row), or ours is sparse beside
a dense model. Outputs are not compared then.
"""

import dataclasses
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from sections import PAGES

from cpu import report
from cpu.growth import exponent, peak_in_new_process
from cpu.inputs import visible_blocks
from cpu.rows import BLOCK, FLOOR, Case, chosen_cases, sizes
from cpu.turns import Pace, Workplace, entry, measure
from cpu.workers import Worker, WorkerError, environment
from jsparse.integers import require_integer
from jsparse.reports.console import write_json_whole
from jsparse.reports.machine import processor, system

HERE = Path(__file__).resolve().parent
SMALL_PACE = {"target_s": 0.002}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CpuBench:
    """What is measured, how often, and where the results go."""

    rows: tuple[str, ...] | None = None
    """Rows to measure (default: all)."""
    lengths: tuple[int, ...] | None = None
    """Lengths to measure, among those of the rows (default: all of them)."""
    rounds: int = 7
    """Rounds for each pair; slow calls have fewer."""
    minutes: float = 50.0
    """Time limit; rows that are not reached are reported."""
    peers_python: Path = Path(sys.executable)
    """The interpreter that runs the peers."""
    threads: int = os.cpu_count() or 1
    """Threads of either side (default: all cores)."""
    output: Path = HERE.parent / "results" / "cpu.json"
    """A .json file; plots are written into a folder of the same name beside it."""
    markdown: bool = False
    """Measure nothing: write docs/results/cpu.md and the full table from the file of results."""
    small: bool = False
    """In miniature, to try it out: the numbers mean nothing."""

    def check(self) -> None:
        """ValueError for a value that is not allowed; called apart, as tyro breaks the lines of messages."""
        for name in ("rounds", "threads"):
            require_integer(f"--{name}", getattr(self, name))
        if not self.minutes > 0:
            raise ValueError(f"--minutes must be a number > 0, not {self.minutes}")
        if self.output.suffix != ".json" or self.output.is_dir():
            raise ValueError(f"--output must be a .json file, not {self.output}")
        if not os.access(self.peers_python, os.X_OK) or self.peers_python.is_dir():
            raise ValueError(f"--peers-python must be a Python interpreter, not {self.peers_python}")
        if self.markdown and not self.output.exists():
            raise ValueError(
                f"--output must be a file of results for --markdown, but {self.output} does not exist"
            )


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: every row was measured. 1: some were not, or peers are missing. 2: wrong input."""
    try:
        options = tyro.cli(CpuBench, prog="benchmarks/cpu", description=__doc__, args=arguments)
        options.check()
        cases = chosen_cases(options.rows, options.lengths, small=options.small)
    except ValueError as error:
        print(f"benchmarks/cpu: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        report.write_page(PAGES / "cpu.md", options.output)
        return 0
    document = run_cases(cases, options, sys.argv[1:] if arguments is None else arguments)
    report.print_table(document)
    report.draw(document, options.output.with_suffix(""))
    return 1 if any("error" in result for result in document[1:]) else 0


def run_cases(cases: Sequence[Case], options: CpuBench, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The header and the results, which are also written to the file after each case."""
    end = time.monotonic() + 60 * options.minutes
    settings = environment(options.threads)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sides = {"ours": sys.executable, "peers": str(options.peers_python.absolute())}
        workers = {
            side: Worker([python, "-m", f"cpu.{side}"], settings, folder / f"{side}.log")
            for side, python in sides.items()
        }
        try:
            header = describe(options, arguments, settings, versions(workers))
            pace = Pace(rounds=options.rounds, **(SMALL_PACE if options.small else {}))
            at = Workplace(workers, folder, options.small, pace, lambda: end - time.monotonic())
            for case in cases:
                started = time.monotonic()
                mine = (
                    not_run(case, "not run: the time was used up")
                    if started > end
                    else run_case(case, at, results)
                )
                results += mine
                write_json_whole(options.output, [header, *results])
                print(
                    f"{case.row} {case.length} {case.dtype}: {time.monotonic() - started:.0f} s", flush=True
                )
                for result in mine:
                    print(f"    {report.in_short(result)}", flush=True)
        finally:
            for worker in workers.values():
                worker.close()
    results += fitted(results)
    write_json_whole(options.output, [header, *results])
    return [header, *results]


def run_case(case: Case, at: Workplace, before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    try:
        measured = measure(case, at)
    except WorkerError as error:
        return not_run(case, str(error))
    floor = floor_seconds(case, before, at.small)
    results = [entry(case, pair, measured, floor, at.pace) for pair in case.pairs]
    if case.row == "growth":
        for result in results:
            try:
                timeout = max(at.seconds_left(), 0) + 60
                result["peak_bytes"] = peak_in_new_process(
                    result["ours"], case.length, small=at.small, timeout=timeout
                )
            except Exception as error:  # such files exist only on Linux; or no time is left
                result["note"] = f"memory was not measured: {type(error).__name__}: {error}"[:300]
    return results


def not_run(case: Case, why: str) -> list[dict[str, Any]]:
    nothing = {"ratio_median": None, "ratio_min": None, "ratio_max": None, "error": why}
    return [
        {"row": pair.row, "length": case.length, "dtype": case.dtype, "ours": pair.ours, "peer": pair.peer}
        | nothing
        for pair in case.pairs
    ]


def floor_seconds(case: Case, results: Sequence[dict[str, Any]], small: bool) -> float | None:
    """What the products of the visited blocks take at the rate of a large matrix product in this run, by jax
    or torch, whichever was faster; None if neither was measured.
    """
    if not any(pair.peer == FLOOR for pair in case.pairs):
        return None
    products = [result for result in results if (result["row"], result["dtype"]) == ("matmul", case.dtype)]
    times = [result[name] / 1e3 for result in products for name in ("ours_ms", "peer_ms") if name in result]
    if not times:
        return None
    of = sizes(small)
    rate = 2 * of.matmul**3 / min(times)
    streams = visible_blocks(case.length, of.sink, of.window)[0].sum()
    causal = visible_blocks(case.length, 0, None)[0].sum()
    half = of.heads // 2 if case.row == "prefill-half" else 0
    blocks = half * causal + (of.heads - half) * streams
    return float(4 * of.dim * BLOCK**2 * blocks / rate)


def fitted(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How time and memory grow with the length: exponents of what was measured at three lengths or more, or
    at two in miniature.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        if result["row"] in ("growth", "generate-token") and "ours_ms" in result:
            groups.setdefault((result["row"], result["ours"]), []).append(result)
    fits = []
    for (row, ours), points in groups.items():
        lengths = [point["length"] for point in points]
        if len(set(lengths)) < 2:
            continue
        fit = {"row": f"{row}, exponents", "length": max(lengths), "dtype": "float32", "ours": ours}
        fit |= {"peer": "none", "ratio_median": None, "ratio_min": None, "ratio_max": None}
        fit["time_exponent"] = exponent(lengths, [point["ours_ms"] for point in points])
        weighed = [point for point in points if point.get("peak_bytes", 0) > 0]
        if len({point["length"] for point in weighed}) > 1:
            sizes_of = [point["length"] for point in weighed], [point["peak_bytes"] for point in weighed]
            fit["memory_exponent"] = exponent(*sizes_of)
        fits.append(fit | {"note": f"fitted from {min(lengths)} to {max(lengths)} tokens"})
    return fits


def versions(workers: dict[str, Worker]) -> dict[str, Any]:
    found = {}
    for side, worker in workers.items():
        try:
            found[side] = worker.ask(120, "about")["versions"]
        except WorkerError as error:
            found[side] = {"error": str(error)}
    return found


def describe(
    options: CpuBench, arguments: Sequence[str], settings: dict[str, str], both: dict[str, Any]
) -> dict[str, Any]:
    """On what, with what, when and how it was measured; no paths."""
    words = ["python", "benchmarks/cpu"]
    skip = False
    for word in arguments:
        name = word.split("=")[0]
        if not skip and name not in ("--output", "--peers-python"):
            words.append(word)
        skip = name in ("--output", "--peers-python") and "=" not in word
    return {
        "machine": system(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "versions": both,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(words),
        "settings": settings,
        "rounds": options.rounds,
        "small": options.small,
    }
