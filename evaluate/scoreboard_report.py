"""The scores of a scoreboard as tables, as Markdown, and as heat maps."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jsparse.evaluate.methods import METHODS
from jsparse.reports.figures import new_figure, require_matplotlib, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID = "needle_grid"  # the task of rows that have a depth
Row = dict[str, Any]  # as run_scoreboard returns them

_WIDTH = 140  # where stdout is no terminal: wide enough for six tasks at four budgets


def print_scoreboard(rows: Sequence[Row], title: str) -> None:
    """Percents in one table, a column per task and budget; or one table per budget where it is too wide."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    board = _Board(rows)
    if not board.tasks:
        return
    table = _wide_table(board, title)
    unlimited = console.options.update(width=1000)
    if console.measure(table, options=unlimited).maximum <= console.width:
        console.print(table)
        return
    for budget in board.budgets or [None]:
        console.print(_budget_table(board, title, budget))


def markdown_table(rows: Sequence[Row]) -> str:
    """The scores in percent, one line per method, and for each task at all budgets in ascending order.

    >>> row = {"task": "needle", "method": "lserve", "length": 2048, "low": 0.3, "high": 0.7, "samples": 12}
    >>> rows = [row | {"budget": 256, "score": 0.75}, row | {"budget": 128, "score": 0.5}]
    >>> print(markdown_table(rows))
    | method | needle | what is read |
    |---|---|---|
    | lserve | 50 / 75 | pages of 64 by bounds of 16 tokens, chosen every 4 tokens |
    <BLANKLINE>
    Percent at budgets of 128 / 256 of 2048 tokens; 12 texts per task, intervals at 95 % of at most ±20.
    """
    board = _Board(rows)
    lines = ["| method | " + " | ".join(board.tasks) + " | what is read |"]
    lines.append("|---" * (len(board.tasks) + 2) + "|")
    for method in board.methods:
        cells = [" / ".join(map(_percent, board.scores(task, method))) for task in board.tasks]
        lines.append(f"| {method} | {' | '.join(cells)} | {METHODS[method].about} |")
    widest = max((row["high"] - row["low"]) / 2 for row in board.rows)
    at = f" at budgets of {' / '.join(map(str, board.budgets))}" if board.budgets else ""
    texts, length = board.rows[0]["samples"], board.rows[0]["length"]
    note = f"{texts} texts per task, intervals at 95 % of at most ±{100 * widest:.0f}."
    return "\n".join([*lines, "", f"Percent{at} of {length} tokens; {note}"])


def check_can_draw(folder: Path) -> None:
    """Raise, before hours of evaluation, if :func:`write_figures` could not write.

    Raises MissingExtra where matplotlib is not installed, FileNotFoundError where the parent of ``folder``
    does not exist, NotADirectoryError where ``folder`` is a file.
    """
    require_matplotlib("output")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"output: the folder of {folder} does not exist")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output: {folder} is not a folder")


def write_figures(rows: Sequence[Row], folder: Path) -> None:
    """Write scoreboard.md, scoreboard.png and, where there is a grid, needle_grid.png over older ones."""
    check_can_draw(folder)
    folder.mkdir(exist_ok=True)
    if any(row["task"] != GRID for row in rows):
        (folder / "scoreboard.md").write_text(markdown_table(rows) + "\n", encoding="utf-8")
        save(_draw_board(_Board(rows)), folder / "scoreboard.png")
    if any(row["task"] == GRID for row in rows):
        save(_draw_grid([row for row in rows if row["task"] == GRID]), folder / "needle_grid.png")


