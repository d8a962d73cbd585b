"""What the CPU benchmark found: tables, and the section of docs/results/cpu.md.

The file is a list: first the header, then the results. A result has row, length, dtype, ours and peer (the
contenders' names), and ratio_median, ratio_min and ratio_max (our time / its time), ours_ms and peer_ms
(medians), rounds, same_work, and goal (the largest ratio wanted) if there is one; or error. ratio_median is
null if there is no peer or there is an error.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sections import RESULTS, number, ratio, write_section

from cpu import plots
from cpu.rows import ABOUT, FLOOR, OURS
from jsparse.reports.console import short_count
from jsparse.reports.figures import can_draw

BEGIN = "<!-- benchmarks/cpu --markdown writes from here -->"
PLOTS = f"{RESULTS}/cpu"
TABLE = "benchmarks/results/cpu/table.md"
BOTH_DTYPES = ("prefill-streaming", "prefill-half", "decode-pages")
Result = Mapping[str, Any]


def read(path: Path) -> list[dict[str, Any]]:
    """The content of a file of results. ValueError if it holds something else."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, list) or not document or "command" not in document[0]:
        raise ValueError(f"{path} is no file of results: it must be a list that begins with a header")
    return document


def draw(document: Sequence[Result], folder: Path) -> None:
    """The plots, if matplotlib is installed."""
    if can_draw(f"a figure in {folder}"):
        plots.draw(document, folder)


# Words -------------------------------------------------------------------------------------------------


def met(result: Result) -> bool | None:
    """Whether the goal was reached; None without a goal. A result that was not measured misses its goal."""
    if "goal" not in result:
        return None
    return result["ratio_median"] is not None and result["ratio_median"] <= result["goal"]


def in_order(results: Sequence[Result]) -> list[Result]:
    """The results of a row together, rows in the order in which they first come."""
    rows = list(dict.fromkeys(result["row"] for result in results))
    return sorted(results, key=lambda result: rows.index(result["row"]))


def milliseconds(value: float | None) -> str:
    return "" if value is None else f"{number(value)} ms"


def goal(result: Result) -> str:
    """
    >>> goal({"goal": 0.5, "ratio_median": 0.4}), goal({"goal": 0.5, "ratio_median": None}), goal({})
    ('≤ 0.5, met', '≤ 0.5, missed', '')
    """
    reached = met(result)
    return "" if reached is None else f"≤ {result['goal']:g}, {'met' if reached else 'missed'}"


def against(result: Result) -> str:
    """The peer, with a remark if it does other work."""
    fair = result.get("same_work", True) or result["peer"] in (FLOOR, "none", "the attention it serves")
    return result["peer"] if fair else f"{result['peer']} (other work)"


def in_short(result: Result) -> str:
    """One line, to print while the benchmark runs."""
    start = f"{result['row']}: {result['ours']} / {result['peer']}:"
    if "error" in result:
        return f"{start} {result['error']}"
    if "time_exponent" in result:
        memory = f", memory {result['memory_exponent']:.2f}" if "memory_exponent" in result else ""
        return f"{start} exponents: time {result['time_exponent']:.2f}{memory}"
    if result["ratio_median"] is None:
        beyond = f", {result['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in result else ""
        return f"{start} {milliseconds(result['ours_ms'])}{beyond}"
    return f"{start} {ratio(result)}, {milliseconds(result['ours_ms'])}  {goal(result)}"


def about_machine(header: Result) -> str:
    both = header["versions"]
    named = [
        f"{side}: " + ", ".join(f"{name} {version}" for name, version in both.get(side, {}).items())
        for side in ("ours", "peers")
    ]
    small = "IN MINIATURE, the numbers mean nothing; " if header.get("small") else ""
    return (
        f"{small}{header['processor']}, {header['cores']} cores, {header['threads']} threads, "
        f"{header['date']}; {'; '.join(named)}"
    )


# Terminal ----------------------------------------------------------------------------------------------


