"""The GPU benchmark without a GPU: everything but the device itself, and a run in miniature on the CPU."""

import doctest
import importlib.util
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import pytest
import sections
from gpu import cache_peers, conformance, contest, peers, report, rows, run, workers

from jsparse.evaluate.speed.turns import ratios
from jsparse.reports.console import write_json_whole

ROOT = Path(__file__).parents[2]
H200 = measure.Ceilings(flops=790e12, bytes=4.3e12, exps=3.9e12)
ROW: dict[str, Any] = {row.name: row for row in rows.ROWS}


@pytest.mark.parametrize(
    "module", [conformance, run, measure, rows, sections, workers], ids=lambda m: m.__name__
)
def test_docstrings(module):
    assert doctest.testmod(module).failed == 0


# Floors: worked out by hand for an H200, in microseconds -------------------------------------------------


@pytest.mark.parametrize(
    "name, floor_us",
    [
        ("G1", 22_300),
        ("G1-backward", 55_700),
        ("G2", 700),
        ("G3", 11_500),
        ("G4", 2_230),
        ("G5", 5_600),
        ("G6", 62.4),
        ("G7", 3.9),
        ("G8", 31.2),
    ],
)
def test_floors_are_those_worked_out_by_hand(name, floor_us):
    assert rows.work(ROW[name]).floor_us(H200) == pytest.approx(floor_us, rel=0.015)


def test_the_floor_of_quantised_pages_counts_their_scales():
    tokens = 2 * 16 * 8 * 4096  # keys and values, sequences, KV heads, selected
    for name, value_bytes in (("G9-int8", 128), ("G9-int4", 64)):
        expected = tokens * (value_bytes + 8) / 4.3e12 * 1e6
        assert rows.work(ROW[name]).floor_us(H200) == pytest.approx(expected)


