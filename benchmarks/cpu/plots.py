"""The figures of benchmarks/cpu.py: times against lengths, both on logarithmic axes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpu_rows import FLEX, FLOOR, KINDS, NOBODY, ONNX, OURS, SDPA, TORCH_MODEL
from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display or global state
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's colours, which most colour-blind people can tell apart; a contender keeps its own.
COLOURS = {
    OURS: "#0072B2",
    FLEX: "#D55E00",
    SDPA: "#000000",
    ONNX: "#009E73",
    FLOOR: "#999999",
    "jsparse, dense": "#56B4E9",
    "jsparse, sparse": "#0072B2",
    TORCH_MODEL: "#D55E00",
    **dict(zip(KINDS, ("#000000", "#0072B2", "#E69F00"), strict=True)),
}
Lines = Mapping[str, Sequence[tuple[float, float]]]


def draw(document: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """prefill.png and growth.png in ``folder``, of what was measured of them; returns the files."""
    header, *results = document
    title = f"{header['processor']}, {header['threads']} threads, {header['date']}"
    if header["small"]:
        title = "IN MINIATURE: the numbers mean nothing"
    prefill = {
        f"{'all' if row == 'prefill-streaming' else 'half of the'} heads stream, {dtype}": times(
            [r for r in results if (r["row"], r["dtype"]) == (row, dtype)]
        )
        for row in ("prefill-streaming", "prefill-half")
        for dtype in ("float32", "bfloat16")
    }
    own = [r for r in results if r["row"] == "growth"]
    memory = {
        kind: [
            (r["length"], r["peak_bytes"] / 2**20)
            for r in own
            if r["ours"] == kind and r.get("peak_bytes", 0) > 0
        ]
        for kind in KINDS
    }
    panels = {
        "a token of Llama 32.5M (ms)": times([r for r in results if r["row"] == "generate-token"]),
        "attention by kind of lists (ms)": times(own),
        "memory of a call beyond its inputs (MiB)": memory,
    }
    files = []
    for name, drawn, unit in (("prefill", prefill, "time (ms)"), ("growth", panels, "")):
        drawn = {title: lines for title, lines in drawn.items() if any(lines.values())}
        if drawn:
            folder.mkdir(parents=True, exist_ok=True)
            figure(title, drawn, unit).savefig(folder / f"{name}.png", dpi=120)
            files.append(folder / f"{name}.png")
    return files


def times(results: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(length, milliseconds) of every contender in the results, ours first."""
    lines: dict[str, dict[float, float]] = {}
    for side in ("ours", "peer"):
        for result in results:
            if f"{side}_ms" in result and result[side] != NOBODY:
                lines.setdefault(result[side], {})[result["length"]] = result[f"{side}_ms"]
    return {name: sorted(points.items()) for name, points in lines.items()}


def figure(title: str, panels: Mapping[str, Lines], unit: str) -> Figure:
    drawn = Figure(
        figsize=(4.6 * min(len(panels), 2), 3.7 * -(-len(panels) // 2) + 0.4), layout="constrained"
    )
    FigureCanvasAgg(drawn)
    grid = drawn.subplots(-(-len(panels) // 2), min(len(panels), 2), squeeze=False).flatten()
    for axes, (about, lines) in zip(grid, panels.items(), strict=False):
        for name, points in lines.items():
            if points:
                style = "--" if name == FLOOR else "o-"
                axes.plot(
                    *zip(*points, strict=True), style, color=COLOURS.get(name), markersize=4, label=name
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({length for points in lines.values() for length, _ in points})
        axes.set_xticks(ticks, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        values = [value for points in lines.values() for _, value in points]
        if max(values) < 100 * min(values):  # or hardly one power of ten has a label
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(about, fontsize=9.5, loc="left")
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
        axes.legend(frameon=False, fontsize=7.5)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    drawn.suptitle(title, fontsize=9)
    return drawn