def print_table(document: Sequence[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    header, *results = document
    console = Console(width=None if os.isatty(1) else 170)
    table = Table(title=f"Our time / the peer's: {header['command']}")
    for column in ("row", "tokens", "dtype", "ours", "peer"):
        table.add_column(column)
    for column in ("ours", "peer's", "ratio (least to largest)", "goal"):
        table.add_column(column, justify="right", no_wrap=True)
    previous = None
    for result in in_order(results):
        if previous not in (None, result["row"]):
            table.add_section()
        previous = result["row"]
        start = (
            result["row"],
            short_count(result["length"]),
            result["dtype"],
            result["ours"],
            against(result),
        )
        if "error" in result:
            table.add_row(*start, "", "", "error", goal(result))
        elif "time_exponent" in result:
            table.add_row(*start, "", "", in_short(result).split(": ")[-1], "")
        else:
            shown = "" if result["ratio_median"] is None else ratio(result)
            times = milliseconds(result["ours_ms"]), milliseconds(result.get("peer_ms"))
            table.add_row(*start, *times, shown, goal(result))
    console.print(table)
    for result in results:
        if "error" in result:
            line = f"error: {result['row']} {result['length']} {result['dtype']}, {result['error']}"
            console.print(line, markup=False, highlight=False)
    console.print(about_machine(header), markup=False, highlight=False)


# Page --------------------------------------------------------------------------------------------------


def markdown(document: Sequence[Result]) -> str:
    """What is ahead and what is not, ratios by length, how time and memory grow, and how to measure again.

    Raises ValueError for results in miniature.
    """
    header, *results = document
    if header["small"]:
        raise ValueError("results of --small are no results: their numbers mean nothing")
    ratios = paired(results)
    lines = [
        f"`{header['command']}`, on {about_machine(header)}.",
        "",
        "A ratio is our time / the peer's, the median of alternated rounds: ours is faster below 1."
        " Both sides use all threads, in processes of their own that take turns. Where it says other"
        " work, the peer is dense and ours is not. **Bold** meets its goal, *italic* misses it; least and"
        f" largest ratios, times and goals are in `{TABLE}`.",
        "",
        *summary(ratios),
        "",
        *by_length(ratios),
        "",
        *growth(results),
        f"![prefill time against length]({PLOTS}/prefill.png)",
        "",
        f"![growth of time and memory]({PLOTS}/growth.png)",
    ]
    return "\n".join(lines)


def full_table(document: Sequence[Result]) -> str:
    """Every ratio with its times, spread, goal and notes, in Markdown."""
    header, *results = document
    ratios = paired(results)
    notes = dict.fromkeys(
        f"- {result['row']} {short_count(result['length'])} {result['dtype']}: {result['note']}"
        for result in ratios
        if "note" in result
    )
    lines = [
        "# jsparse on a CPU beside others",
        "",
        f"`{header['command']}`, on {about_machine(header)}.",
        "",
        "Ratio: our time / the peer's, the median of alternated rounds (least to largest).",
        "",
        "| row | tokens | dtype | ours | peer | our time | ratio | goal |",
        "|---|---|---|---|---|---|---|---|",
        *(line(result) for result in ratios),
        "",
        *notes,
    ]
    return "\n".join(lines) + "\n"


def paired(results: Sequence[Result]) -> list[Result]:
    """Those with a peer to report, row by row."""
    return [result for result in in_order(results) if result["peer"] != "none" and result["row"] != "matmul"]


def by_length(results: Sequence[Result]) -> list[str]:
    """A table of median ratios: a line for each row, dtype, ours and peer, a column for each length."""
    lengths = sorted({result["length"] for result in results})
    lines = [
        f"| row | dtype | ours / peer | {' | '.join(map(short_count, lengths))} |",
        "|---" * (3 + len(lengths)) + "|",
    ]
    kinds = dict.fromkeys((r["row"], r["dtype"], r["ours"], against(r)) for r in results)
    for row, dtype, ours, peer in kinds:
        mine = {
            r["length"]: r
            for r in results
            if (r["row"], r["dtype"], r["ours"], against(r)) == (row, dtype, ours, peer)
        }
        cells = [ratio_cell(mine[length]) if length in mine else "" for length in lengths]
        both = peer if ours == OURS else f"{ours.removeprefix('jsparse, ')} / {peer}"
        lines.append(f"| {row} | {dtype} | {both} | {' | '.join(cells)} |")
    return lines


def ratio_cell(result: Result) -> str:
    """
    >>> ratio_cell({"ratio_median": 0.25}), ratio_cell({"ratio_median": 0.6, "goal": 0.5})
    ('0.25', '*0.6*')
    """
    if result["ratio_median"] is None:
        return "not measured"
    reached, shown = met(result), number(result["ratio_median"])
    return shown if reached is None else f"**{shown}**" if reached else f"*{shown}*"


def summary(results: Sequence[Result]) -> list[str]:
    """How many goals are met, and in which rows jsparse is ahead of everything it was measured beside."""
    with_goal = [result for result in results if "goal" in result]
    lines = [f"- **Goals**: {sum(map(bool, map(met, with_goal)))} of {len(with_goal)} met."]
    groups: dict[str, list[float]] = {}
    for result in results:
        if result["ratio_median"] is not None and result["peer"] not in (FLOOR, "the attention it serves"):
            groups.setdefault(named(result), []).append(result["ratio_median"])
    for title, wanted in (
        ("Ahead throughout", lambda low, high: high < 1),
        ("Ahead here, behind there", lambda low, high: low < 1 <= high),
        ("Behind throughout", lambda low, high: low >= 1),
    ):
        there = [
            f"{name} ({span(min(ratios), max(ratios))})"
            for name, ratios in groups.items()
            if wanted(min(ratios), max(ratios))
        ]
        if there:
            lines.append(f"- **{title}**: {'; '.join(there)}.")
    if errors := [result for result in results if "error" in result]:
        lines.append(f"- **Not measured**: {len(errors)} of {len(results)} ratios.")
    return lines


def named(result: Result) -> str:
    """The row, and which contender of ours if there are several.

    >>> named({"row": "finetune-step", "dtype": "float32", "ours": "jsparse, full"})
    'finetune-step full'
    """
    which = "" if result["ours"] == OURS else f" {result['ours'].removeprefix('jsparse, ')}"
    dtype = f" {result['dtype']}" if result["row"] in BOTH_DTYPES else ""
    return f"{result['row']}{dtype}{which}"


def span(low: float, high: float) -> str:
    """
    >>> span(0.25, 0.5), span(2.0, 2.0)
    ('0.25 to 0.5', '2')
    """
    return number(low) if number(low) == number(high) else f"{number(low)} to {number(high)}"


def line(result: Result) -> str:
    about = ABOUT.get(result["row"], "")
    start = (
        f"| {result['row']}: {about} | {short_count(result['length'])} | {result['dtype']} "
        f"| {result['ours']} | {against(result)}"
    )
    if "error" in result:
        return f"{start} | | not measured: {result['error'].replace('|', '/')} | {goal(result)} |"
    return f"{start} | {milliseconds(result['ours_ms'])} | {ratio(result)} | {goal(result)} |"


def growth(results: Sequence[Result]) -> list[str]:
    """A table of our own attention and generation by length: time, peak memory, and the exponents."""
    points = [r for r in results if r["row"] in ("growth", "generate-token") and "ours_ms" in r]
    fits = {(r["row"].split(",")[0], r["ours"]): r for r in results if "time_exponent" in r}
    kinds = list(dict.fromkeys((r["row"], r["ours"]) for r in points))
    if not kinds:
        return []
    lengths = sorted({r["length"] for r in points})
    lines = [
        "How time grows, and of attention the memory of a call beyond its inputs; with fitted exponents of"
        " the length (time, memory).",
        "",
        f"| | {' | '.join(map(short_count, lengths))} | exponents |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for row, ours in kinds:
        cells = []
        for length in lengths:
            mine = [r for r in points if (r["row"], r["ours"], r["length"]) == (row, ours, length)]
            cells += [cell(mine[0]) if mine else ""]
        fit = fits.get((row, ours), {})
        # + 0.0: a fit of equal times may be a negative zero, and no "-0.00" should be printed.
        both = [f"{round(fit[n], 2) + 0.0:.2f}" for n in ("time_exponent", "memory_exponent") if n in fit]
        title = f"attention, {ours}" if row == "growth" else f"a token, {ours}"
        lines.append(f"| {title} | {' | '.join(cells)} | {', '.join(both)} |")
    return [*lines, ""]


def cell(result: Result) -> str:
    beyond = f", {result['peak_bytes'] / 2**20:,.0f} MiB" if "peak_bytes" in result else ""
    return milliseconds(result["ours_ms"]) + beyond


def write_page(page: Path, results: Path) -> None:
    """Replaces the section of the page, and the full table beside the plots."""
    document = read(results)
    section = markdown(document)
    table = results.with_suffix("") / "table.md"
    table.parent.mkdir(exist_ok=True)
    table.write_text(full_table(document), encoding="utf-8")
    write_section(page, section, BEGIN)
