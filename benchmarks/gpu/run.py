"""The GPU kernels measured: jsparse, cuDNN through JAX, torch SDPA, FlexAttention, and the floor, row by row.

    python benchmarks/gpu                      # all of it, at most 9 minutes on an H100 or H200
    python benchmarks/gpu --rows G1,G6 --lengths 8192,32768 --no-tests
    python benchmarks/gpu --markdown           # docs/results/gpu.md, from the file of results
    python benchmarks/gpu --smoke              # in miniature on a CPU, to try it out: numbers mean nothing

Needs jsparse installed (``pip install -e .``), and for the peers torch with Triton; a peer that is missing is
reported as an error. rows.py has the rows, peers.py and cache_peers.py have the contenders, and contest.py
compares and times them.

First the conformance suites run on the device (conformance.py), then the rows, the most telling first. In
each row the outputs of all that do the same work are compared first; then they are timed. Results are written
after every row.

How time is taken, for JAX and torch alike: by the host's clock from the first of several launches to the end
of the last (one wait), divided by the number of computations launched; about 50 ms each time. Whole
sequences: launches follow one another and return before the device has finished, so there are no gaps.
Single queries, which take microseconds: a launch is a chain of steps (one XLA program; one CUDA graph), each
on other pages of the cache and with the output of the step before. What is read is not in L2: inputs take
turns, and together they are far larger. Contenders run in turns, A B C A B C; a ratio is taken within a turn,
and its median, least and largest over the turns are reported.
"""

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from sections import PAGES, number, write_section

from gpu import conformance, report, rows, workers
from gpu.contest import entry, work_through
from gpu.rows import Row
from jsparse.reports.console import write_json_whole
from jsparse.reports.figures import can_draw
from jsparse.reports.machine import installed_versions, system, today

HERE = Path(__file__).resolve().parent
SUITE_SECONDS = {"attention": 170.0, "decode": 70.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuBench:
    """What is measured, and where the results go."""

    rows: tuple[str, ...] | None = None
    """Rows to measure, for example G1,G9 (default: all)."""
    lengths: tuple[str, ...] | None = None
    """Lengths to measure, for example 8192,32768 (default: each row's own)."""
    out: Path | None = None
    """The file of results (default: results/h200.json on an H200, or h200-part.json for a part)."""
    minutes: float = 9.0
    """Time limit; rows that do not fit are left out, and listed."""
    no_tests: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Skip the conformance suites; the results say so."""
    implementation: str | None = None
    """Implementation of jsparse (default: mosaic_gpu)."""
    markdown: bool = False
    """Measure nothing: write docs/results/gpu.md from the file of results."""
    smoke: bool = False
    """In miniature, on a CPU: the numbers mean nothing."""
    worker: int | None = None
    """For the benchmark's own processes: the first row of the worker."""
    without: tuple[str, ...] = ()
    """For the benchmark's own processes: peers to leave out of that row."""

    def row_names(self) -> list[str] | None:
        return None if self.rows is None else ",".join(self.rows).split(",")

    def row_lengths(self) -> list[int] | None:
        return None if self.lengths is None else [int(text) for text in ",".join(self.lengths).split(",")]

    def selected(self) -> list[Row]:
        """The rows to measure. ValueError for a name or a length that is not allowed."""
        chosen = rows.chosen_rows(self.row_names(), self.row_lengths())
        return [rows.shrunk(row) for row in chosen] if self.smoke else chosen

    @property
    def results(self) -> Path:
        """``out`` with its default filled in."""
        part = (self.rows is not None or self.lengths is not None or self.no_tests) and not self.markdown
        return self.out or default_file(query_gpu("name"), self.smoke, part)

    @property
    def measured_implementation(self) -> str:
        """``implementation`` with its default filled in."""
        return self.implementation or ("xla" if self.smoke else "mosaic_gpu")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: every suite passed and every row was measured. 2: wrong input."""
    options = tyro.cli(GpuBench, prog="benchmarks/gpu", description=__doc__, args=arguments)
    if options.markdown:
        write_page(PAGES / "gpu.md", options.results)
        return 0
    try:
        selected = options.selected()
    except ValueError as error:
        print(error)
        return 2
    if options.worker is not None:
        return work_through(selected[options.worker :], options)
    if not options.smoke and shutil.which("nvidia-smi") is None:
        print("no NVIDIA GPU was found (no nvidia-smi); --smoke tries the benchmark out without one")
        return 2

    end = time.monotonic() + 60 * options.minutes
    header = describe_run(arguments)
    header |= {"smoke": options.smoke, "implementation": options.measured_implementation}
    for suite, tests in conformance.SUITES.items():
        header["conformance"][suite] = run_suite(suite, tests, options, end - time.monotonic())
        print(f"conformance, {suite}: {header['conformance'][suite]['summary']}", flush=True)
    results = run_rows(selected, options, header, end)

    report.print_table(header, results, {row.name: row.goal for row in selected})
    if can_draw(f"{options.results.stem}.png"):
        report.draw(header, results, options.results)
    ended_well = all(suite["passed"] for suite in header["conformance"].values()) and not header["left_out"]
    return 0 if ended_well and not any("error" in result for result in results) else 1


def default_file(gpu: str, smoke: bool, part: bool) -> Path:
    """Named after the GPU and after what was measured: a part never takes the place of the whole.

    >>> default_file("NVIDIA H100 80GB HBM3", smoke=False, part=True).name
    'h100-part.json'
    """
    model = re.search(r"\b[A-Z]+\d+\b", gpu)
    name = "smoke" if smoke else model.group().lower() if model else "h200"
    return HERE.parent / "results" / f"{name}{'-part' if part and not smoke else ''}.json"


def query_gpu(what: str) -> str:
    """What nvidia-smi says of the first GPU; "" without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]


