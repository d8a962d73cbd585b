"""What is wrong with the options of a command is one line in any terminal, and --help has whole lines."""

import io
import re
import sys

import pytest

from jsparse.__main__ import main
from jsparse.reports.console import parse
from jsparse.train.commands import FinetuneCommand

GIVEN = "--model a --data b --output c --context 32"


@pytest.mark.parametrize("columns", ["40", "80", "200"])
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "finetune",
            "--model, --data, --output and --context are required (jsparse finetune --help lists the ",
        ),
        (
            "bench decode --steps abc",
            "--output is required (jsparse bench decode --help lists the options)",
        ),
        (
            "finetune --contxt 5",
            "unknown option --contxt; the nearest is --context (jsparse finetune --help lists the options)",
        ),
        (f"finetune {GIVEN} --lora_rnk=4", "unknown option --lora_rnk; the nearest is --lora-rank ("),
        (f"finetune {GIVEN} --mesh.fsbp 4", "unknown option --mesh.fsbp; the nearest is --mesh.fsdp ("),
        (f"finetune {GIVEN} --zzzz 4", "unknown option --zzzz ("),
        # What a slip of the pen leads to is not what is wrong.
        (
            f"finetune {GIVEN} --eval-dat b --eval-every 5",
            "unknown option --eval-dat; the nearest is --eval-",
        ),
        (f"finetune {GIVEN} --context abc", "--context must be an integer, not 'abc'\n"),
        (f"finetune {GIVEN} --mesh.fsdp 2.5", "--mesh.fsdp must be an integer, not '2.5'\n"),
        (f"finetune {GIVEN} --learning-rate=fast", "--learning-rate must be a number or None, not 'fast'\n"),
        (f"finetune {GIVEN} --rope --seed 1", "--rope needs a value\n"),
        (
            f"finetune {GIVEN} --lora-rank-pattern q_proj many",
            "--lora-rank-pattern must be a mapping from text to an integer, not 'q_proj many'\n",
        ),
        ("evaluate --contexts 5 a --stride 8", "--contexts must be a list, each an integer, not '5 a'\n"),
        ("chat --policy best", "--policy must be one of 'lserve', 'dense', 'streaming', 'quest', "),
        (
            f"finetune {GIVEN} --schedule foo",
            "schedule must be one of 'constant', 'cosine', 'linear', not 'foo'\n",
        ),
        (f"finetune {GIVEN} --mesh.fsdp 0", "mesh: fsdp must be an integer >= 1, not 0\n"),
        (
            f"finetune {GIVEN} --schedule very_long_{'x' * 300}",
            f"schedule must be one of 'constant', 'cosine', 'linear', not 'very_long_{'x' * 300}'\n",
        ),
        (f"finetune {GIVEN} --steps 5 6", "'6' belongs to no option: --steps takes one value\n"),
        (f"finetune {GIVEN} --rslora=True", "'True' belongs to no option: --rslora takes no value\n"),
        ("convert stray --model a --output b", "'stray' belongs to no option\n"),
        ("generate --prompt a --sparsity 0.5", "--sparsity says how many heads of a --pattern stream"),
    ],
)
def test_one_line_says_what_is_wrong(command, message, columns, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as exit:
        main(command.split())
    out, err = capfd.readouterr()
    assert exit.value.code == 2 and out == ""
    assert err.startswith(f"jsparse: error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("columns", [80, 120])
def test_help_breaks_lines_only_where_they_are_full(columns, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as exit:
        main(["finetune", "--help"])
    out, err = capfd.readouterr()
    assert exit.value.code == 0 and err == ""
    rows = [row[2:-2] for row in out.splitlines() if row.startswith("\u2502")]
    assert len(rows) > 100 and {len(row) for row in rows} == {columns - 4}
    for row, after in zip(rows, rows[1:], strict=False):
        if re.match(r" {24}\S", after) and not row.startswith("--"):
            assert len(row.rstrip()) + 1 + len(after.split()[0]) > columns - 4, row
    assert "``" not in out


@pytest.mark.parametrize(("columns", "widest"), [("60", 60), ("80", 80), ("300", 100)])
def test_the_commands_fit_the_terminal(columns, widest, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["--help"]) == 0
    out, _ = capfd.readouterr()
    assert widest - 12 < max(map(len, out.splitlines())) <= widest


def test_options_that_are_right_come_as_they_are():
    found = parse(
        FinetuneCommand, "finetune", [*GIVEN.split(), "--coordinator=--x", "--no-rslora", "--lora_rank", "4"]
    )
    assert (found.coordinator, found.rslora, found.lora_rank) == ("--x", False, 4)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    ("option", "allowed"), [("--context", "an integer"), ("--lora-rank", "an integer or None")]
)
def test_a_terminal_that_is_not_utf_8(encoding, option, allowed, capsys, monkeypatch):
    """There tyro draws rules, but no boxes."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", *GIVEN.split(), option, "abc"])
    assert capsys.readouterr().err == f"jsparse: error: {option} must be {allowed}, not 'abc'\n"
