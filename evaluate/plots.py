"""Figures of evaluations: perplexity by context, and passkeys by length and depth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jsparse.evaluate.passkeys import PasskeyAccuracy
from jsparse.evaluate.perplexity import Perplexity
from jsparse.reports.figures import new_figure, require_matplotlib, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_can_plot(path: str | Path) -> None:
    """Raise, before hours of evaluation, if ``plot_evaluation`` could not write ``path``.

    Raises MissingExtra where matplotlib is not installed, FileNotFoundError where the folder does not exist,
    ValueError for a file format that matplotlib does not write.
    """
    require_matplotlib("plot")
    from matplotlib.backend_bases import FigureCanvasBase

    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"plot: the folder of {path} does not exist")
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(f"plot: {path} must end in one of .{', .'.join(formats)}")


def plot_evaluation(
    path: str | Path,
    *,
    perplexity: Mapping[str, Sequence[Perplexity]] | None = None,
    passkeys: Sequence[PasskeyAccuracy] = (),
) -> None:
    """Draw one figure of what is given: perplexity by context, one line per name, and a heat map of passkeys.

    - path: the file; its ending gives the format.
    - perplexity: results of ``perplexity_by_context``, by their names in the legend.
    - passkeys: results of ``evaluate_passkeys``, each length with every depth. Lengths and depths are equally
      far apart in the figure.

    Raises what :func:`check_can_plot` does, and ValueError where there is nothing to draw, or where a length
    lacks a depth or has it twice.

    >>> results = [Perplexity(9.5, 2.25, 100, 1024, 512), Perplexity(9.0, 2.2, 100, 2048, 1024)]
    >>> plot_evaluation("perplexity.png", perplexity={"full": results})
    """
    lines = {name: results for name, results in (perplexity or {}).items() if results}
    if not lines and not passkeys:
        raise ValueError("perplexity and passkeys are both empty: there is nothing to draw")
    check_can_plot(path)
    panels = bool(lines) + bool(passkeys)
    figure, axes = new_figure(1, panels, width=5.5 * panels, height=4.2)
    if lines:
        _draw_perplexity(axes[0], lines)
    if passkeys:
        _draw_passkeys(axes[-1], passkeys)
    save(figure, path)


def _draw_perplexity(axes: "Axes", lines: Mapping[str, Sequence[Perplexity]]) -> None:
    for name, results in lines.items():
        ordered = sorted(results, key=lambda result: result.context)
        axes.plot([r.context for r in ordered], [r.perplexity for r in ordered], marker="o", label=name)
    contexts = sorted({result.context for results in lines.values() for result in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [str(context) for context in contexts], minor=False)
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("perplexity")
    axes.legend()


def _draw_passkeys(axes: "Axes", passkeys: Sequence[PasskeyAccuracy]) -> None:
    lengths = sorted({result.length for result in passkeys})
    depths = sorted({result.depth for result in passkeys})
    image = axes.imshow(_table(passkeys, lengths, depths), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("depth of the passkey")
    axes.figure.colorbar(image, ax=axes, label="passkeys found")


def _table(passkeys: Sequence[PasskeyAccuracy], lengths: list[int], depths: list[float]) -> np.ndarray:
    """Accuracy, [depths, lengths]."""
    cells = {(result.depth, result.length): result.accuracy for result in passkeys}
    if not len(cells) == len(passkeys) == len(lengths) * len(depths):
        raise ValueError(
            f"passkeys must have one result for each of {len(lengths)} lengths and {len(depths)} depths, not "
            f"{len(passkeys)} of {len(cells)} kinds"
        )
    return np.array([[cells[depth, length] for length in lengths] for depth in depths])