def test_the_floor_of_shifted_groups_is_below_that_of_groups_alone():
    # Four groups of 64 blocks in half of the heads; in the others three, and two of 32 at the ends.
    blocks = 16 * 4 * (64 * 65 // 2) + 16 * (3 * (64 * 65 // 2) + 2 * (32 * 33 // 2))
    floor = rows.work(ROW["G10"]).floor_us(H200)
    assert floor == pytest.approx(4 * 128 * 128**2 * blocks / 790e12 * 1e6)
    assert floor < 2 * 128 * 32 * 32768 * 8192 / 790e12 * 1e6  # 2.8 ms


def test_the_largest_of_three_terms_is_the_floor():
    ceilings = measure.Ceilings(flops=1e12, bytes=1e12, exps=1e12)
    for work in (measure.Work(3e6, 1e6, 2e6), measure.Work(1e6, 3e6, 2e6), measure.Work(1e6, 2e6, 3e6)):
        assert work.floor_us(ceilings) == pytest.approx(3)


def test_rates():
    assert measure.Work(flops=5e12, bytes=9e9).rate(10_000) == {"tflops": 500.0}
    assert measure.Work(bytes=4e9).rate(1000) == {"gb_per_s": 4000.0}


# Rows ----------------------------------------------------------------------------------------------------


def pairs(row: rows.Prefill) -> np.ndarray:
    """[Hq, blocks, blocks]: whether any token of one block sees any of the other, by the masks themselves."""
    token = np.arange(row.length)
    count = row.length // rows.BLOCK
    cut = (count, rows.BLOCK, count, rows.BLOCK)
    seen = {mask: mask(token[:, None], token).reshape(cut).any((1, 3)) for mask in row.masks}
    return np.stack([seen[mask] for mask in rows.head_masks(row)])


@pytest.mark.parametrize("name", ["G1", "G2", "G3", "G10"])
def test_visited_blocks_are_those_in_which_something_is_seen(name):
    row: Any = rows.chosen_rows([name], [16384 if name == "G10" else 2048])[0]
    assert rows.visited_blocks(row) == pairs(row).sum()


def test_random_lists_are_causal_hold_the_diagonal_and_a_tenth():
    row = ROW["G4"]
    index, count = rows.random_lists(row)
    blocks = row.length // rows.BLOCK
    assert index.shape[:2] == count.shape == (row.kv_heads, blocks)
    for head, i in np.ndindex(*count.shape):
        listed = index[head, i, : count[head, i]]
        assert listed[-1] == i and (np.diff(listed) > 0).all() and listed[0] >= 0
        assert (index[head, i, count[head, i] :] == -1).all()
    causal = row.q_heads * blocks * (blocks + 1) // 2
    assert rows.visited_blocks(row) / causal == pytest.approx(0.1, rel=0.01)
    assert not np.array_equal(index[0], index[1])  # each KV head has its own


def test_page_lists_share_no_page_and_cover_the_cache():
    lists = rows.page_lists(ROW["G7"])
    assert lists.shape == (32, 1, 8, 64) and (np.diff(lists) > 0).all()
    assert np.array_equal(np.sort(lists[:, 0, 3].ravel()), np.arange(2048))
    assert rows.work(ROW["G7"]).bytes * len(lists) > 5 * 50e6  # once round is far more than L2 holds


def test_rows_and_lengths_are_chosen_by_name():
    assert [row.name for row in rows.chosen_rows(["G9", "G7"], None)] == ["G9-int8", "G9-int4", "G7"]
    assert [row.length for row in rows.chosen_rows(["G2"], [4096, 8192])] == [4096, 8192]
    assert {row.name.split("-")[0] for row in rows.ROWS} == {f"G{i}" for i in range(1, 11)}
    with pytest.raises(ValueError, match="'G11' is none of G1, "):
        rows.chosen_rows(["G11"], None)
    with pytest.raises(ValueError, match="G10 needs a multiple of 8192, at least 8192, not 12288"):
        rows.chosen_rows(["G10"], [12288])
    with pytest.raises(ValueError, match="G6 needs a multiple of 64, at least 8192, not 4096"):
        rows.chosen_rows(["G6"], [4096])


# Agreement -----------------------------------------------------------------------------------------------


def test_one_wrong_tile_of_one_head_is_seen():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1000, 8, 16)), jnp.float32)
    wrong = x.at[1, 900:910, 5].add(0.5)
    error = np.linalg.norm(wrong - x) / np.linalg.norm(x)
    assert error < 2e-2 < measure.tile_error(wrong, x)
    tile = np.s_[1, 896:1000, 5]
    assert measure.tile_error(wrong, x) == pytest.approx(
        float(np.linalg.norm((wrong - x)[tile]) / np.linalg.norm(x[tile])), rel=1e-5
    )
    assert measure.tile_error(x * 1.001, x) == pytest.approx(1e-3, rel=1e-2)
    assert not measure.tile_error(x.at[0, 0, 0, 0].set(jnp.nan), x) <= 1.0
    with pytest.raises(ValueError, match="unequal shapes"):
        measure.tile_error(x[:, 1:], x)


def test_who_is_wrong_is_judged_by_the_others():
    assert measure.judge({"a": 0.001, "b": 0.002}, 0.02) == {}
    assert set(measure.judge({"a": 0.001, "b": float("nan")}, 0.02)) == {"b"}
    with pytest.raises(ArithmeticError, match="wrong: our outputs differ from a by 0.5, b by nan"):
        measure.judge({"a": 0.5, "b": float("nan")}, 0.02)
    with pytest.raises(ArithmeticError, match="nothing to compare"):
        measure.judge({}, 0.02)


# Timing --------------------------------------------------------------------------------------------------


class Machine:
    """A clock, and contenders that advance it: a launch costs its time only when it is waited for."""

    def __init__(self):
        self.now, self.log, self.pending = 0.0, [], 0.0

    def contender(self, name, seconds, calls=1, breaks_at=None, value=1.0, same_work=True):
        def launch():
            self.log.append(name)
            if breaks_at is not None and self.log.count(name) >= breaks_at:
                raise RuntimeError("broken\n  pipe")
            self.pending += seconds

        def wait(_):
            self.now, self.pending = self.now + self.pending, 0.0

        return measure.Contender(
            name=name,
            launch=launch,
            wait=wait,
            outputs=lambda: {"out": jnp.full((1, 128, 1, 4), value)},
            work=measure.Work(bytes=4e6),
            calls=calls,
            same_work=same_work,
        )


def test_a_time_is_divided_by_launches_and_calls():
    machine = Machine()
    contender = machine.contender("a", seconds=0.004, calls=4)
    assert measure.time_us(contender, 5, lambda: machine.now) == pytest.approx(1000)
    assert machine.log == ["a"] * 5


