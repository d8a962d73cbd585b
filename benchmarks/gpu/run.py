"""The GPU kernels measured: jsparse, cuDNN through JAX, torch SDPA, FlexAttention, and the floor, row by row.

    python benchmarks/gpu.py                      # all of it, at most 9 minutes on an H100 or H200
    python benchmarks/gpu.py --rows G1,G6 --lengths 8192,32768 --no-tests
    python benchmarks/gpu.py --markdown           # the README's section, from the file of results
    python benchmarks/gpu.py --smoke              # in miniature on a CPU, to try it out: numbers mean nothing

Needs jsparse installed (``pip install -e .``), and for the peers torch with Triton; a peer that is not there
is reported as an error. rows.py has the rows, peers.py and cache_peers.py who runs in them, measure.py how
they are timed.

First the conformance suites run on the device (conformance.py), then the rows, the most telling first. In
each row the outputs of all who do the same work are compared, and only then timed. Results are written after
every row.

How time is taken, for JAX and torch alike: by the host's clock from the first of several launches to the end
of the last (one wait), divided by the computations launched; about 50 ms each time. Whole sequences: launches
one after another, which return before the device has done them, so that no gap is between them. Single
queries, which take microseconds: a launch is a chain of steps (one XLA program; one CUDA graph), each on
other pages of the cache and with the output of the step before. So what is read was not read lately: inputs
take turns and are far larger than L2 together. Contenders run in turns, A B C A B C; a ratio is taken within
a turn, and its median, least and largest over the turns are reported.
"""

import argparse
import datetime
import gc
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import conformance
import report
import rows as table
import workers
from measure import Ceilings, Contender, Work, agreement, alternate, describe, judge, ratios

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 2e-2  # of bfloat16 outputs, relative, in the worst tile
# What Python raises before anything is launched, or after: the device is as it was.
HARMLESS = ("NotImplementedError", "ModuleNotFoundError", "ValueError", "TypeError", "ArithmeticError")
SUITE_SECONDS = {"attention": 170.0, "decode": 70.0}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: every suite passed and every row was measured."""
    options = parse(arguments)
    if options.markdown:
        return write_readme(options.out)
    try:
        selected = table.chosen_rows(options.rows, options.lengths)
    except ValueError as error:
        print(error)
        return 2
    if options.smoke:
        selected = [table.shrunk(row) for row in selected]
    if options.worker is not None:
        return work_through(selected[options.worker :], options)
    if not options.smoke and shutil.which("nvidia-smi") is None:
        print("no NVIDIA GPU was found (no nvidia-smi); --smoke tries the benchmark out without one")
        return 2

    end = time.monotonic() + 60 * options.minutes
    header = describe_run(arguments)
    header |= {"smoke": options.smoke, "implementation": options.implementation}
    for suite, tests in conformance.SUITES.items():
        header["conformance"][suite] = run_suite(suite, tests, options, end - time.monotonic())
        print(f"conformance, {suite}: {header['conformance'][suite]['summary']}", flush=True)
    results = run_rows(selected, options, header, end)

    report.print_table(header, results, {row.name: row.goal for row in selected})
    try:
        report.draw(header, results, options.out)
    except ImportError as error:
        print(f"no plot was drawn: {error} (pip install 'jsparse[plot]')")
    ended_well = all(suite["passed"] for suite in header["conformance"].values()) and not header["left_out"]
    return 0 if ended_well and not any("error" in result for result in results) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--rows", type=lambda text: text.split(","), help="for example G1,G9; all by default")
    parser.add_argument("--lengths", type=numbers, help="for example 8192,32768; each row's own by default")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="the file of results; by default results/h200.json on an H200, or h200-part.json for a part",
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="rows that do not fit are left out, and listed"
    )
    parser.add_argument(
        "--no-tests", action="store_true", help="skip the conformance suites; the results say so"
    )
    parser.add_argument("--implementation", default=None, help="of jsparse; mosaic_gpu by default")
    parser.add_argument("--markdown", action="store_true", help="write the README's section from the results")
    parser.add_argument("--smoke", action="store_true", help="in miniature, on a CPU")
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    part = options.rows is not None or options.lengths is not None or options.no_tests
    options.out = options.out or default_file(query_gpu("name"), options.smoke, part and not options.markdown)
    options.implementation = options.implementation or ("xla" if options.smoke else "mosaic_gpu")
    return options


def default_file(gpu: str, smoke: bool, part: bool) -> Path:
    """Named after the GPU, and after what was measured, so that a part never takes the place of the whole.

    >>> default_file("NVIDIA H100 80GB HBM3", smoke=False, part=True).name
    'h100-part.json'
    """
    model = re.search(r"\b[A-Z]+\d+\b", gpu)
    name = "smoke" if smoke else model.group().lower() if model else "h200"
    return Path(__file__).resolve().parent / "results" / f"{name}{'-part' if part and not smoke else ''}.json"


def query_gpu(what: str) -> str:
    """What nvidia-smi says of the first GPU, "" without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]


