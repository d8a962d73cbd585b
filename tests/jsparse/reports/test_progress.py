"""What a run shows where there is no terminal, and above the bar where there is one."""

import io
import sys

from jsparse.reports.progress import steps_shown


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def shown(capsys, *, steps, seconds, start=0, enabled=True):
    """The lines on stderr of a run whose step n takes ``seconds(n)``."""
    clock = Clock()
    with steps_shown(enabled, "training", steps=steps, start=start, clock=clock) as show:
        for step in range(start + 1, steps + 1):
            clock.now += seconds(step)
            show(step, f"loss {step}")
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_fast_steps_have_a_line_for_each_tenth(capsys):
    lines = shown(capsys, steps=300, seconds=lambda step: 30.0 if step == 1 else 0.1)
    assert lines[0] == "step 1/300: loss 1"
    # From steps 2 to 4, not from the first, which took half a minute to compile.
    assert lines[1] == "time: about 30 s for 300 steps"
    assert lines[2] == "step 31/300: loss 31, about 27 s left"
    assert [line.split(":")[0] for line in lines[2:]] == [f"step {n}/300" for n in (*range(31, 300, 30), 300)]
    assert lines[-1] == "step 300/300: loss 300"


def test_slow_steps_have_a_line_each_minute(capsys):
    lines = shown(capsys, steps=300, start=100, seconds=lambda step: 25.0)
    assert lines[:4] == [
        "step 101/300: loss 101",
        "time: about 1 h 23 min for 200 steps",
        "step 104/300: loss 104, about 1 h 22 min left",
        "step 107/300: loss 107, about 1 h 20 min left",
    ]


def test_short_runs_say_nothing_of_their_time(capsys):
    assert shown(capsys, steps=1, seconds=lambda step: 2.0) == ["step 1/1: loss 1"]
    lines = shown(capsys, steps=4, seconds=lambda step: 2.0)
    assert lines == [
        "step 1/4: loss 1",
        "step 2/4: loss 2, about 4 s left",
        "step 3/4: loss 3, about 2 s left",
        "step 4/4: loss 4",
    ]


def test_nothing_is_shown_unless_asked_for(capsys):
    assert shown(capsys, steps=300, seconds=lambda step: 100.0, enabled=False) == []


def test_a_terminal_has_a_bar_and_the_estimate_above_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", terminal)
    clock = Clock()
    with steps_shown(True, "training", steps=10, clock=clock) as show:
        for step in range(1, 11):
            clock.now += 60.0
            show(step, f"loss {step}")
    text = terminal.getvalue()
    assert "time: about 10 min for 10 steps" in text and "training" in text and "10/10" in text
    assert "step 1/10" not in text
