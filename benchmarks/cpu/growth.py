"""How attention grows with the length: exponents, and the memory of one call, each in a process of its own.

Run as a module (``python -m cpu.growth dense 4096`` in benchmarks/), it prints the bytes of one call.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from cpu.workers import BENCHMARKS


def exponent(lengths: Sequence[float], values: Sequence[float]) -> float:
    """b of the best ``values = a * lengths ** b``: least squares of the logarithms.

    Raises ValueError for fewer than two lengths, and for values that are not positive.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    if len(set(lengths)) < 2 or len(lengths) != len(values) or min(*lengths, *values) <= 0:
        raise ValueError(f"no exponent fits lengths={list(lengths)} and values={list(values)}")
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def peak_in_new_process(kind: str, length: int, *, small: bool, timeout: float) -> int:
    """The bytes of one call, without the workers' settings for memory: freed memory is given back."""
    command = [sys.executable, "-m", "cpu.growth", kind, str(length), *["--small"] * small]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=BENCHMARKS
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(done.stderr.split())[-200:]}")
    return int(done.stdout.strip().splitlines()[-1])


def peak(kind: str, length: int, small: bool) -> int:
    """The peak of memory in a call, beyond what was used before it (inputs and compiled code). Linux only."""
    import jax
    import jax.numpy as jnp

    import jsparse
    from cpu import inputs
    from cpu.ours import lists_of
    from cpu.rows import sizes

    of = sizes(small)
    q, k, v, _ = (jnp.asarray(x) for x in inputs.sequences(length, of))
    mask = lists_of(kind, length, of)
    if isinstance(mask, jsparse.BlockMask):
        attend = jax.jit(jsparse.attention).lower(q, k, v, mask).compile()
        arguments = (q, k, v, mask)
    else:
        attend = jax.jit(lambda q, k, v: jsparse.attention(q, k, v, mask)).lower(q, k, v).compile()
        arguments = (q, k, v)
    jax.block_until_ready(arguments)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    jax.block_until_ready(attend(*arguments))
    return memory("VmHWM") - before


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def print_peak(kind: str, length: int, /, *, small: bool = False) -> None:
    print(peak(kind, length, small))


if __name__ == "__main__":
    tyro.cli(print_peak)