def test_contenders_run_in_turns():
    machine = Machine()
    pair = [machine.contender("a", 0.05), machine.contender("b", 0.025)]
    times, errors = measure.alternate(pair, rounds=3, target_s=0.05, clock=lambda: machine.now)
    assert not errors
    assert machine.log == ["a", "a", "b", "b"] + ["a", "b", "b"] * 3  # warmed up; as many as fill the time
    assert times["a"] == pytest.approx([5e4] * 3) and times["b"] == pytest.approx([2.5e4] * 3)


def test_one_that_breaks_leaves_the_others():
    machine = Machine()
    trio = [
        machine.contender("a", 0.05),
        machine.contender("b", 0.05, breaks_at=4),
        machine.contender("c", 0.05),
    ]
    times, errors = measure.alternate(trio, rounds=5, clock=lambda: machine.now)
    assert errors == {"b": "RuntimeError: broken pipe"}
    assert set(times) == {"a", "c"} and len(times["a"]) == len(times["c"]) == 5


def test_when_the_time_is_used_up_three_rounds_are_enough():
    machine = Machine()
    times, _ = measure.alternate(
        [machine.contender("a", 0.05)], rounds=9, seconds_left=lambda: -1.0, clock=lambda: machine.now
    )
    assert len(times["a"]) == 3


def test_ratios_are_taken_round_by_round():
    # Both twice as slow in one round: each ratio is 1/2, and so are all three figures.
    assert set(ratios([1.0, 2.0, 1.0], [2.0, 4.0, 2.0]).values()) == {0.5}


# One row: compared, then timed ---------------------------------------------------------------------------


def compete(contenders, last_resort="last resort"):
    makers = {c.name: (lambda c=c: c) if isinstance(c, measure.Contender) else c for c in contenders}
    return contest.compete(
        ROW["G7"], makers, "ours", last_resort, H200, rounds=3, target_s=0.001, seconds_left=lambda: 1e9
    )


def test_a_row_gives_a_result_for_each_contender():
    machine = Machine()
    found = compete(
        [machine.contender("ours", 1e-6), machine.contender("dense", 1e-6, value=7, same_work=False)]
        + [machine.contender("peer", 1e-6), machine.contender("last resort", 1e-6)]
    )
    assert [result["peer"] for result in found] == ["ours", "dense", "peer"]
    for result in found:
        assert (result["row"], result["length"], result["dtype"]) == ("G7", 131072, "bfloat16")
        assert result["ratio_min"] <= result["ratio_median"] <= result["ratio_max"]
        assert result["floor_us"] == pytest.approx(3.9, rel=0.01) and result["time_us"] > 0
        assert ("gb_per_s" in result) != ("tflops" in result)
    assert found[0]["ratio_median"] == found[0]["ratio_max"] == 1
    assert [result["same_work"] for result in found] == [True, False, True]
    json.dumps(found)


def test_outputs_that_disagree_are_reported_and_not_timed():
    machine = Machine()
    found = compete([machine.contender("ours", 1e-6), machine.contender("peer", 1e-6, value=1.5)])
    assert [result["peer"] for result in found] == ["ours"] and "differ from peer" in found[0]["error"]
    assert machine.log == ["ours", "peer"]  # once, and never again


def test_a_peer_that_fails_or_is_wrong_does_not_stop_the_row():
    machine = Machine()

    def absent():
        raise ModuleNotFoundError("No module named 'torch'")

    makers = {
        c.name: lambda c=c: c for c in (machine.contender("ours", 1e-6), machine.contender("peer", 1e-6))
    }
    makers |= {"absent": absent, "wrong": lambda: machine.contender("wrong", 1e-6, value=3)}
    found = contest.compete(
        ROW["G7"], makers, "ours", "", H200, rounds=3, target_s=0.001, seconds_left=lambda: 1e9
    )
    errors = {result["peer"]: result["error"] for result in found if "error" in result}
    assert errors["absent"] == "ModuleNotFoundError: No module named 'torch'" and "differ" in errors["wrong"]
    assert [result["peer"] for result in found if "error" not in result] == ["ours", "peer"]


