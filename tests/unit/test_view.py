"""What a person sees of a run: plain lines, the live block, the summary."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from rsi_jobs import rounds
from rsi_jobs.config import RunConfig
from rsi_jobs.layout import Phase, Stage, StageRef
from rsi_jobs.marker import Marker, Markers
from rsi_jobs.plan import Finish, Job, gate_ref
from rsi_jobs.runners import Progress
from rsi_jobs.view import Lines, LiveView, open_view, summary

CONFIG = RunConfig.model_validate({"run": "made-up", "rounds": 4, "operations": {"shards": 2}})
SHARDED: tuple[Stage, ...] = ("sample", "score")
GAIN = {"heldout.vs_base": 0.21, "heldout.vs_base.low": 0.1, "heldout.vs_base.high": 0.32}


class Script:
    """Markers that come one after another, each taking `seconds` of an invented clock."""

    def __init__(self) -> None:
        self.now, self.markers = 1000.0, Markers()

    def add(self, round_: int, phase: Phase, stage: Stage, attempt_no: int = 0, *, shard: int = 0,
            seconds: float = 2.0, **fields: Any) -> None:  # fmt: skip
        ref = StageRef(round_, phase, attempt_no, stage)
        self.markers[ref, shard] = Marker(
            stage=ref.folder, shard=shard, shards=2 if stage in SHARDED else 1, attempt="a", inputs="",
            started=self.now, seconds=seconds,
            breakdown={"compute": seconds / 2, "load": seconds / 4}, **fields,
        )  # fmt: skip
        self.now += seconds

    def evaluation(self, round_: int, metrics: dict[str, float], attempt_no: int = 0) -> None:
        for stage in SHARDED:
            for shard in (0, 1):
                self.add(round_, "eval", stage, attempt_no, shard=shard, metrics={"images": 100.0})
        self.add(round_, "eval", "select", attempt_no, metrics={"heldout": 0.0} | metrics)

    def training(self, round_: int, **finetune: Any) -> None:
        self.add(round_, "train", "prompts", metrics={"raw": 600.0, "kept": 200.0})
        for stage in SHARDED:
            for shard in (0, 1):
                self.add(round_, "train", stage, shard=shard, metrics={"images": 800.0})
        self.add(round_, "train", "select", metrics={"selected": 160.0})
        self.add(round_, "train", "finetune", **(finetune or {"metrics": {"steps": 40.0, "loss": 0.25}}))

    def decide(self, round_: int, attempt_no: int, decision: str, reason: str) -> None:
        ref = gate_ref(round_, attempt_no)
        self.markers[ref, 0] = Marker.model_validate({
            "stage": ref.folder, "shard": 0, "attempt": "controller", "inputs": "", "started": self.now,
            "seconds": 0.0, "decision": decision, "reason": reason})  # fmt: skip


@pytest.fixture
def script() -> Script:
    """Base; accepted; accepted at half step; rolled back; rejected half way."""
    s = Script()
    s.evaluation(0, {"judge.right": 0.3, "judge.extra": 0.2, "diversity": 0.4})
    s.training(1)
    s.evaluation(1, GAIN | {"judge.right": 0.412, "judge.extra": 0.1, "diversity": 0.39})
    s.decide(1, 0, "accept", "no worse than the best round")
    s.training(2)
    s.evaluation(2, GAIN)
    s.decide(2, 0, "half", "the held-out score fell")
    s.add(2, "train", "finetune", 1)
    s.evaluation(2, GAIN, 1)
    s.decide(2, 1, "accept", "no worse than the best round")
    s.training(3)
    s.evaluation(3, GAIN)
    s.decide(3, 0, "half", "diversity fell")
    s.add(3, "train", "finetune", 1)
    s.evaluation(3, GAIN, 1)
    s.decide(3, 1, "rollback", "diversity fell")
    s.training(4, outcome="rejected", reason="the loss is not finite")
    s.decide(4, 0, "rollback", "finetune was rejected: the loss is not finite")
    return s


def plain(width: int = 80) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, force_terminal=False, highlight=False), out


def feed(view: Lines, markers: Markers) -> None:
    """Every marker arrives in a turn of its own, and every turn is shown twice."""
    seen = Markers()
    view.update(CONFIG, dict(seen), {}, {})
    for place, marker in markers.items():
        seen[place] = marker
        for _ in range(2):
            view.update(CONFIG, dict(seen), {}, {})


def test_a_line_for_each_stage_and_decision_and_none_twice(script: Script) -> None:
    console, out = plain()
    feed(Lines(console), script.markers)
    lines = out.getvalue().splitlines()
    assert len(lines) == len(set(lines)) == 1 + len({ref for ref, _ in script.markers})
    assert lines[0] == "run made-up (recipe shapes, seed 0): 4 rounds to do"
    assert "round 1/4  prompts         2.0 s  200 of 600 prompts kept" in lines
    assert "round 1/4  sample          4.0 s  1600 images, 400.0/s" in lines
    assert "round 1/4  finetune        2.0 s  40 steps, loss 0.2500" in lines
    assert "round 1/4  eval select     2.0 s  held-out +0.210 [+0.100, +0.320] vs base, right 41.2%" in lines
    assert "round 1/4  verdict: accepted (no worse than the best round)" in lines
    assert "round 2/4  verdict: once more at half the step (the held-out score fell)" in lines
    assert "round 2/4  verdict: accepted at half the step (no worse than the best round)" in lines
    assert "round 3/4  verdict: rolled back (diversity fell)" in lines
    assert "round 4/4  finetune        2.0 s  rejected: the loss is not finite" in lines


def test_a_stage_is_told_only_when_all_its_shards_are_done(script: Script) -> None:
    console, out = plain()
    view = Lines(console)
    view.update(CONFIG, {}, {}, {})
    place = (StageRef(0, "eval", 0, "sample"), 0)
    view.update(CONFIG, {place: script.markers[place]}, {}, {})
    assert len(out.getvalue().splitlines()) == 1


def test_a_controller_that_starts_again_does_not_repeat_what_stood(script: Script) -> None:
    console, out = plain()
    view = Lines(console)
    view.update(CONFIG, script.markers, {}, {})
    assert out.getvalue() == "run made-up (recipe shapes, seed 0): continuing, 4 of 4 rounds done\n"


def test_lines_hold_no_control_characters_and_are_not_wrapped() -> None:
    console, out = plain(40)
    view = Lines(console)
    view.message("the server said \x1b[31mno\x1b[0m\r[bold]" + "x" * 100)
    view.message("the server said \x1b[31mno\x1b[0m\r[bold]" + "x" * 100)
    text = out.getvalue()
    assert text.count("\n") == 1
    assert "[bold]" in text
    assert all(c.isprintable() for c in text.rstrip("\n"))


def test_a_terminal_gets_the_live_view_and_a_pipe_gets_lines() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    assert isinstance(open_view(terminal), LiveView)
    assert isinstance(open_view(plain()[0]), Lines)


def test_the_live_view_shows_place_speed_scores_verdicts_and_time_left(script: Script) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=30, _environ={"TERM": "xterm"})
    now = [script.now]
    view = LiveView(console, clock=lambda: now[0])
    done = {place: m for place, m in script.markers.items() if place[0].round <= 2}
    ref = StageRef(3, "train", 0, "sample")
    jobs = {ref: Job(ref, "running")}
    try:
        for at, images in ((0.0, 100), (2.0, 200)):
            now[0] = script.now + at
            out.seek(0)
            out.truncate()
            view.update(CONFIG, done, jobs, {(ref, 0): Progress(images, 800, "images")})
    finally:
        view.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "made-up, round 3 of 4" in shown
    assert "sample, 0 of 2 shards, 200 of 800 images, 50.0 images/s" in shown
    assert "round 2: held-out +0.210 [+0.100, +0.320] vs base" in shown
    assert "1 accepted  2 half step" in shown
    # Rounds 1 and 2 took 24 s and 36 s: the two rounds to come 30 s each.
    assert "about 1 min 0 s" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_summary_fits_80_columns_and_its_seconds_add_up(script: Script) -> None:
    console, out = plain()
    work = sum(m.seconds for m in script.markers.values())
    for part in summary(
        CONFIG, script.markers, Finish(1, "all 4 rounds are done"), "s3://bucket/p", work + 9.5
    ):
        console.print(part)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "all 4 rounds are done; the best round is 1: held-out +0.210" in text
    for row in ("1  accepted", "2  half step", "3  rolled back", "4  rejected"):
        assert re.search(rf"^\s*{row}\b", text, re.MULTILINE), row
    assert "s3://bucket/p/made-up/report.html" in text
    assert "rsi export made-up --round best --to DIR" in text
    table = text[text.index("stage ") :].splitlines()[1:]
    rows = [m for line in table if (m := re.match(r"(\S.*?) {2,}(\d+\.\d)(?: |$)", line))]
    seconds = {m[1]: float(m[2]) for m in rows}
    assert seconds["waiting and start-up"] == pytest.approx(9.5)
    total = seconds.pop("total")
    assert total == pytest.approx(work + 9.5, abs=0.06)
    assert sum(seconds.values()) == pytest.approx(total, abs=0.06)


def test_work_side_by_side_is_counted_once_in_the_total() -> None:
    s = Script()
    s.add(1, "train", "sample", seconds=10.0)
    s.now -= 6.0
    s.add(1, "report", "report", seconds=6.0)
    assert rounds.busy(s.markers.values()) == pytest.approx(10.0)
    console, out = plain()
    for part in summary(CONFIG, s.markers, Finish(0, "cancelled"), "runs", 12.0):
        console.print(part)
    assert re.search(r"done at the same time +-6\.0", out.getvalue())
    assert re.search(r"waiting and start-up +2\.0", out.getvalue())
    assert re.search(r"total +12\.0", out.getvalue())


def test_the_view_loads_no_array_library() -> None:
    code = "import sys, rsi_jobs.view; print([m for m in ('numpy', 'torch', 'pyarrow') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