def run_suite(suite: str, tests: str, options: argparse.Namespace, seconds_left: float) -> dict[str, Any]:
    if options.no_tests:
        return {"passed": False, "summary": "NOT RUN (--no-tests)", "tests": {}, "failures": []}
    where = "cpu" if options.smoke else "cuda"
    seconds = min(SUITE_SECONDS[suite], seconds_left)
    return conformance.run_suite(tests, options.implementation, where, seconds)


def run_rows(
    selected: list[table.Row], options: argparse.Namespace, header: dict[str, Any], end: float
) -> list[dict[str, Any]]:
    """The results of the rows; the header gets the device, its ceilings and the rows that were left out."""
    results: list[dict[str, Any]] = []

    def command(first: int, without: Sequence[str]) -> list[str]:
        out = [
            sys.executable,
            __file__,
            "--worker",
            str(first),
            "--minutes",
            str((end - time.monotonic()) / 60),
        ]
        out += ["--implementation", options.implementation]
        out += ["--rows", ",".join(options.rows)] if options.rows else []
        out += ["--lengths", ",".join(map(str, options.lengths))] if options.lengths else []
        out += [f"--without={peer}" for peer in without]
        return out + ["--smoke"] * options.smoke

    def save() -> None:
        report.write(options.out, header, results)

    def finished(of_the_row) -> None:
        results.extend(of_the_row)
        for result in of_the_row:
            shown = result.get("error") or f"{report.number(result['time_us'])} µs"
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
    given = sys.argv[1:] if arguments is None else arguments
    names = ("jax", "jaxlib", "torch", "triton", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "numpy")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if driver := query_gpu("driver_version"):
        versions["driver"] = driver
    return {
        "command": re.sub(r" --out[ =]\S+", "", " ".join(["python benchmarks/gpu.py", *given])),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": "unknown",
        "versions": versions,
        "ceilings": None,
        "conformance": {},
        "left_out": [],
    }


def write_readme(results: Path) -> int:
    readme = ROOT / "README.md"
    document = report.read(results) if results.exists() else None
    readme.write_text(report.put_between(readme.read_text(), report.markdown(document, table.ROWS)))
    return 0


# In a worker -------------------------------------------------------------------------------------------


def work_through(selected: list[table.Row], options: argparse.Namespace) -> int:
    """Measures row after row; ends after one that may have broken the device for the others."""
    import jax
    from peers import Setup

    end = time.monotonic() + 60 * options.minutes
    setup = Setup(options.implementation, gpu=not options.smoke)
    if setup.gpu and jax.default_backend() != "gpu":
        print(f"jax finds no GPU: its default backend is {jax.default_backend()!r}", flush=True)
        return 1
    ceilings = measure_ceilings(setup)
    device = jax.devices()[0].device_kind
    workers.tell(
        {
            "device": device,
            "ceilings": {"flops": ceilings.flops, "bytes": ceilings.bytes, "exps": ceilings.exps},
        }
    )
    for i, row in enumerate(selected):
        workers.tell({"doing": f"{row.name}: its inputs"})
        without = options.without if i == 0 else []
        results = run_row(row, setup, ceilings, lambda: end - time.monotonic(), without)
        workers.tell({"done": results})
        if any("error" in result and not result["error"].startswith(HARMLESS) for result in results):
            return 1
        gc.collect()
        if setup.gpu and "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
    return 0


