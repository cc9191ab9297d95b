"""Progress where stderr is no terminal: nothing of short work, a line a minute of long work."""

from __future__ import annotations

import pytest
from qexport_cli.progress import Lines, speaks, work


class Clock:
    """Seconds that the test decides."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_short_work_says_nothing(clock):
    said: list[str] = []
    lines = Lines(said.append, clock)
    for done in range(60):
        clock.now = 100 + done
        lines("solving", done, 60)
    assert said == []


def test_a_line_a_minute_with_what_is_left(clock):
    said: list[str] = []
    lines = Lines(said.append, clock)
    for done in range(0, 401, 10):
        clock.now = 100 + done
        lines(f"training: loss {1 / (done + 1):.4f}", done, 400)
    assert said == [
        "training: loss 0.0164, 60 of 400, 6 min left",
        "training: loss 0.0083, 120 of 400, 5 min left",
        "training: loss 0.0055, 180 of 400, 4 min left",
        "training: loss 0.0041, 240 of 400, 3 min left",
        "training: loss 0.0033, 300 of 400, 2 min left",
        "training: loss 0.0028, 360 of 400, 1 min left",
    ]


def test_what_is_left_is_of_the_stage_and_of_this_run(clock):
    """Neither the time of the stage before nor the steps that an earlier run made count."""
    said: list[str] = []
    lines = Lines(said.append, clock)
    lines("drawing", 0, 10)
    clock.now += 59
    lines("training: loss 1", 500, 1000)
    clock.now += 36
    lines("training: loss 1", 502, 1000)
    assert said == ["training: loss 1, 502 of 1000, 2 h 29 min left"]


def test_a_stage_that_has_just_begun_promises_nothing(clock):
    said: list[str] = []
    lines = Lines(said.append, clock)
    clock.now += 60
    lines("training: loss 1", 500, 1000)
    assert said == ["training: loss 1, 500 of 1000"]


def test_a_stage_that_is_through_has_nothing_left(clock):
    said: list[str] = []
    lines = Lines(said.append, clock)
    lines("solving", 0, 10)
    clock.now += 90
    lines("solving", 10, 10)
    assert said == ["solving, 10 of 10"]


def test_lines_go_to_stderr_beside_a_clean_stdout(capsys, monkeypatch):
    monkeypatch.setattr("qexport_cli.progress.LINE_SECONDS", 0.0)
    with work() as report:
        report("solving", 1, 2)
        print("a library's chatter")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["solving, 1 of 2", "a library's chatter"]


def test_of_several_processes_the_first_speaks(capsys, monkeypatch):
    assert speaks()
    monkeypatch.setattr("qexport_cli.progress.LINE_SECONDS", 0.0)
    monkeypatch.setenv("RANK", "1")
    assert not speaks()
    with work() as report:
        report("solving", 1, 2)
    assert capsys.readouterr().err == ""
