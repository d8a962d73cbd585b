"""In a worker: the contenders of each row built, their outputs compared, and then timed in turns."""

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from measure import Ceilings, Contender, Work, agreement, alternate, describe, judge

from gpu import cache_peers, peers, rows, workers
from gpu.peers import Setup, random_normal
from jsparse.evaluate.speed.turns import ratios

TOLERANCE = 2e-2  # of bfloat16 outputs, relative, in the worst tile
# Raised by Python before anything is launched, or after: the device is as it was.
HARMLESS = ("NotImplementedError", "ModuleNotFoundError", "ValueError", "TypeError", "ArithmeticError")


def work_through(selected: list[rows.Row], options: Any) -> int:
    """Measures row after row; ends after one that may have broken the device for the others."""
    end = time.monotonic() + 60 * options.minutes
    setup = Setup(options.measured_implementation, gpu=not options.smoke)
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
    return Ceilings(flops=flops, bytes=moved, exps=rows.EXPS)


def run_row(
    row: rows.Row, setup, ceilings: Ceilings, seconds_left: Callable[[], float], without: Sequence[str]
) -> list[dict[str, Any]]:
    """The row's results, ours first: built and run once each, compared, then timed in turns."""
    try:
        match row:
            case rows.Prefill():
                makers = peers.prefill(row, setup)
            case rows.Decode():
                makers = cache_peers.decode(row, setup)
            case rows.Select():
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
    row: rows.Row,
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
    """Every contender run once and compared, then timed in turns; ``last_resort`` only if there is no other
    to compare ours with.
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


def measured(row: rows.Row, contender, times: list[float], ratio: dict, ceilings: Ceilings) -> dict[str, Any]:
    time_us = sorted(times)[len(times) // 2]
    return entry(
        row,
        contender.name,
        same_work=contender.same_work,
        **ratio,
        time_us=time_us,
        **contender.work.rate(time_us),
        floor_us=rows.work(row).floor_us(ceilings),
    )


def entry(row: rows.Row, peer: str, **values) -> dict[str, Any]:
    return {"row": row.name, "length": row.length, "dtype": row.dtype, "peer": peer, **values}