def test_a_peer_that_takes_the_device_with_it_ends_the_worker():
    machine = Machine()

    def illegal_access():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def check_device():
        raise RuntimeError("nothing runs any more")

    makers = {"ours": lambda: machine.contender("ours", 1e-6), "peer": illegal_access}
    said = []
    with pytest.raises(RuntimeError, match="nothing runs any more"):
        contest.compete(
            ROW["G7"], makers, "ours", "", H200, lambda: 1e9, tell=said.append, check_device=check_device
        )
    assert said[-1]["peer"] == "peer" and "peer" not in said[0]


def test_the_last_resort_steps_in_where_nobody_else_can():
    machine = Machine()
    found = compete([machine.contender("ours", 1e-6), machine.contender("last resort", 1e-6)])
    assert [result["peer"] for result in found] == ["ours", "last resort"]


# Workers -------------------------------------------------------------------------------------------------

WORKER = """
import sys, time
sys.path.insert(0, {path!r})
from gpu.workers import tell
first = int(sys.argv[1])
print("a library's chatter", flush=True)
tell({{"device": "thing", "ceilings": {{}}}})
for row in range(first, 4):
    peers = [peer for peer in ("good", "bad") if peer not in sys.argv[2:]]
    tell({{"doing": f"row {{row}}"}})
    if row == {bad}:
        {misdeed}
    tell({{"done": [{{"row": row}}]}})
"""


def run_workers(tmp_path, misdeed, bad=1, seconds_left=lambda: 1e9, silence_s=1.0):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER).format(path=str(ROOT / "benchmarks"), bad=bad, misdeed=misdeed))
    results, devices = [], []
    ended = workers.run(
        lambda first, without: [sys.executable, str(script), str(first), *without],
        4,
        failed=lambda row, peer, why: {"row": row, "peer": peer, "error": why},
        started=devices.append,
        finished=results.extend,
        seconds_left=seconds_left,
        silence_s=silence_s,
    )
    return ended, results, devices


@pytest.mark.parametrize(
    "misdeed, reason",
    [("time.sleep(60)", "no answer for 1 s"), ("sys.exit(7)", r"the process ended (exit code 7)")],
)
def test_a_row_that_hangs_or_dies_costs_itself_only(tmp_path, misdeed, reason):
    ended, results, devices = run_workers(tmp_path, misdeed)
    assert ended == 4 and [result["row"] for result in results] == [0, 1, 2, 3]
    assert [("error" in result) for result in results] == [False, True, False, False]
    assert reason in results[1]["error"] and "row 1" in results[1]["error"]
    assert len(devices) == 2


def test_a_peer_that_breaks_a_row_is_left_out_of_it(tmp_path):
    misdeed = """for peer in peers:
            tell({"doing": f"row {row}, {peer}", "peer": peer})
            if peer == "bad":
                sys.exit(7)"""
    ended, results, devices = run_workers(tmp_path, misdeed)
    assert ended == 4 and len(devices) == 2
    (broken,) = [result for result in results if "error" in result]
    assert (broken["row"], broken["peer"]) == (1, "bad") and "row 1, bad" in broken["error"]
    assert [result["row"] for result in results] == [0, 1, 1, 2, 3]  # the row itself has a result too


def test_a_worker_may_end_after_a_row_and_another_goes_on(tmp_path):
    ended, results, devices = run_workers(tmp_path, 'tell({"done": [{"row": row}]}); sys.exit(1)')
    assert ended == 4 and results == [{"row": row} for row in range(4)] and len(devices) == 2


def test_rows_that_do_not_fit_the_time_are_left_out(tmp_path):
    end = time.monotonic() + 2
    ended, results, _ = run_workers(
        tmp_path, "time.sleep(60)", bad=2, seconds_left=lambda: end - time.monotonic(), silence_s=60
    )
    assert ended == 2 and results == [{"row": 0}, {"row": 1}]


def test_a_worker_that_cannot_start_ends_the_run(tmp_path, capsys):
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit(3)")
    ended = workers.run(
        lambda first, without: [sys.executable, str(script)],
        4,
        failed=lambda row, peer, why: {},
        started=lambda message: None,
        finished=lambda results: None,
        seconds_left=lambda: 1e9,
    )
    assert ended == 0 and "no worker could be started" in capsys.readouterr().out


