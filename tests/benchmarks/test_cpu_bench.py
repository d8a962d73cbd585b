"""The CPU benchmark in miniature, with whichever peers are installed, and what it makes of numbers."""

import doctest
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sections
from cpu import growth, inputs, plots, report, rows, run, turns, workers
from cpu.rows import FLEX, FLOOR, OURS, SDPA, Case, Pair, Who
from cpu.turns import Measured, Pace

import jsparse
from jsparse import BlockMask
from jsparse.reports.console import write_json_whole

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TORCH = importlib.util.find_spec("torch") is not None


@pytest.mark.parametrize("module", [growth, inputs, report, rows, turns, workers], ids=lambda m: m.__name__)
def test_docstrings(module):
    assert doctest.testmod(module).failed == 0


# Input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--rows", "G1"], "--rows has 'G1'; allowed are prefill-streaming"),
        (["--lengths", "100"], "--lengths has 100; allowed for these rows are"),
        (["--rows", "generate", "--lengths", "4096"], "allowed for these rows are [2048, 8192, 32768]"),
        (["--rounds", "0"], "--rounds must be an integer >= 1, not 0"),
        (["--threads", "-1"], "--threads must be an integer >= 1, not -1"),
        (["--minutes", "0"], "--minutes must be a number > 0, not 0.0"),
        (["--peers-python", "/nowhere/python"], "--peers-python must be a Python interpreter"),
        (["--output", "results"], "--output must be a .json file, not results"),
        (["--markdown", "--output", "nowhere.json"], "nowhere.json does not exist"),
    ],
)
def test_wrong_input_is_named_before_anything_starts(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(run, "run_cases", lambda *_: pytest.fail("it started"))
    assert run.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_every_row_has_cases_and_a_description():
    for small in (False, True):
        cases = rows.chosen_cases(small=small)
        assert {case.row for case in cases} == {*rows.ROWS, "matmul"}
        for case in cases:
            names = {who.name for who in case.contenders} | {FLOOR, rows.NOBODY}
            for pair in case.pairs:
                assert {pair.ours, pair.peer} <= names and pair.row in rows.ABOUT


def test_goals_are_those_that_were_set():
    goals = {
        (pair.row, pair.ours, pair.peer, case.length, case.dtype): pair.goal
        for case in rows.chosen_cases()
        for pair in case.pairs
        if pair.goal is not None
    }
    assert goals["prefill-streaming", OURS, FLEX, 16384, "float32"] == 0.8
    assert goals["prefill-streaming", OURS, FLOOR, 65536, "bfloat16"] == 2.5
    assert goals["forward-backward", OURS, SDPA, 8192, "float32"] == 0.3
    assert goals["decode-pages", OURS, FLEX, 131072, "bfloat16"] == 0.5
    assert goals["generate-token", "jsparse, sparse", "transformers", 32768, "float32"] == 0.12
    assert goals["mask-building", OURS, "create_block_mask", 8192, "none"] == 0.01
    assert ("prefill-streaming", OURS, FLEX, 4096, "float32") not in goals


# Inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink, window", [(64, 256), (0, 128), (1, 1), (300, 129), (200, 400), (0, None)])
def test_visible_blocks_are_those_of_all_elements(sink, window):
    length = 1024
    q, k = np.arange(length)[:, None], np.arange(length)
    shown = (k <= q) & ((k < sink) | (k > q - (window or length)))
    shown = shown.reshape(8, 128, 8, 128)
    some, whole = inputs.visible_blocks(length, sink, window)
    np.testing.assert_array_equal(some, shown.any((1, 3)))
    np.testing.assert_array_equal(whole, shown.all((1, 3)))


def test_lists_of_top_blocks_are_valid_and_full():
    index, count = inputs.top_blocks(4096, rows.DEFAULT)
    BlockMask.from_indices(index, count, q_len=4096, kv_len=4096, block_q=128, block_kv=128)
    assert count[0].tolist() == [min(i + 1, 16) for i in range(32)]
    assert all(i in index[0, i, : count[0, i]] for i in range(32))


def test_the_floor_counts_the_blocks_that_jsparse_lists():
    case = next(case for case in rows.chosen_cases(["prefill-half"]) if case.length == 4096)
    products = [{"row": "matmul", "dtype": "float32", "ours_ms": 200.0, "peer_ms": 100.0}]
    masks = [jsparse.causal()] * 2 + [jsparse.streaming(64, 256)] * 2
    lists = BlockMask.from_token_masks(masks, 4096, 4096)
    blocks = 2 * int(lists.kv_count.sum())  # a row of lists is for two heads
    expected = blocks * 4 * 64 * 128 * 128 / (2 * 2048**3 / 0.1)
    assert run.floor_seconds(case, products, small=False) == pytest.approx(expected)
    assert run.floor_seconds(case, [], small=False) is None


# Numbers -----------------------------------------------------------------------------------------------


def test_exponents_are_those_of_known_curves():
    lengths = [4096, 8192, 16384, 65536]
    assert growth.exponent(lengths, [3 * n**1.5 for n in lengths]) == pytest.approx(1.5)
    assert growth.exponent(lengths, [7.0] * 4) == pytest.approx(0.0)
    noisy = [n * f for n, f in zip(lengths, (1.1, 0.9, 1.0, 1.05), strict=True)]
    assert growth.exponent(lengths, noisy) == pytest.approx(1.0, abs=0.1)
    for values in ([1.0], [1.0, -1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="no exponent fits"):
            growth.exponent(lengths[: len(values)], values)


CASE = Case(
    "r",
    8,
    "float32",
    (Who("a", "ours"), Who("b", "peers"), Who("c", "peers", compared=False)),
    (Pair("r", "a", "b", goal=0.5), Pair("r", "a", "c")),
)
FOREVER = lambda: float("inf")  # noqa: E731


def test_rounds_alternate_and_slow_ones_run_less_often():
    order = []
    seconds = {"a": 0.05, "b": 0.2, "c": 5.0}

    def run(who, repeats):
        order.append((who.name, repeats))
        return {"call": seconds[who.name]}

    times, errors = turns.alternate(CASE.contenders, run, Pace(rounds=4), FOREVER)
    assert not errors
    assert "".join(name for name, _ in order) == "abc" * 3 + "ab" * 2
    assert {name: repeats for name, repeats in order} == {"a": 2, "b": 1, "c": 1}
    assert sorted(times["a"]) == [0, 1, 2, 3, 4] and sorted(times["c"]) == [0, 1, 2]


def test_a_side_that_breaks_is_left_out_and_the_time_is_kept():
    def run(who, repeats):
        if who.name == "b":
            raise workers.WorkerError("it broke")
        return {"call": 0.01}

    times, errors = turns.alternate(CASE.contenders, run, Pace(), FOREVER)
    assert errors == {"b": "it broke"} and len(times["a"]) == 8
    times, _ = turns.alternate(CASE.contenders, run, Pace(), lambda: 0.0)
    assert list(times["a"]) == [0]


def test_ratios_are_taken_within_a_round():
    times = {
        "a": {0: {"call": 9.0}, 1: {"call": 1.0}, 2: {"call": 0.4}, 3: {"call": 1.0}},
        "b": {0: {"call": 1.0}, 1: {"call": 2.0}, 2: {"call": 1.0}, 3: {"call": 1.0}},
        "c": {0: {"call": 10.0}, 1: {"call": 10.0}},
    }
    measured = Measured(times, {}, {})
    pace = Pace(slow_s=9.5)
    same, other = (turns.entry(CASE, pair, measured, None, pace) for pair in CASE.pairs)
    assert (same["ratio_median"], same["ratio_min"], same["ratio_max"]) == (0.5, 0.4, 1.0)
    assert same["rounds"] == 3 and same["ours_ms"] == 1000 and same["goal"] == 0.5 and same["same_work"]
    assert (
        other["rounds"] == 2 and other["ratio_max"] == 0.9 and not other["same_work"]
    )  # slow: round 0 counts
    broken = Measured(times, {"b": "gone"}, {})
    result = turns.entry(CASE, CASE.pairs[0], broken, None, pace)
    assert result["error"] == "b: gone" and result["ratio_median"] is None


def test_outputs_are_judged():
    good, bad = np.ones((1, 4, 1, 2), np.float32), np.full((1, 4, 1, 2), 2, np.float32)
    errors, notes = turns.compare(CASE, {"a": {"out": good}, "b": {"out": good}})
    assert not errors and "b 0.0e+00" in notes[0]
    errors, _ = turns.compare(CASE, {"a": {"out": good}, "b": {"out": bad}})
    assert list(errors) == ["a"] and "wrong" in errors["a"]
    errors, notes = turns.compare(CASE, {"a": {"out": good}})
    assert not errors and "nobody" in notes[0]
    errors, _ = turns.compare(CASE, {"a": {"out": good}, "b": {"out": good[:, :2]}})
    assert "unequal shapes" in errors["b"]


# Workers -----------------------------------------------------------------------------------------------


def test_a_worker_answers_survives_prints_and_tells_how_it_ended(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from cpu.workers import Ready, repeated, serve\n"
        "def make(spec):\n"
        "    print('not an answer')\n"
        "    os.write(1, b'nor this\\n')\n"
        "    if spec == 'bad':\n"
        "        raise ValueError('no such thing')\n"
        "    return Ready(repeated(lambda: os._exit(7) if spec == 'crash' else None), dict)\n"
        "serve(make, ('numpy',))\n"
    )
    worker = workers.Worker([sys.executable, str(script)], {}, tmp_path / "log")
    try:
        assert worker.ask(60, "about")["versions"]["numpy"] == np.__version__
        worker.ask(60, "make", name="x", spec="good")
        assert worker.ask(60, "run", name="x", repeats=3)["seconds"]["call"] >= 0
        with pytest.raises(workers.WorkerError, match="ValueError: no such thing"):
            worker.ask(60, "make", name="y", spec="bad")
        worker.ask(60, "make", name="z", spec="crash")
        with pytest.raises(workers.WorkerError, match="exit code 7"):
            worker.ask(60, "run", name="z", repeats=1)
        assert worker.ask(60, "about")  # a new one
        assert "nor this" in (tmp_path / "log").read_text()
    finally:
        worker.close()


# Reports -----------------------------------------------------------------------------------------------

HEADER: dict[str, Any] = {
    "machine": "Linux x86_64",
    "processor": "A CPU",
    "cores": 2,
    "threads": 2,
    "versions": {"ours": {"jax": "0.12"}, "peers": {"torch": "2.13"}},
    "date": "2026-11-22",
    "command": "python benchmarks/cpu",
    "settings": {},
    "rounds": 7,
    "small": False,
}


def result(row: str, length: int, peer: str, ratio: float | None, **more: Any) -> dict[str, Any]:
    shown: dict[str, Any] = {"row": row, "length": length, "dtype": "float32", "ours": OURS, "peer": peer}
    shown |= {"ratio_median": ratio, "ratio_min": ratio, "ratio_max": ratio, "same_work": True}
    if "error" not in more:
        shown |= {"ours_ms": 12.5, "rounds": 7}
        if ratio is not None:
            shown["peer_ms"] = 12.5 / ratio
    return shown | more


RESULTS = [
    result("matmul", 2048, "torch", 1.25, ours="jax", same_work=False),
    result("prefill-streaming", 8192, FLEX, 0.7, goal=0.8),
    result("prefill-streaming", 8192, SDPA, 0.1, same_work=False),
    result("prefill-streaming", 8192, FLOOR, 2.75, same_work=False, goal=2.5),
    result("decode-pages", 32768, FLEX, 1.5, goal=0.5),
    result("mask-building", 8192, "create_block_mask", None, goal=0.01, error="no | torch"),
    result("growth", 4096, "none", None, ours="dense", peak_bytes=2**20),
    result("growth", 8192, "none", None, ours="dense", peak_bytes=2**21),
]


def test_exponents_are_added_to_results():
    (fit,) = run.fitted(RESULTS)
    assert (fit["row"], fit["ours"]) == ("growth, exponents", "dense")
    assert fit["memory_exponent"] == pytest.approx(1.0) and fit["time_exponent"] == pytest.approx(0.0)


def test_the_page_says_what_is_ahead_and_what_is_not():
    text = report.markdown([HEADER, *RESULTS, *run.fitted(RESULTS)])
    for words in (
        "- **Goals**: 1 of 4 met.",
        "- **Ahead throughout**: prefill-streaming float32 (0.1 to 0.7).",
        "- **Behind throughout**: decode-pages float32 (1.5).",
        "- **Not measured**: 1 of 5 ratios.",
        "| prefill-streaming | float32 | torch Flex |",
        "| **0.7** |",
        "| attention, dense | 12.5 ms, 1 MiB | 12.5 ms, 2 MiB | 0.00, 1.00 |",
        "ours: jax 0.12; peers: torch 2.13",
    ):
        assert words in text
    table = report.full_table([HEADER, *RESULTS])
    assert "| 12.5 ms | 0.7 (0.7 to 0.7) | ≤ 0.8, met |" in table
    assert "not measured: no / torch | ≤ 0.01, missed |" in table
    with pytest.raises(ValueError, match="--small"):
        report.markdown([HEADER | {"small": True}, *RESULTS])


def test_the_section_is_written_between_its_marks(tmp_path):
    page, file = tmp_path / "cpu.md", tmp_path / "cpu.json"
    write_json_whole(file, [HEADER, *RESULTS])
    ends = sections.END
    page.write_text(f"gpu {ends} text {report.BEGIN}\nwhat was here\n{ends} after\n")
    report.write_page(page, file)
    text = page.read_text()
    assert (
        text.startswith("gpu ")
        and text.endswith(f"{ends} after\n")
        and "what was here" not in text
        and "**0.7**" in text
    )
    assert "0.7 (0.7 to 0.7)" in (tmp_path / "cpu" / "table.md").read_text()
    report.write_page(page, file)
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        report.write_page(page, file)
    file.write_text("{}")
    with pytest.raises(ValueError, match="no file of results"):
        report.read(file)


def test_the_page_is_what_the_command_writes():
    text = (ROOT / "docs" / "results" / "cpu.md").read_text(encoding="utf-8")
    document = report.read(BENCHMARKS / "results" / "cpu.json")
    assert sections.put_between(text, report.markdown(document), report.BEGIN) == text
    assert report.full_table(document) == (BENCHMARKS / "results" / "cpu" / "table.md").read_text(
        encoding="utf-8"
    )


def test_the_table_and_the_plots_show_results_and_errors(tmp_path, capsys):
    document = [HEADER, *RESULTS, *run.fitted(RESULTS)]
    report.print_table(document)
    shown = capsys.readouterr().out
    for words in ("0.7 (0.7 to 0.7)", "≤ 0.8, met", "error: mask-building 8192", "memory 1.00"):
        assert words in shown
    files = plots.draw(document, tmp_path / "plots")
    assert [file.name for file in files] == ["prefill.png", "growth.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


# In miniature ------------------------------------------------------------------------------------------


def run_small(tmp_path: Path, *rows: str, python: str = sys.executable) -> list[dict[str, Any]]:
    output = tmp_path / "cpu.json"
    command = [sys.executable, str(BENCHMARKS / "cpu"), "--small", "--rounds", "2", "--rows", *rows]
    command += ["--output", str(output), "--threads", "1", "--peers-python", python]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode in (0, 1), done.stderr
    document = json.loads(output.read_text())
    assert "--output" not in document[0]["command"] and str(tmp_path) not in output.read_text()
    return document


def check(results: list[dict[str, Any]]) -> None:
    for each in results:
        assert {"row", "length", "dtype", "peer", "ratio_median", "ratio_min", "ratio_max"} <= set(each)
        if "error" in each or each["peer"] == "none":
            assert each["ratio_median"] is None
        else:
            assert 0 < each["ratio_min"] <= each["ratio_median"] <= each["ratio_max"]
            assert each["rounds"] == 2 and each["ours_ms"] > 0 and each["peer_ms"] > 0


@pytest.mark.slow
def test_in_miniature_without_peers(tmp_path):
    """The peers' interpreter lacks every package: ours runs all the same, and each peer is an error."""
    bare = tmp_path / "python"
    bare.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c "
        "'import runpy, sys; sys.modules.update(torch=None, onnx=None, onnxruntime=None); "
        'runpy.run_module(sys.argv[2], run_name="__main__")'
        '\' "$@"\n'
    )
    bare.chmod(0o755)
    rows = ("prefill-streaming", "selection", "growth", "decode-pages")
    header, *results = run_small(tmp_path, *rows, python=str(bare))
    check(results)
    assert header["versions"]["ours"]["jax"] and header["settings"]["OMP_NUM_THREADS"] == "1"
    failed = [each for each in results if "error" in each]
    assert failed and all(
        each["peer"] in (FLEX, SDPA, "torch", "onnxruntime GQA, dense", "torch gather + SDPA")
        for each in failed
    )
    assert all("torch" in each["error"] or "onnx" in each["error"] for each in failed)
    timed = {each["row"] for each in results if "error" not in each}
    alone = {"selection", "selection, a token", "growth", "growth, exponents"}
    assert timed == alone | {"prefill-streaming"}  # beside the floor, by our own matrix product
    if os.name == "posix" and sys.platform == "linux":
        assert all("peak_bytes" in each for each in results if each["row"] == "growth")


@pytest.mark.slow
@pytest.mark.skipif(not TORCH, reason="torch is not installed")
def test_in_miniature_with_peers(tmp_path):
    rows = ("prefill-half", "forward-backward", "decode-pages", "mask-building", "generate", "finetune-step")
    _, *results = run_small(tmp_path, *rows)
    check(results)
    errors = {each["error"] for each in results if "error" in each}
    allowed = {"onnx", "onnxruntime", "peft", "transformers"}  # which may be missing beside torch
    missing = {name for name in allowed if importlib.util.find_spec(name) is None}
    assert all(any(f"No module named '{name}'" in error for name in missing) for error in errors), errors
    compared = [each for each in results if each.get("same_work") and "error" not in each]
    assert compared and all("largest difference of outputs" in each["note"] for each in compared)
