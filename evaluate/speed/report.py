"""What ``jsparse bench`` found: tables on stdout, and a figure."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jsparse.evaluate.speed.cache_bytes import LOGICAL_PAGE, PAGE, CacheBytes
from jsparse.evaluate.speed.results import DecodeRow, PrefillRow
from jsparse.evaluate.speed.turns import Timing
from jsparse.reports.console import short_count
from jsparse.reports.figures import COLORS, can_draw, new_figure, plain_numbers, save, tidy
from jsparse.reports.machine import machine_line

_WIDTH = 110  # where stdout is no terminal: wide enough for every table
_POLICIES = {  # each keeps its color
    "dense": "black",
    "streaming": "blue",
    "quest": "orange",
    "lserve": "green",
    "oracle": "purple",
    "random": "sky blue",
    "mean": "vermilion",
}


def print_decode(rows: Sequence[DecodeRow], what: str, machine: dict[str, Any]) -> None:
    """Print the times per token of ``what``, and the bytes that the caches hold and that a step reads."""
    titles = "context|policy|ms/token|least|of dense|attention|selector|reading|selector/reading"
    times = _table(f"Decoding, milliseconds per token: {what}", titles)
    titles = "context|policy|cache (bytes)|per token of capacity|read per step"
    sizes = _table("Bytes of the caches", titles)
    previous = None
    for row in rows:
        if previous not in (None, row.context):
            times.add_section()
            sizes.add_section()
        previous = row.context
        times.add_row(
            f"{row.context}",
            row.policy,
            f"{row.decode.median:.2f}",
            f"{row.decode.least:.2f}",
            _ratio(row.ratio_to_dense),
            *(_median(timing) for timing in (row.attention, row.selector, row.reading)),
            _ratio(row.selector_to_reading),
        )
        sizes.add_row(
            f"{row.context}",
            row.policy,
            f"{row.cache_bytes:,}",
            f"{row.cache_bytes_per_token:,.1f}",
            f"{row.step_bytes:,}",
        )
    console = _console()
    console.print(times)
    console.print(
        f"Rounds, all in turn: {len(rows[0].decode.rounds)}; medians count. Attention, selector and reading "
        "were measured apart from the model.\nThe selector is the part of one choice that falls to a token.\n"
        f"{machine_line(machine)}.\n",
        highlight=False,
    )
    console.print(sizes)


def print_bytes(rows: Sequence[CacheBytes], model: dict[str, Any]) -> None:
    """Print what a layer keeps per token and per sequence."""
    heads = f"{model['kv_heads']} KV heads of {model['head_dim']}"
    title = f"Bytes that a layer keeps: {heads}, pages of {PAGE} tokens, bounds of {LOGICAL_PAGE}"
    table = _table(title, "cache|keys and values|scales and zeros|bounds|per token|per sequence", left=1)
    for row in rows:
        table.add_row(
            row.kind,
            *(
                f"{value:,.0f}"
                for value in (row.keys_and_values, row.scales_and_zeros, row.bounds, row.per_token)
            ),
            f"{row.per_sequence:,}",
        )
    _console().print(table)


def print_prefill(rows: Sequence[PrefillRow], model: dict[str, Any], machine: dict[str, Any]) -> None:
    """Print the times to the first token."""
    titles = "context|variant|seconds|tokens/s|of dense|cache (bytes)"
    table = _table(f"Prompts, seconds to the first token: {model_name(model)}", titles)
    for row in rows:
        table.add_row(
            f"{row.context}",
            row.variant,
            f"{row.seconds.median:.2f}",
            f"{row.context / row.seconds.median:,.0f}",
            _ratio(row.ratio_to_dense),
            f"{row.cache_bytes:,}",
        )
    console = _console()
    console.print(table)
    console.print(
        f"Rounds, all in turn: {len(rows[0].seconds.rounds)}; the median counts.\n{machine_line(machine)}.",
        highlight=False,
    )


def draw_decode(rows: Sequence[DecodeRow], what: str, machine: dict[str, Any], path: Path) -> bool:
    """Draw the time per token against the context, one line per policy.

    Returns False, and says so on stderr, without matplotlib.
    """
    if not can_draw(path.name):
        return False
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, (axes,) = new_figure(width=7.5, height=4.8)
    contexts = sorted({row.context for row in rows})
    lines = {
        policy: [(row.context, row.decode.median) for row in rows if row.policy == policy]
        for policy in dict.fromkeys(row.policy for row in rows)
    }
    for policy, points in lines.items():
        axes.plot(
            *zip(*sorted(points), strict=True), marker="o", markersize=4, color=COLORS[_POLICIES[policy]]
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(contexts[0] / 1.15, contexts[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(round(value))))
    plain_numbers(axes.yaxis, at=(1, 2, 5))
    axes.yaxis.set_minor_locator(NullLocator())

    # Each line has its name at its end; names that would overlap are moved apart.
    low, high = axes.get_ylim()
    ends = {policy: max(points)[1] for policy, points in lines.items()}
    places = spread(
        [math.log(end / low) / math.log(high / low) for end in ends.values()], 0.055
    )  # a line of text, as a part of the height
    for (policy, _), place in zip(ends.items(), places, strict=True):
        axes.annotate(
            policy,
            xy=(1.005, place),
            xycoords="axes fraction",
            color=COLORS[_POLICIES[policy]],
            va="center",
            annotation_clip=False,
        )
    tidy(axes)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("time per token (ms)")
    axes.set_title(f"Decoding: {what}\n{machine_line(machine)}", loc="left", fontsize=10, linespacing=1.5)
    save(figure, path, dpi=150)
    return True


def spread(values: Sequence[float], least: float) -> list[float]:
    """Values moved as little as possible until no two are nearer than ``least``, in the same order.

    >>> spread([0.5, 0.5, 2.0], 1.0)
    [0.0, 1.0, 2.0]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[list[float]] = []  # centre and size of runs of touching values
    for i in order:
        groups.append([values[i], 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < least * (groups[-1][1] + groups[-2][1]) / 2:
            (a, m), (b, n) = groups[-2:]
            groups[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    places = [centre + least * (i - (size - 1) / 2) for centre, size in groups for i in range(int(size))]
    moved = dict(zip(order, places, strict=True))
    return [moved[i] for i in range(len(values))]


def model_name(model: dict[str, Any]) -> str:
    size = model["parameters"]
    size = f"{size / 1e9:.1f}B" if size >= 1e9 else f"{size / 1e6:.1f}M"
    return f"{model['name']}, {size} parameters, {model['dtype']}"


def _table(title: str, columns: str, left: int = 2) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", min_width=len(title))
    for number, column in enumerate(columns.split("|")):
        table.add_column(column, justify="left" if number == left - 1 else "right", no_wrap=True)
    return table


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def _median(timing: Timing | None) -> str:
    return "–" if timing is None else f"{timing.median:.3f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
