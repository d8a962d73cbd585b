"""jsparse on a CPU beside torch, FlexAttention, onnxruntime and transformers, row by row.

    python benchmarks/cpu.py                            # all of it, 30 to 40 minutes on two cores
    python benchmarks/cpu.py --rows decode-pages selection --lengths 32768
    python benchmarks/cpu.py --peers-python OTHER/bin/python    # the peers live in another environment
    python benchmarks/cpu.py --markdown                 # the README's section, from the file of results

Needs jsparse installed, and for the peers ``pip install -e '.[bench]'``; a peer that is not there is reported
as an error. cpu_rows.py has the rows and the goals, cpu_ours.py and cpu_peers.py run in them.

Ours and the peers run in a process each, which take turns on all threads: one is blocked while the other
runs. Of all who do the same work the outputs are compared, and only then timed, in rounds A B C A B C; a
ratio is taken within a round, and its median, least and largest over the rounds are reported. So what slows
the machine down for a while slows both sides of a ratio. A timing lasts 0.1 s or one call. What takes longer
than 2 s a call has 3 rounds, and 2 from 8 s. Results are written after every row.

"other work": the peer computes more than ours (dense attention beside a sparse row), or ours is sparse beside
a dense model; then outputs are not compared.
"""

import argparse
import datetime
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cpu_report
from cpu_growth import exponent, peak_in_new_process
from cpu_inputs import visible_blocks
from cpu_rows import BLOCK, FLOOR, ROWS, Case, chosen_cases, sizes
from cpu_turns import Pace, Workplace, entry, measure
from cpu_workers import Worker, WorkerError, environment

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
SMALL_PACE = {"target_s": 0.002}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: every row was measured. 1: some were not, or peers are missing. 2: wrong input."""
    try:
        options = parse(arguments)
        cases = chosen_cases(options.rows, options.lengths, small=options.small)
    except ValueError as error:
        print(f"cpu.py: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        return cpu_report.write_readme(README, options.output)
    document = run(cases, options, sys.argv[1:] if arguments is None else arguments)
    cpu_report.print_table(document)
    cpu_report.draw(document, options.output.with_suffix(""))
    return 1 if any("error" in result for result in document[1:]) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises ValueError for a value that is not allowed."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/cpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--lengths", nargs="+", type=int, help="of the rows'; all of them by default")
    parser.add_argument("--rounds", type=int, default=7, help="of each pair; fewer of what is slow")
    parser.add_argument("--minutes", type=float, default=50.0, help="rows that are not reached are reported")
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable), help="runs the peers")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of either side; all cores")
    parser.add_argument(
        "--output", type=Path, default=HERE / "results" / "cpu.json", help="a .json file; plots lie beside it"
    )
    parser.add_argument("--markdown", action="store_true", help="write the README's section from the results")
    parser.add_argument(
        "--small", action="store_true", help="in miniature, to try it out: numbers mean nothing"
    )
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be an integer >= 1, not {getattr(options, name)}")
    if not options.minutes > 0:
        raise ValueError(f"--minutes must be a number > 0, not {options.minutes}")
    if options.output.suffix != ".json" or options.output.is_dir():
        raise ValueError(f"--output must be a .json file, not {options.output}")
    if not os.access(options.peers_python, os.X_OK) or options.peers_python.is_dir():
        raise ValueError(f"--peers-python must be a Python interpreter, not {options.peers_python}")
    if options.markdown and not options.output.exists():
        raise ValueError(
            f"--output must be a file of results for --markdown, but {options.output} is not there"
        )
    return options


def run(cases: Sequence[Case], options: argparse.Namespace, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The header and the results, which are in the file as well, after each case."""
    end = time.monotonic() + 60 * options.minutes
    settings = environment(options.threads)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sides = {"ours": sys.executable, "peers": str(options.peers_python)}
        workers = {
            side: Worker([python, str(HERE / f"cpu_{side}.py")], settings, folder / f"{side}.log")
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
                cpu_report.write(options.output, [header, *results])
                print(
                    f"{case.row} {case.length} {case.dtype}: {time.monotonic() - started:.0f} s", flush=True
                )
                for result in mine:
                    print(f"    {cpu_report.in_short(result)}", flush=True)
        finally:
            for worker in workers.values():
                worker.close()
    results += fitted(results)
    cpu_report.write(options.output, [header, *results])
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
            except Exception as error:  # no such files elsewhere than on Linux, or no time
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
    or torch, whichever was faster; None where neither was measured.
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
    options: argparse.Namespace, arguments: Sequence[str], settings: dict[str, str], both: dict[str, Any]
) -> dict[str, Any]:
    """On what, with what, when and how it was measured; no paths."""
    words = ["python", "benchmarks/cpu.py"]
    skip = False
    for word in arguments:
        name = word.split("=")[0]
        if not skip and name not in ("--output", "--peers-python"):
            words.append(word)
        skip = name in ("--output", "--peers-python") and "=" not in word
    return {
        "machine": f"{platform.system()} {platform.machine()}",
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


def processor() -> str:
    """The model of the CPU where Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
