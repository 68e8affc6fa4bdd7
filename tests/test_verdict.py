"""The verdict of benchmarks/guidance.py: of Calibrated with memory against DPS, by a reader where one was asked for, as sample.py's quickstart reads."""

import runpy
from pathlib import Path

import numpy as np
import pytest

GUIDANCE = Path(__file__).parents[1] / "benchmarks" / "guidance.py"
PLAIN, READ = "Calibrated, memory", "Calibrated, memory, noise-aware"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(GUIDANCE.parent)
    return runpy.run_path(str(GUIDANCE), run_name="loaded")


def rows(bench, paid):
    """One unit, tuned to a shift of 1, kl_lower 0.5 and these nats by guidance."""

    def one(value):
        return value, np.full(8, value)

    return [
        bench["Figure"]("u", name, 1.0, 1.0, 8, 0, one(1.0), one(nats), one(0.5), one(0.0), 8.0, False, 0.1)
        for name, nats in paid.items()
    ]


@pytest.mark.parametrize(
    ("paid", "verdict"),
    [
        ({"DPS": 2.0, PLAIN: 1.0}, f"PASS: the KL efficiency of {PLAIN} is 2.0 times"),
        ({"DPS": 2.0, PLAIN: 1.1}, f"FAIL: the KL efficiency of {PLAIN} is 1.8 times"),
        ({"DPS": 2.0, PLAIN: 1.9, READ: 0.8}, f"PASS: the KL efficiency of {READ} is 2.5 times"),
        ({"DPS": 2.0, PLAIN: 0.8, READ: 1.9}, f"FAIL: the KL efficiency of {READ} is 1.1 times"),
    ],
)
def test_one_row_is_judged_and_against_dps(bench, capsys, paid, verdict):
    closing = bench["print_closing"](rows(bench, paid), ["u"], 1.0)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert len(said) == 1
    assert said[0].startswith(verdict)
    assert closing["efficiency"]["DPS"] == pytest.approx(0.25)


def test_no_verdict_away_from_the_shift_of_the_goal(bench, capsys):
    figures = rows(bench, {"DPS": 2.0, PLAIN: 1.0})
    for f in figures:
        f.target = 2.0
    bench["print_closing"](figures, ["u"], 2.0)
    assert "2.0 times" in (out := capsys.readouterr().out)
    assert "PASS" not in out


def test_the_default_units_are_read_by_the_bundled_reader(bench, monkeypatch):
    def asked(*more):
        monkeypatch.setattr("sys.argv", ["guidance.py", *more])
        return bench["arguments"]()

    assert asked().noise_aware == "bundled"
    assert READ in asked().guidance
    assert asked("--units", "bundled,class=cat").noise_aware == "bundled"
    assert asked("--prior", "elsewhere").noise_aware is None
    assert asked("--units", "resnet18,class=cat").noise_aware is None
    unread = "bundled,layer=blocks.3,tokens=patch,reduction=max,channel=17"
    assert asked("--units", "bundled,class=cat", unread).noise_aware is None
    assert READ not in asked("--units", unread).guidance
    with pytest.raises(SystemExit):
        asked("--units", unread, "--guidance", READ)