# Conformance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "log, exit_code, summary",
    [
        ("t.py::a[x-kernel] PASSED [ 50%]\nt.py::b[kernel] PASSED [100%]", 0, "passed: 2 passed"),
        (
            "[gw0] [ 50%] PASSED t.py::a[kernel] \n[gw1] [100%] FAILED t.py::b[kernel] ",
            1,
            "NOT PASSED: 1 failed, 1 pass",
        ),
        ("t.py::a[kernel] PASSED [ 10%]\nt.py::b[kernel] ", None, "NOT FINISHED in its time: 1 passed"),
        ("", None, "NOT FINISHED in its time: no test ended"),
        ("t.py::a[kernel] SKIPPED (no device) [100%]", 0, "NOT PASSED: 1 skipped"),
        ("t.py::a[xla] PASSED [100%]", 0, "NOT RUN: no test for 'kernel' was found"),
        ("12 deselected", 5, "NOT RUN: no test for 'kernel' was found (pytest ended with 5)"),
        ("t.py::a[kernel] PASSED [100%]", 3, "NOT PASSED: 1 passed (pytest ended with 3)"),
    ],
)
def test_only_what_passed_is_said_to_have_passed(log, exit_code, summary):
    verdict = conformance.verdict(log, exit_code, "kernel")
    assert verdict["summary"].startswith(summary)
    assert verdict["passed"] == summary.startswith("passed")


def test_a_suite_runs_in_a_process_of_its_own(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os, pytest, time\n"
        "@pytest.mark.parametrize('name', [os.environ['JSPARSE_TEST_IMPLEMENTATION'], 'other'])\n"
        "def test_good(name): assert name == 'kernel' and os.environ['JAX_PLATFORMS'] == 'cpu'\n"
        "def test_kernel_slow(): time.sleep(float(os.environ.get('SLEEP', 0)))\n"
    )
    good = conformance.run_suite("test_it.py", "kernel", "cpu", 60, root=tmp_path)
    assert good["passed"] and good["tests"] == {"PASSED": 2}


def test_a_suite_that_does_not_end_is_not_passed(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text("import time\ndef test_kernel(): time.sleep(600)\n")
    cut_short = conformance.run_suite("test_it.py", "kernel", "cpu", 3, root=tmp_path)
    assert not cut_short["passed"] and "NOT FINISHED" in cut_short["summary"]


def test_without_pytest_nothing_is_said_to_have_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = conformance.run_suite("test_it.py", "kernel", "cpu", 60, root=tmp_path)
    assert not missing["passed"] and missing["summary"].startswith("NOT RUN: pytest")


# Reports -------------------------------------------------------------------------------------------------

HEADER = {
    "command": "python benchmarks/gpu",
    "date": "2000-01-01",
    "machine": "Linux x86_64, 1 cores",
    "device": "a device",
    "versions": {"jax": "0.0"},
    "ceilings": {"flops": 7e14, "bytes": 4e12, "exps": 3.9e12},
    "conformance": {"attention": {"passed": True, "summary": "passed: 3 passed"}},
    "left_out": ["G8 at 131072"],
    "smoke": False,
}


def result(row, peer, time_us, **more):
    numbers = {"ratio_median": 0.5, "ratio_min": 0.4, "ratio_max": 0.6, "time_us": time_us, "tflops": 500.0}
    return {
        "row": row,
        "length": 32768,
        "dtype": "bfloat16",
        "peer": peer,
        "same_work": True,
        "floor_us": 100.0,
    } | (numbers | more)


RESULTS = [
    result("G4", "jsparse", 200.0),
    result("G4", "cuDNN, dense", 400.0, same_work=False),
    {"row": "G4", "length": 32768, "dtype": "bfloat16", "peer": "torch Flex", "error": "OutOfMemory: a | b"},
    {"row": "G5", "length": 32768, "dtype": "bfloat16", "peer": "jsparse", "error": "wrong: a | b"},
]


def test_results_are_written_and_read_back(tmp_path):
    path = tmp_path / "folder" / "results.json"
    write_json_whole(path, {"header": HEADER, "results": RESULTS})
    assert report.read(path) == {"header": HEADER, "results": RESULTS}
    path.write_text("{}")
    with pytest.raises(ValueError, match="no file of results"):
        report.read(path)


def test_the_page_has_the_numbers_and_what_is_missing():
    lines = report.markdown({"header": HEADER, "results": RESULTS}, rows.ROWS).splitlines()
    table = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| G")}
    assert set(table) == set(ROW)
    assert "200 µs, 500 TFLOP/s | 2 | cuDNN, dense: 0.5 (0.4 to 0.6); torch Flex: failed" in table["G4"]
    assert "failed: wrong: a / b" in table["G5"] and report.NOT_YET in table["G8"]
    assert {line.count("|") for line in lines if line.startswith("|")} == {8}
    assert any("LEFT OUT" in line for line in lines) and any("passed: 3 passed" in line for line in lines)


def test_without_results_the_page_says_so_and_has_no_numbers():
    lines = report.markdown(None, rows.ROWS).splitlines()
    assert len(lines) == 2 + len(rows.ROWS)
    assert all(line.endswith(f"| {report.NOT_YET} |") for line in lines[2:])


def test_a_smoke_run_never_reaches_the_page():
    with pytest.raises(ValueError, match="smoke run"):
        report.markdown({"header": HEADER | {"smoke": True}, "results": RESULTS}, rows.ROWS)


def test_the_page_is_what_the_command_writes():
    text = (ROOT / "docs" / "results" / "gpu.md").read_text()
    # The whole of an H100 or H200; or nothing yet.
    files = [path for path in (ROOT / "benchmarks" / "results").glob("h?00.json")]
    documents = [report.read(path) for path in files] or [None]
    written = [
        sections.put_between(text, report.markdown(each, rows.ROWS), report.BEGIN) for each in documents
    ]
    assert text in written
    with pytest.raises(ValueError, match="once each"):
        sections.put_between("nothing", "section", report.BEGIN)


def test_the_table_prints_results_errors_and_notes(capsys):
    report.print_table(HEADER, RESULTS, {row.name: row.goal for row in rows.ROWS})
    shown = capsys.readouterr().out
    for words in (
        "cuDNN, dense",
        "0.5 (0.4 to 0.6)",
        "500 TFLOP/s",
        "OutOfMemory: a | b",
        "700 TFLOP/s",
        "LEFT OUT",
    ):
        assert words in shown


def test_the_plot_is_a_picture_and_a_pdf(tmp_path):
    report.draw(HEADER, RESULTS, tmp_path / "plot.json")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "plot.pdf").read_bytes()[:4] == b"%PDF"


