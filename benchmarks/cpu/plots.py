"""The figures of the CPU benchmark: times against lengths, both on logarithmic axes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpu.rows import FLEX, FLOOR, KINDS, NOBODY, ONNX, OURS, SDPA, TORCH_MODEL
from jsparse.integers import cdiv
from jsparse.reports.figures import COLORS, length_axis, new_figure, plain_numbers, save, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTENDERS = {  # each keeps its color
    OURS: "blue",
    FLEX: "vermilion",
    SDPA: "black",
    ONNX: "green",
    FLOOR: "grey",
    "jsparse, dense": "sky blue",
    "jsparse, sparse": "blue",
    TORCH_MODEL: "vermilion",
    **dict(zip(KINDS, ("black", "blue", "orange"), strict=True)),
}
Lines = Mapping[str, Sequence[tuple[int, float]]]


def draw(document: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """prefill.png and growth.png in ``folder``, as far as they were measured; returns the files."""
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
            save(draw_panels(title, drawn, unit), folder / f"{name}.png")
            files.append(folder / f"{name}.png")
    return files


def times(results: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(length, milliseconds) of every contender in the results, ours first."""
    lines: dict[str, dict[int, float]] = {}
    for side in ("ours", "peer"):
        for result in results:
            if f"{side}_ms" in result and result[side] != NOBODY:
                lines.setdefault(result[side], {})[result["length"]] = result[f"{side}_ms"]
    return {name: sorted(points.items()) for name, points in lines.items()}


def draw_panels(title: str, panels: Mapping[str, Lines], unit: str) -> "Figure":
    """A figure of panels, each with its title, two per row."""
    rows, columns = cdiv(len(panels), 2), min(len(panels), 2)
    figure, grid = new_figure(rows, columns, width=4.6 * columns, height=3.7 * rows + 0.4)
    for axes, (about, lines) in zip(grid, panels.items(), strict=False):
        for name, points in lines.items():
            if points:
                style = "--" if name == FLOOR else "o-"
                color = COLORS[CONTENDERS[name]] if name in CONTENDERS else None
                axes.plot(*zip(*points, strict=True), style, color=color, markersize=4, label=name)
        axes.set_yscale("log")
        length_axis(axes, sorted({length for points in lines.values() for length, _ in points}), "tokens")
        values = [value for points in lines.values() for _, value in points]
        # Over a short range, hardly one power of ten would be labelled.
        plain_numbers(axes.yaxis, at=(1, 2, 5) if max(values) < 100 * min(values) else ())
        tidy(axes)
        axes.set_title(about, fontsize=9.5, loc="left")
        axes.set_ylabel(unit)
        axes.legend(frameon=False, fontsize=7.5)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=9)
    return figure
