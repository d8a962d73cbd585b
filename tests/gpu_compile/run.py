"""Compiles the GPU kernels, and whole programs that call them, for H200s this machine does not have.

    python tests/gpu_compile/run.py [kernels] [programs] [--short]

Prints registers, spills and shared memory of every kernel, at every choice of tiles, and the bytes per device
that a training step and a decode loop need. With --short, kernels are compiled only at the tiles that most
calls get, and the programs are those of a model of a few layers. Exits with 1 where anything spills, does not
fit or does not compile.
"""

import argparse
import concurrent.futures
import doctest
import multiprocessing
import os
import sys
import time

import compile_only
import kernels
import programs


def main(names: list[str], short: bool) -> int:
    parts = {
        "programs": (programs, programs.cases(short)),
        "kernels": (kernels, kernels.cases(short)),
    }
    unknown = set(names) - set(parts)
    if unknown:
        raise SystemExit(f"unknown part {', '.join(unknown)}; allowed are {', '.join(parts)}")
    began = time.perf_counter()
    count, wrong = 0, []
    examples = doctest.testmod(compile_only)
    if examples.failed or not examples.attempted:
        wrong.append("the reports of ptxas are not understood")
    # Processes of their own: what ptxas prints belongs to the one compilation that runs in them.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        running = {
            name: [pool.submit(module.check, job) for job in jobs]
            for name, (module, jobs) in parts.items()
            if not names or name in names
        }
        for name, futures in running.items():
            module, jobs = parts[name]
            _print_row(module.COLUMNS, list(module.COLUMNS))
            for job, future in zip(jobs, futures, strict=True):
                try:
                    row, faults = future.result()
                except concurrent.futures.process.BrokenProcessPool:
                    raise  # the compiler aborted its process; what it said is above
                except Exception as error:
                    row, faults = [*job[:3]], [f"{', '.join(job[:3])}: {type(error).__name__}: {error}"]
                _print_row(module.COLUMNS, row)
                count, wrong = count + 1, wrong + faults
            print(flush=True)
    for fault in wrong:
        print(f"WRONG: {fault}")
    print(f"compiled {count} in {time.perf_counter() - began:.0f} s: {len(wrong) or 'nothing'} wrong")
    return 1 if wrong or not count else 0


def _print_row(columns: dict[str, int], values: list) -> None:
    cells = (
        f"{value:<{width}}" if isinstance(value, str) and n < 3 else f"{value:>{width}}"
        for n, (value, width) in enumerate(zip(values, columns.values(), strict=False))
    )
    print("".join(cells), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    sys.exit(main(options.names, options.short))
