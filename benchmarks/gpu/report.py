"""What the GPU benchmark found: a table for the terminal, a plot, and the section of docs/results/gpu.md.

The file is ``{"header": {...}, "results": [...]}``. A result has row, length, dtype and peer (the contender's
name), and either ``error``, or ratio_median, ratio_min, ratio_max (our time / its time; 1 for our own),
time_us, floor_us, tflops or gb_per_s, and same_work (False for dense attention that stands beside a sparse
row).
"""

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sections import number, ratio

from jsparse.reports.console import short_count
from jsparse.reports.figures import new_figure, plain_numbers, save

NOT_YET = "not yet measured"


def read(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text())
    if set(document) != {"header", "results"}:
        raise ValueError(f"{path} is no file of results: it has {sorted(document)}, not header and results")
    return document


def by_row(results: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[str, int], list[Mapping[str, Any]]]]:
    """((row, length), results) in the order of the file."""
    grouped = itertools.groupby(results, key=lambda result: (result["row"], result["length"]))
    return [(key, list(group)) for key, group in grouped]


def rate(result: Mapping[str, Any]) -> str:
    return f"{result['tflops']:.0f} TFLOP/s" if "tflops" in result else f"{result['gb_per_s']:.0f} GB/s"


# Terminal ----------------------------------------------------------------------------------------------


def print_table(
    header: Mapping[str, Any], results: Sequence[Mapping[str, Any]], goals: Mapping[str, str]
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if os.isatty(1) else 150)
    table = Table(title="A SMOKE RUN: the numbers mean nothing" if header.get("smoke") else None)
    for column in ("row", "length", "dtype", "contender"):
        table.add_column(column)
    for column in ("time µs", "rate", "floor µs", "× floor", "ours / its time", "goal"):
        table.add_column(column, justify="right", no_wrap=column != "goal")
    errors = []
    for (row, length), group in by_row(results):
        for i, result in enumerate(group):
            name = [row, str(length), result["dtype"]] if i == 0 else [""] * 3
            if "error" in result:
                table.add_row(*name, result["peer"], "error", *[""] * 5)
                errors.append(f"{row} {length} {result['peer']}: {result['error']}")
                continue
            own = i == 0
            table.add_row(
                *name,
                result["peer"],
                number(result["time_us"]),
                rate(result),
                number(result["floor_us"]) if own else "",
                number(result["time_us"] / result["floor_us"]),
                "" if own else ratio(result),
                goals.get(row, "") if own else "",
            )
        table.add_section()
    console.print(table)
    for line in errors:
        console.print(f"error: {line}", markup=False, highlight=False)
    for line in notes(header):
        console.print(line, markup=False, highlight=False)


def notes(header: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the numbers, one line each."""
    lines = [
        f"{header['device']}, {header['date']}, "
        + ", ".join(f"{k} {v}" for k, v in header["versions"].items())
    ]
    if ceilings := header.get("ceilings"):
        lines.append(
            f"ceilings, measured: {ceilings['flops'] / 1e12:.0f} TFLOP/s (bf16 matrix product), "
            f"{ceilings['bytes'] / 1e12:.2f} TB/s (device copy, read plus written)"
        )
    lines += [f"{suite}: {outcome['summary']}" for suite, outcome in header["conformance"].items()]
    if header["left_out"]:
        lines.append(f"LEFT OUT, for lack of time or of a device: {', '.join(header['left_out'])}")
    return lines


# Plot --------------------------------------------------------------------------------------------------


def draw(header: Mapping[str, Any], results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of time over floor, one group per row; written as PNG and PDF beside ``path``."""
    if not results:
        return
    groups = by_row(results)
    figure, (axes,) = new_figure(width=9, height=1.4 + 0.26 * len(results) + 0.2 * len(groups))

    place, ticks, labels = 0.0, [], []
    for (row, length), group in groups:
        for i, result in enumerate(group):
            ticks.append(place)
            labels.append(f"{row}, {short_count(length)}   {result['peer']}" if i == 0 else result["peer"])
            place += 1
            if "error" in result:
                axes.text(1.05, ticks[-1], "failed", va="center", fontsize=8, color="#a33")
                continue
            value = result["time_us"] / result["floor_us"]
            color = (
                "#1b6ca8" if result["peer"] == "jsparse" else "#b9c4cc" if result["same_work"] else "#e3d9c6"
            )
            axes.barh(ticks[-1], value, height=0.82, color=color, edgecolor="white")
            shown = f"{number(value)}  ({number(result['time_us'])} µs)"
            axes.text(value * 1.04, ticks[-1], shown, va="center", fontsize=8)
        place += 0.7
    axes.set_yticks(ticks, labels, fontsize=8.5)
    for label, name in zip(axes.get_yticklabels(), labels, strict=True):
        label.set_fontweight("bold" if "   " in name else "normal")
    axes.set_ylim(place - 0.7, -0.7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), high * 2.2)  # room for the numbers
    plain_numbers(axes.xaxis)
    axes.set_xlabel("time / floor of the row's work (1: no implementation can be faster)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    title = (
        "SMOKE RUN: the numbers mean nothing"
        if header.get("smoke")
        else f"{header['device']}, {header['date']}"
    )
    axes.set_title(f"{title}\nblue: jsparse; grey: the same work; sand: dense attention", fontsize=9.5)
    for suffix in (".png", ".pdf"):
        save(figure, path.with_suffix(suffix), dpi=130)


# Page --------------------------------------------------------------------------------------------------

BEGIN = "<!-- benchmarks/gpu --markdown writes from here -->"


def markdown(document: Mapping[str, Any] | None, rows: Iterable[Any]) -> str:
    """The page's table of the rows (name, about, goal); without results, each is not yet measured.

    Raises ValueError for the results of a smoke run.
    """
    rows = sorted(rows, key=lambda row: (int(row.name[1:].split("-")[0]), row.name))
    if document is None:
        lines = ["| row | what | |", "|---|---|---|"]
        return "\n".join(lines + [f"| {row.name} | {row.about} | {NOT_YET} |" for row in rows])
    header = document["header"]
    if header.get("smoke"):
        raise ValueError("these are the results of a smoke run, whose numbers mean nothing")
    about = {row.name: row for row in rows}
    lines = [
        f"`{header['command']}` measured, beside torch and cuDNN:",
        "",
        *(f"- {note}" for note in notes(header)),
        "",
        "| row | what | tokens | jsparse | × floor | our time / theirs, median (least to largest) | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    seen = set()
    order = [row.name for row in rows]
    measured = sorted(by_row(document["results"]), key=lambda each: (order.index(each[0][0]), each[0][1]))
    for (name, length), (own, *peers) in measured:
        seen.add(name)
        row = about[name]
        start = f"| {name} | {row.about} | {length:,}"
        if "error" in own:
            lines.append(f"{start} | failed: {own['error'].replace('|', '/')} | | | {row.goal} |")
            continue
        others = [f"{peer['peer']}: " + ("failed" if "error" in peer else ratio(peer)) for peer in peers]
        time, floors = f"{number(own['time_us'])} µs, {rate(own)}", number(own["time_us"] / own["floor_us"])
        lines.append(f"{start} | {time} | {floors} | {'; '.join(others)} | {row.goal} |")
    lines += [
        f"| {row.name} | {row.about} | | {NOT_YET} | | | {row.goal} |" for row in rows if row.name not in seen
    ]
    return "\n".join(lines)