def measure_ceilings(setup) -> Ceilings:
    """A large matrix product and a large copy, through XLA; exponentials are counted, not measured."""
    import jax
    import jax.numpy as jnp
    from peers import random_normal

    side, elements = (8192, 2**30) if setup.gpu else (256, 2**20)
    a, b = (random_normal(i, side, side) for i in range(2))
    bits = jnp.arange(elements, dtype=jnp.uint32)
    product, copy = jax.jit(lambda a, b: a @ b), jax.jit(lambda x: x ^ 1)
    pair = [
        Contender("product", lambda: product(a, b), jax.block_until_ready, dict, Work(flops=2.0 * side**3)),
        Contender("copy", lambda: copy(bits), jax.block_until_ready, dict, Work(bytes=8.0 * elements)),
    ]
    times, errors = alternate(pair, rounds=7)
    if errors:
        raise RuntimeError(f"the ceilings could not be measured: {errors}")
    middle = {name: sorted(each)[len(each) // 2] for name, each in times.items()}
    flops, moved = (2.0 * side**3 / middle["product"] * 1e6, 8.0 * elements / middle["copy"] * 1e6)
    return Ceilings(flops=flops, bytes=moved, exps=table.EXPS)


def run_row(
    row: table.Row, setup, ceilings: Ceilings, seconds_left: Callable[[], float], without: Sequence[str]
) -> list[dict[str, Any]]:
    """The row's results, ours first: built and run once each, compared, then timed in turns."""
    import cache_peers
    import peers

    try:
        match row:
            case table.Prefill():
                makers = peers.prefill(row, setup)
            case table.Decode():
                makers = cache_peers.decode(row, setup)
            case table.Select():
                makers = cache_peers.select(row, setup)
    except Exception as error:
        return [entry(row, peers.OURS, error=describe(error))]
    makers = {name: make for name, make in makers.items() if name not in without}
    pace = {} if setup.gpu else {"rounds": 3, "target_s": 0.002}
    last_resort = setup.last_resort[0]
    return compete(
        row,
        makers,
        peers.OURS,
        last_resort,
        ceilings,
        seconds_left,
        tell=workers.tell,
        check_device=peers.check_device,
        **pace,
    )


def compete(
    row: table.Row,
    makers: Mapping[str, Callable[[], Contender]],
    ours: str,
    last_resort: str,
    ceilings: Ceilings,
    seconds_left: Callable[[], float],
    rounds: int = 9,
    target_s: float = 0.05,
    tell: Callable[[Mapping[str, Any]], None] = lambda message: None,
    check_device: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Every contender once, compared, and then timed in turns; ``last_resort`` only if nobody else can be
    compared with ours.
    """
    built, outputs, errors = {}, {}, {}
    for name, make in makers.items():
        if name == last_resort and len(outputs) > 1:
            continue
        whose = {} if name == ours else {"peer": name}
        tell({"doing": f"{row.name}: {name}, first run"} | whose)
        try:
            built[name] = make()
            if built[name].same_work:
                outputs[name] = built[name].outputs()
            built[name].wait(built[name].launch())
        except Exception as error:
            errors[name] = describe(error)
            if not errors[name].startswith(HARMLESS):
                tell({"doing": f"{row.name}: {name}, which failed ({errors[name]})"} | whose)
                check_device()  # or this worker ends here, and another goes on without the peer
            if name == ours:
                break  # nobody to compare with
    if ours not in errors:
        tell({"doing": f"{row.name}: comparing outputs"})
        try:
            errors |= judge(agreement(outputs, ours), TOLERANCE)
        except Exception as error:
            errors[ours] = describe(error)
    outputs.clear()
    if ours in errors:
        return [entry(row, name, error=errors[name]) for name in makers if name in errors]

    tell({"doing": f"{row.name}: timing in turns"})
    running = [contender for name, contender in built.items() if name not in errors]
    times, broken = alternate(running, rounds=rounds, target_s=target_s, seconds_left=seconds_left)
    errors |= broken
    results = []
    for name in [name for name in makers if name in errors or name in times]:
        if name in errors:
            results.append(entry(row, name, error=errors[name]))
        elif ours in errors:
            results.append(entry(row, name, error="ours failed while it was timed"))
        else:
            results.append(
                measured(row, built[name], times[name], ratios(times[ours], times[name]), ceilings)
            )
    return results


def measured(
    row: table.Row, contender, times: list[float], ratio: dict, ceilings: Ceilings
) -> dict[str, Any]:
    time_us = sorted(times)[len(times) // 2]
    return entry(
        row,
        contender.name,
        same_work=contender.same_work,
        **ratio,
        time_us=time_us,
        **contender.work.rate(time_us),
        floor_us=table.work(row).floor_us(ceilings),
    )


def entry(row: table.Row, peer: str, **values) -> dict[str, Any]:
    return {"row": row.name, "length": row.length, "dtype": row.dtype, "peer": peer, **values}


if __name__ == "__main__":
    sys.exit(main())
