"""What a person sees while a run goes on."""

import pytest

from gemma_gguf.console import Console, time_left


@pytest.mark.parametrize(
    ("elapsed", "done", "left", "expected"),
    [
        pytest.param(4.9, 10, 90, "", id="too-early"),
        pytest.param(10, 0, 90, "", id="nothing-done"),
        pytest.param(10, 100, 0, "", id="at-the-end"),
        pytest.param(10, 10, 20, "about 20 s left", id="seconds"),
        pytest.param(60, 10, 50, "about 5 min left", id="minutes"),
        pytest.param(600, 10, 200, "about 3.3 h left", id="hours"),
    ],
)
def test_time_left_goes_by_the_pace_so_far(elapsed: float, done: float, left: float, expected: str) -> None:
    assert time_left(elapsed, done, left) == expected


def test_plain_lines_say_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal: a line at the start and every 20 s. Work of an earlier run does not count as pace."""
    now = [1000.0]
    monkeypatch.setattr("gemma_gguf.console.time.monotonic", lambda: now[0])
    shown = Console()
    for done in range(40, 101, 10):  # 40 s of work were done by an earlier run
        shown.progress("quantising", done, 100, "s of work")
        now[0] += 15
    lines = capsys.readouterr().err.splitlines()
    assert [line.strip() for line in lines] == [
        "quantising: 40/100 s of work",
        "quantising: 60/100 s of work, about 60 s left",
        "quantising: 80/100 s of work, about 30 s left",
        "quantising: 100/100 s of work",
    ]
