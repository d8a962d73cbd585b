"""Figures: asking for matplotlib, starting and saving a figure, and what all figures share.

matplotlib comes with the extra ``plot``, so it is imported when something is drawn. A figure gets the canvas
that draws into memory: it needs no display, and none of the global state of ``pyplot``.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsparse.extras import MissingExtra, require_extra
from jsparse.reports.console import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which most colour-blind people can tell apart.
COLORS = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky blue": "#56B4E9",
    "green": "#009E73",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "grey": "#999999",
}


def require_matplotlib(what: str) -> None:
    """Raise MissingExtra if nothing can be drawn; ``what`` is the option or the program that draws."""
    require_extra("matplotlib", "plot", f"{what}: figures are drawn with matplotlib")


def can_draw(what: str) -> bool:
    """Whether matplotlib is installed; if not, stderr says what was not drawn, and what to install."""
    try:
        require_matplotlib(f"{what} was not drawn")
    except MissingExtra as error:
        print(error, file=sys.stderr)
        return False
    return True


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float | int, height: float | int, **subplots: Any
) -> tuple["Figure", list["Axes"]]:
    """An empty figure and its axes, row by row.

    - rows, columns: axes in the figure.
    - width, height: of the whole figure, in inches.
    - subplots: further arguments of ``Figure.subplots``, for instance ``sharey=True``.

    >>> figure, (left, right) = new_figure(1, 2, width=6, height=3)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    return figure, list(axes.flatten())


def save(figure: "Figure", path: str | Path, *, dpi: int = 120) -> None:
    """Write a figure; the ending of ``path`` says in which format."""
    figure.savefig(path, dpi=dpi)


def tidy(axes: "Axes") -> None:
    """A light grid behind the data, and no frame above and to the right."""
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def length_axis(axes: "Axes", lengths: Iterable[int], label: str) -> None:
    """A logarithmic axis of lengths in tokens, marked only at these lengths: 8k, 16k."""
    lengths = list(lengths)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short_count(length) for length in lengths])
    axes.xaxis.set_minor_formatter(_no_labels())
    axes.set_xlabel(label)


def plain_numbers(axis: "Axis", *, at: tuple[int, ...] = ()) -> None:
    """Label a logarithmic axis with numbers such as 0.5 or 20, not with powers of ten.

    - at: multiples of each power of ten to mark, for instance (1, 2, 5); by default matplotlib chooses.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    if at:
        axis.set_major_locator(LogLocator(subs=at))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(_no_labels())


def _no_labels():
    from matplotlib.ticker import NullFormatter

    return NullFormatter()