def run_suite(suite: str, tests: str, options: GpuBench, seconds_left: float) -> dict[str, Any]:
    if options.no_tests:
        return {"passed": False, "summary": "NOT RUN (--no-tests)", "tests": {}, "failures": []}
    where = "cpu" if options.smoke else "cuda"
    seconds = min(SUITE_SECONDS[suite], seconds_left)
    return conformance.run_suite(tests, options.measured_implementation, where, seconds)


def run_rows(
    selected: list[Row], options: GpuBench, header: dict[str, Any], end: float
) -> list[dict[str, Any]]:
    """The results of the rows; the header gets the device, its ceilings and the rows that were left out."""
    results: list[dict[str, Any]] = []

    def command(first: int, without: Sequence[str]) -> list[str]:
        out = [sys.executable, str(HERE), "--worker", str(first)]
        out += [
            "--minutes",
            str((end - time.monotonic()) / 60),
            "--implementation",
            options.measured_implementation,
        ]
        out += ["--rows", *options.rows] if options.rows else []
        out += ["--lengths", *options.lengths] if options.lengths else []
        out += ["--without", *without] if without else []
        return out + ["--smoke"] * options.smoke

    def save() -> None:
        write_json_whole(options.results, {"header": header, "results": results})

    def finished(of_the_row) -> None:
        results.extend(of_the_row)
        for result in of_the_row:
            shown = result.get("error") or f"{number(result['time_us'])} µs"
            print(f"{result['row']} {result['length']} {result['peer']}: {shown}", flush=True)
        save()

    save()
    ended = workers.run(
        command,
        len(selected),
        failed=lambda row, peer, why: entry(selected[row], peer or "jsparse", error=why),
        started=lambda message: header.update(message),
        finished=finished,
        seconds_left=lambda: end - time.monotonic(),
        environment={
            # Both libraries take memory as they need it, and leave room for each other.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6",
            "JAX_PLATFORMS": "cpu" if options.smoke else "cuda",
        },
    )
    header["left_out"] = [f"{row.name} at {row.length}" for row in selected[ended:]]
    save()
    return results


def describe_run(arguments: list[str] | None) -> dict[str, Any]:
    """The header of the results, as far as it is known before anything ran; no paths."""
    given = sys.argv[1:] if arguments is None else arguments
    names = ("jax", "jaxlib", "torch", "triton", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "numpy")
    versions = {"python": platform.python_version()} | installed_versions(names)
    if driver := query_gpu("driver_version"):
        versions["driver"] = driver
    return {
        "command": re.sub(r" --out[ =]\S+", "", " ".join(["python benchmarks/gpu", *given])),
        "date": today(),
        "machine": f"{system()}, {os.cpu_count()} cores",
        "device": "unknown",
        "versions": versions,
        "ceilings": None,
        "conformance": {},
        "left_out": [],
    }


def write_page(page: Path, results: Path) -> None:
    """Replaces the section of the page; without results it says that nothing is measured yet."""
    document = report.read(results) if results.exists() else None
    write_section(page, report.markdown(document, rows.ROWS), report.BEGIN)
