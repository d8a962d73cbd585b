"""``jsparse bench decode``: the time per token by the length of the context, for each policy."""

import functools
import sys

from jsparse.checks import require_new_folder
from jsparse.evaluate.speed.cache_bytes import bytes_table, nbytes, step_bytes
from jsparse.evaluate.speed.filled_cache import FilledCache, endless_rows
from jsparse.evaluate.speed.options import DecodeBench as DecodeBench
from jsparse.evaluate.speed.report import draw_decode, model_name, print_bytes, print_decode
from jsparse.evaluate.speed.results import DecodeRow, describe_model, write_results
from jsparse.evaluate.speed.settings import load_model, model_config
from jsparse.evaluate.speed.turns import in_turns
from jsparse.models import Llama
from jsparse.reports.machine import describe_machine
from jsparse.serve.config import Policy
from jsparse.serve.layout import CacheLayout
from jsparse.serve.state import split_model


def bench_decode(config: DecodeBench) -> list[DecodeRow]:
    """Measure, print tables, and write results.json (after each context) and decode.png.

    Raises, before weights are read, ValueError or OSError for settings that do not fit one another or the
    model, and for an output folder that is not empty; FloatingPointError if logits are not finite, because
    steps would be missing.
    """
    require_new_folder(config.output)
    llama = model_config(config.model, config.contexts, config.steps)
    layouts: dict[int, dict[Policy, CacheLayout]] = {
        context: {policy: config.layout(llama, policy, context) for policy in config.policies}
        for context in config.contexts
    }
    config.output.mkdir(parents=True, exist_ok=True)
    model = load_model(config.model, config.dtype)
    about, shape = describe_model(config.model, model), split_model(model)[0].shape
    table = bytes_table(shape, sink=config.sink, window=config.window)
    rows: list[DecodeRow] = []
    for context, of_policy in layouts.items():
        rows += _measure(config, model, context, of_policy)
        write_results(config, "decode", about, rows=rows, bytes=table)
        times = ", ".join(f"{row.policy} {row.decode.median:.2f}" for row in rows if row.context == context)
        print(f"context {context}, ms per token: {times}", file=sys.stderr)
    print_bytes(table, about)
    pages = "" if config.kv_bits is None else f", int{config.kv_bits} pages"
    what, machine = f"{model_name(about)}, batch {config.batch}{pages}", describe_machine()
    print_decode(rows, what, machine)
    draw_decode(rows, what, machine, config.output / "decode.png")
    return rows


def _measure(
    config: DecodeBench, model: Llama, context: int, layouts: dict[Policy, CacheLayout]
) -> list[DecodeRow]:
    """Everything at one context; the caches are freed at the end."""
    structure, params = split_model(model)
    caches: dict[Policy, FilledCache] = {
        policy: FilledCache(layout, structure.shape, context) for policy, layout in layouts.items()
    }
    endless = endless_rows(config.batch, model.config.vocab_size)
    steps, rounds = config.steps, config.repeats

    whole = (structure, params, endless, steps)
    decode = in_turns({p: functools.partial(cache.decode, *whole) for p, cache in caches.items()}, rounds)
    attention = in_turns({p: functools.partial(cache.attend, steps) for p, cache in caches.items()}, rounds)
    calls = {}
    for policy, cache in caches.items():
        if cache.selections:
            calls[policy, "selector"] = functools.partial(cache.choose, steps)
        if cache.has_pages:
            calls[policy, "reading"] = functools.partial(cache.read, steps)
    parts = in_turns(calls, rounds)

    rows = []
    for policy, cache in caches.items():
        selector, reading = parts.get((policy, "selector")), parts.get((policy, "reading"))
        size = nbytes(cache.state.layers)
        rows.append(
            DecodeRow(
                context=context,
                policy=policy,
                decode=decode[policy],
                ratio_to_dense=decode[policy].ratio_to(decode["dense"]) if "dense" in decode else None,
                attention=attention[policy],
                selector=selector,
                reading=reading,
                selector_to_reading=selector.ratio_to(reading) if selector and reading else None,
                cache_bytes=size,
                cache_bytes_per_token=size / (cache.layout.batch * cache.layout.capacity),
                step_bytes=step_bytes(cache.layout, cache.state.layers, context + 1),
            )
        )
    return rows
