"""Figures: what is drawn are the numbers, and what cannot be drawn is said before anything is computed."""

import importlib.util

import numpy as np
import pytest
from matplotlib.figure import Figure

from jsparse.evaluate.passkeys import PasskeyAccuracy
from jsparse.evaluate.perplexity import Perplexity
from jsparse.evaluate.plots import _draw_passkeys, _draw_perplexity, check_can_plot, plot_evaluation
from jsparse.extras import MissingExtra

PERPLEXITIES = [Perplexity(p, np.log(p), 100, context, 8) for context, p in ((2048, 8.5), (512, 9.5))]
PASSKEYS = [
    PasskeyAccuracy(length, depth, correct, 4)
    for (length, depth), correct in zip(
        [(512, 0.5), (512, 0.0), (256, 0.0), (256, 0.5)], [1, 2, 3, 4], strict=True
    )
]


def test_a_line_a_name_by_context():
    axes = Figure().subplots()
    _draw_perplexity(axes, {"full": PERPLEXITIES, "shifted": PERPLEXITIES[:1]})
    full, shifted = axes.get_lines()
    assert np.asarray(full.get_xydata()).tolist() == [[512, 9.5], [2048, 8.5]] and full.get_label() == "full"
    assert np.asarray(shifted.get_xydata()).tolist() == [[2048, 8.5]]
    assert axes.get_xscale() == "log" and [t.get_text() for t in axes.get_xticklabels()] == ["512", "2048"]


def test_a_heat_map_of_depths_and_lengths():
    axes = Figure().subplots()
    _draw_passkeys(axes, PASSKEYS)
    (image,) = axes.get_images()
    assert np.asarray(image.get_array()).tolist() == [[0.75, 0.5], [1.0, 0.25]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["256", "512"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0%", "50%"]


def test_a_figure_is_written(tmp_path):
    plot_evaluation(tmp_path / "both.png", perplexity={"full": PERPLEXITIES}, passkeys=PASSKEYS)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("passkeys", [PASSKEYS[:3], [*PASSKEYS, PASSKEYS[0]]])
def test_a_table_with_a_hole_or_twice_the_same(passkeys, tmp_path):
    with pytest.raises(ValueError, match="one result for each of 2 lengths and 2 depths"):
        plot_evaluation(tmp_path / "passkeys.png", passkeys=passkeys)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_evaluation(tmp_path / "nothing.png", perplexity={"full": []})


def test_where_no_figure_can_be_written(tmp_path, monkeypatch):
    check_can_plot(tmp_path / "figure.PDF")
    with pytest.raises(FileNotFoundError, match="the folder of .*figure.png does not exist"):
        check_can_plot(tmp_path / "no" / "figure.png")
    with pytest.raises(ValueError, match=r"figure.txt must end in one of .*\.png"):
        check_can_plot(tmp_path / "figure.txt")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[plot\]'"):
        check_can_plot(tmp_path / "figure.png")