# The whole program ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_smoke_run_goes_from_the_command_to_the_results(tmp_path):
    out = tmp_path / "smoke.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu"),
        "--smoke",
        "--no-tests",
        "--rows",
        "G2,G7,G8,G10",
    ]
    run = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    document = report.read(out)
    header, found = document["header"], {(r["row"], r["peer"]): r for r in document["results"]}
    assert header["smoke"] and header["left_out"] == [] and header["device"] == "cpu", run.stdout + run.stderr
    assert header["command"] == "python benchmarks/gpu --smoke --no-tests --rows G2,G7,G8,G10"
    assert not header["conformance"]["attention"]["passed"]
    assert run.returncode == 1  # nothing was tested
    others = {
        "G2": "jax.nn, dense",
        "G7": "gather + jax.nn",
        "G8": "XLA, elementwise",
        "G10": "roll + jax.nn",
    }
    for name, peer in others.items():
        for who in ("jsparse", peer):
            assert found[name, who]["time_us"] > 0, found
    assert "A SMOKE RUN" in run.stdout and (tmp_path / "smoke.png").exists()
    with pytest.raises(ValueError, match="smoke run"):
        report.markdown(document, rows.ROWS)


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax < 0.12 cannot interpret Mosaic GPU")
@pytest.mark.parametrize(
    "name, makers, other",
    [
        ("G4", peers.prefill, "jsparse, dense"),
        ("G7", cache_peers.decode, "gather + jax.nn"),
        ("G9-int4", cache_peers.decode, "jsparse, bfloat16"),
    ],
)
def test_the_kernels_compute_in_a_row_what_another_does(name, makers, other):
    made = makers(rows.shrunk(ROW[name]), peers.Setup("mosaic_gpu_interpret", gpu=False))
    outputs = {who: made[who]().outputs() for who in (peers.OURS, other)}
    (error,) = measure.agreement(outputs, peers.OURS).values()
    assert error < contest.TOLERANCE
    assert all(np.linalg.norm(np.asarray(x, np.float32)) > 0 for x in outputs[peers.OURS].values())


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert run.main(["--out", str(tmp_path / "none.json")]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())