class _Board:
    """The rows except those of the grid, and the tasks, methods and budgets in them."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = [row for row in rows if row["task"] != GRID]
        self.tasks = list(dict.fromkeys(row["task"] for row in self.rows))
        self.methods = list(dict.fromkeys(row["method"] for row in self.rows))
        self.budgets = sorted({row["budget"] for row in self.rows if row["budget"] is not None})
        self._scores = {(row["task"], row["method"], row["budget"]): row["score"] for row in self.rows}

    def scores(self, task: str, method: str) -> list[float]:
        """The scores at every budget; a single one where the method has no budget."""
        if (task, method, None) in self._scores:
            return [self._scores[task, method, None]]
        return [self._scores[task, method, budget] for budget in self.budgets]


def _percent(score: float) -> str:
    return f"{100 * score:.0f}"


def _wide_table(board: _Board, title: str) -> Table:
    table = Table(title=f"{title}: percent, by budget in tokens")
    table.add_column("method", no_wrap=True)
    widths = [max(3, len(str(budget))) for budget in board.budgets] or [3]
    budgets = " ".join(str(budget).rjust(width) for budget, width in zip(board.budgets, widths, strict=False))
    for task in board.tasks:
        table.add_column(f"{task}\n{budgets}", justify="center", no_wrap=True)
    for method in board.methods:
        cells = []
        for task in board.tasks:
            texts = list(map(_percent, board.scores(task, method)))
            padded = (text.rjust(width) for text, width in zip(texts, widths, strict=False))
            cells.append(" ".join(padded) if METHODS[method].budgeted else texts[0])
        table.add_row(method, *cells)
    return table


def _budget_table(board: _Board, title: str, budget: int | None) -> Table:
    table = Table(title=title if budget is None else f"{title}: percent at a budget of {budget} tokens")
    for column in ("method", *(task.replace("_", " ") for task in board.tasks)):
        method = column == "method"
        table.add_column(column, justify="left" if method else "right", no_wrap=method)
    place = board.budgets.index(budget) if budget is not None else 0
    for method in board.methods:
        scores = (board.scores(task, method) for task in board.tasks)
        table.add_row(method, *(_percent(of[place if len(of) > 1 else 0]) for of in scores))
    return table


# --- figures ---


def _draw_board(board: _Board) -> "Figure":
    """Methods by tasks and budgets; a method without a budget has one cell per task."""
    budgets = len(board.budgets) or 1
    columns = len(board.tasks) * budgets
    figure, (axes,) = new_figure(width=3.2 + 0.42 * max(columns, 8), height=1.6 + 0.32 * len(board.methods))
    values = np.array(
        [
            np.concatenate([np.resize(board.scores(task, method), budgets) for task in board.tasks])
            for method in board.methods
        ]
    )
    image = _heat_map(axes, values)
    for row, method in enumerate(board.methods):
        for number, task in enumerate(board.tasks):
            scores, first = board.scores(task, method), number * budgets
            places = [first + i for i in range(budgets)] if len(scores) > 1 else [first + (budgets - 1) / 2]
            for place, score in zip(places, scores, strict=True):
                _write(axes, place, row, score)
    for number in range(1, len(board.tasks)):
        axes.axvline(number * budgets - 0.5, color="white", linewidth=4)
    axes.set_yticks(range(len(board.methods)), board.methods)
    axes.set_xticks(
        range(columns), [str(b) for b in board.budgets or ["all"]] * len(board.tasks), rotation=90
    )
    axes.set_xlabel(f"budget (tokens of a context of {board.rows[0]['length']})")
    names = axes.secondary_xaxis("top")
    centres = [number * budgets + (budgets - 1) / 2 for number in range(len(board.tasks))]
    names.set_xticks(centres, [task.replace("_", "\n") for task in board.tasks])
    names.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="score")
    return figure


def _draw_grid(rows: Sequence[Row]) -> "Figure":
    """One panel per method: the depth of the needle by the length of the text."""
    methods = list(dict.fromkeys((row["method"], row["budget"]) for row in rows))
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
    cells = {(row["method"], row["depth"], row["length"]): row["score"] for row in rows}
    figure, panels = new_figure(
        1, len(methods), width=1.8 + 2.3 * len(methods), height=1.6 + 0.42 * len(depths), sharey=True
    )
    for axes, (method, budget) in zip(panels, methods, strict=True):
        values = np.array([[cells[method, depth, length] for length in lengths] for depth in depths])
        image = _heat_map(axes, values)
        for (row, column), score in np.ndenumerate(values):
            _write(axes, column, row, score)
        axes.set_title(method if budget is None else f"{method}, {budget} tokens", fontsize=9)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    figure.supxlabel("context length (tokens)", fontsize=10)
    panels[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels, label="score")
    return figure


def _heat_map(axes: "Axes", values: np.ndarray):
    return axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")


def _write(axes: "Axes", x: float | int, y: float | int, score: float) -> None:
    color = "white" if score < 0.12 or score > 0.88 else "black"  # where the heat map is dark
    axes.text(x, y, _percent(score), ha="center", va="center", fontsize=8, color=color)
