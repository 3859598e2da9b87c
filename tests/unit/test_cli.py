"""The command line on a run that is there: what each command says, and how a process ends."""

# ruff: noqa: E501

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from rsi_jobs import cli, errors, layout, runs, start
from rsi_jobs.layout import StageRef
from rsi_jobs.lease import Lease
from rsi_jobs.store import Store, open_store
from tests.fakerun import FakeRun, small_config

COMMANDS = ("run", "status", "logs", "cancel", "resume", "show", "path", "report", "compare", "lineage", "export",
            "prune", "doctor", "mlflow")  # fmt: skip
FINETUNE = StageRef(1, "train", 0, "finetune")
NEXT = StageRef(2, "train", 0, "prompts")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a and b, alike but for a seed: round 1 of a accepted with a checkpoint, b only evaluated."""
    folder = tmp_path_factory.mktemp("template")
    store = open_store(str(folder))
    a = FakeRun(store, small_config("a", rounds=2))
    a.evaluation(0)
    a.round(1, "accept")
    add(store, "checkpoint/unet/diffusion_pytorch_model.safetensors", b"trained")
    add(store, "checkpoint/unet/config.json", b"{}")
    judged = layout.marker_key("a", StageRef(1, "eval", 0, "select"), 0)
    body = json.loads(store.get(judged))
    body["metrics"]["heldout"] = 9.0  # so that round 1 is the best
    store.put(judged, json.dumps(body).encode())
    b = small_config("b", rounds=2)
    changed = b.identity.model_copy(update={"seed": 8})
    FakeRun(store, b.model_copy(update={"identity": changed})).evaluation(0)
    return folder


def add(store: Store, name: str, data: bytes) -> None:
    """One more output of round 1's finetune."""
    marker = layout.marker_key("a", FINETUNE, 0)
    body = json.loads(store.get(marker))
    key = layout.attempt_key("a", FINETUNE, 0, "a0", name)
    store.put(key, data)
    entry = {"name": name, "key": key, "size": len(data), "sha256": sha256(data).hexdigest()}
    store.put(marker, json.dumps(body | {"outputs": [*body["outputs"], entry]}).encode())


@pytest.fixture
def store(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    shutil.copytree(template, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RSI_STORE", raising=False)
    return open_store("runs")


def rsi(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """What a command prints; it must end with `code`."""
    ended = cli.main(argv)
    said = capsys.readouterr()
    assert ended == code, said.err
    return said.out + said.err


def requests(monkeypatch: pytest.MonkeyPatch) -> list[start.Request]:
    """What is asked for from now on, instead of being started."""
    asked: list[start.Request] = []

    def note(request: start.Request) -> int:
        asked.append(request)
        return 0

    monkeypatch.setattr(start, "start", note)
    return asked


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_teaches_by_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = rsi(capsys, command, "--help")
    assert f"Example: rsi {command}" in said
    assert "..." not in rsi(capsys, "--help").partition("Commands:")[2], (
        "a summary that does not fit its line"
    )


def test_help_is_quick_to_import() -> None:
    code = "import sys, rsi_jobs.cli; print([m for m in ('mlflow', 'torch', 'pyarrow', 'numpy', 'boto3') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_controllers_side_loads_no_ml_library() -> None:
    code = (
        "import sys, rsi_jobs.start, rsi_jobs.commands.run, rsi_jobs.prune, rsi_jobs.lineage, rsi_jobs.comparison, "
        "rsi_jobs.doctor; print([m for m in ('torch', 'numpy', 'pyarrow', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("store")
def test_status_lists_runs_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    lines = rsi(capsys, "status").splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["a", "shapes", "7", "1/2"],
        ["b", "shapes", "8", "0/2"],
    ]
    said = rsi(capsys, "status", "a")
    assert "run a: stopped, 1 of 2 rounds done" in said
    assert "next: round 2 train prompts" in said
    body = json.loads(rsi(capsys, "status", "a", "--json"))
    assert (body["best"], body["state"], body["controller"]) == (1, "stopped", None)
    assert [r["standing"] for r in body["table"]] == ["base", "accepted"]


def test_status_knows_a_live_controller_a_cancellation_and_the_last_failure(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "starting\nTraceback (most recent call last):\nValueError: odd"
    store.put(layout.attempt_key("a", NEXT, 0, "failed", layout.LOG), said.encode())
    lease = Lease(store, "a")
    lease.acquire()
    body = json.loads(rsi(capsys, "status", "a", "--json"))
    lease.release()
    assert body["state"] == "running"
    assert body["last_failure"] == "round 2 train prompts shard 0, attempt failed: ValueError: odd"
    rsi(capsys, "cancel", "a")
    assert json.loads(rsi(capsys, "status", "a", "--json"))["state"] == "cancelled"


def test_cancel_is_a_record_that_stops_the_same_command_and_resume_takes_it_back(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(monkeypatch)
    assert "`rsi resume a` goes on" in rsi(capsys, "cancel", "a")
    assert runs.is_cancelled(store, "a")
    rsi(capsys, "resume", "a", "--rounds", "9")
    assert not runs.is_cancelled(store, "a")
    assert asked == [start.Request(rounds=9, run="a", store="./runs")]


def test_logs_lists_attempts_and_prints_the_latest_or_the_one_asked_for(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    for attempt, said in (("old", "no space\n"), ("new", "done\n")):
        store.put(layout.attempt_key("a", NEXT, 0, attempt, layout.LOG), said.encode())
    listed = rsi(capsys, "logs", "a", "--round", "2")
    assert [line.split()[5:7] for line in listed.splitlines()[1:]] == [["old", "open"], ["new", "open"]]
    where = ("logs", "a", "--round", "2", "--stage", "prompts")
    assert rsi(capsys, *where) == "done\n"
    assert rsi(capsys, *where, "--attempt", "ol") == "no space\n"
    both = rsi(capsys, *where, "--attempt", "all")
    assert both.index("attempt old") < both.index("no space") < both.index("attempt new") < both.index("done")


def test_path_names_what_the_markers_name(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    weights = (
        f"{store.uri}/a/r001/train-t0/finetune/s0000/a-a0/checkpoint/unet/diffusion_pytorch_model.safetensors"
    )
    for round_ in ("1", "best"):
        assert weights in rsi(capsys, "path", "a", "checkpoint", "--round", round_).splitlines()
    assert all(Path(line).is_file() for line in rsi(capsys, "path", "a", "checkpoint").splitlines())
    assert rsi(capsys, "path", "a", "checkpoint", "--round", "0") == "shapes:base\n"
    entry = next(
        e for e in json.loads(rsi(capsys, "path", "a", "checkpoint", "--json")) if e["uri"] == weights
    )
    assert (entry["size"], entry["sha256"]) == (7, sha256(b"trained").hexdigest())


@pytest.mark.usefixtures("store")
def test_show_marks_what_is_not_the_default_and_prints_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = rsi(capsys, "show", "a").splitlines()
    assert "* prompts.keep = 20  (default 200)" in lines
    assert "* seed = 7  (default 0)" in lines
    assert "  sampling.scheduler = dpm++" in lines
    assert json.loads(rsi(capsys, "show", "a", "--json"))["identity"]["seed"] == 7
    argv = json.loads(rsi(capsys, "show", "a", "--stage", "sample", "--round", "1", "--json"))
    assert [line[-1] for line in argv] == ["0", "1"], "a command a shard"
    assert argv[0][1:3] == ["-m", "rsi_jobs.stages.sample"]


@pytest.mark.usefixtures("store")
def test_compare_pairs_the_best_rounds_and_names_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    body = json.loads(rsi(capsys, "compare", "b", "a", "--json"))
    assert [(r["run"], r["best"]) for r in body["runs"]] == [("b", 0), ("a", 1)]
    found = {d["metric"]: d for d in body["differences"][0]["metrics"]}
    assert {"heldout", "judge.right"} <= set(found)
    assert all(d["low"] <= d["mean"] <= d["high"] for d in found.values())
    swapped = json.loads(rsi(capsys, "compare", "a", "b", "--json"))
    back = {d["metric"]: d for d in swapped["differences"][0]["metrics"]}
    assert back["judge.right"]["mean"] == pytest.approx(-found["judge.right"]["mean"])
    assert body["settings"]["a"] == ["seed is 7, not 8"]
    said = rsi(capsys, "compare", "a", "b")
    assert "b round 0 less a round 1, paired over the gate's prompts:" in said


def test_report_prints_opens_nothing_and_copies(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.put("a/report.html", b"<html>")
    assert rsi(capsys, "report", "a") == f"{store.uri}/a/report.html\n"
    rsi(capsys, "report", "a", "--to", str(tmp_path / "copy.html"))
    assert (tmp_path / "copy.html").read_bytes() == b"<html>"
    rsi(capsys, "report", "a", "--to", str(tmp_path / "copy.html"), code=errors.CannotCreate.exit_code)


def base_model(folder: Path) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet/config.json").write_text('{"base": 1}')
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"untrained")
    return folder


def test_export_writes_whole_or_not_at_all(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = json.loads(store.get("a/config.json"))
    body["identity"]["model"]["path"] = str(base_model(tmp_path / "base"))
    store.put("a/config.json", json.dumps(body).encode())
    out, weights = tmp_path / "out", "unet/diffusion_pytorch_model.safetensors"
    said = rsi(capsys, "export", "a", "--to", str(out))
    assert f"from_pretrained({str(out)!r})" in said
    assert (out / weights).read_bytes() == b"trained"
    rsi(capsys, "export", "a", "--round", "0", "--to", str(tmp_path / "of-base"))
    assert (tmp_path / "of-base" / weights).read_bytes() == b"untrained"
    store.put(layout.attempt_key("a", FINETUNE, 0, "a0", f"checkpoint/{weights}"), b"tampere")
    said = rsi(capsys, "export", "a", "--to", str(tmp_path / "bad"), code=errors.Damaged.exit_code)
    assert "does not match its marker" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "of-base", "out", "runs"], (
        "nothing half written"
    )


def test_doctor_says_a_line_a_check_and_fails_when_one_does(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rsi_jobs import devices, doctor

    monkeypatch.setattr(
        devices, "ask", lambda: devices.Devices("2.9", (devices.Gpu("H", 1 << 30, 2 << 30),), 4)
    )
    monkeypatch.setattr(doctor, "_model", lambda: "here")
    assert "H, 1.0 of 2.0 GiB free; 4 CPU threads; torch 2.9" in rsi(capsys, "doctor")
    checks = json.loads(rsi(capsys, "doctor", "--json", "--mlflow", "none"))
    assert all(check["ok"] for check in checks)
    assert {"store: one of two writers wins", "store: clock", "mlflow", "versions"} <= {
        c["name"] for c in checks
    }
    said = rsi(
        capsys, "doctor", "--mlflow", "http://me:pass-word@127.0.0.1:9", code=errors.ConfigError.exit_code
    )
    assert "FAIL mlflow" in said
    assert "http://127.0.0.1:9 does not answer" in said
    assert "pass-word" not in said
    assert store.exists("a/config.json")
    assert not list(store.list("rsi-doctor")), "the probe cleans up"


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (errors.PassingFault("busy"), 75, "error: busy\n"),
        (errors.Cancelled("two\n  lines"), 130, "error: two lines\n"),
        (KeyboardInterrupt(), 130, "error: stopped; `rsi run --run 'a b'` goes on where it was\n"),
        (AssertionError("ours"), 1, "AssertionError: ours\n"),
    ],
)
def test_how_a_command_ends(
    raised: BaseException,
    code: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(request: start.Request) -> int:
        raise raised

    monkeypatch.setattr(start, "start", fail)
    assert cli.main(["run", "--run", "a b"]) == code
    said = capsys.readouterr().err
    assert said.endswith(says)
    assert ("Traceback" in said) == (code == 1)


def test_the_controller_is_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(monkeypatch)
    argv = ["--rounds", "3", "--recipe", "sft", "--run", "r", "--mlflow", "none", "--seed", "4", "--set", "a.b=1",
            "--set", "c.d=2", "--backend", "local", "--config", "f.json"]  # fmt: skip
    monkeypatch.setenv("RSI_STORE", "s3://bucket/x")
    assert cli.controller_main(argv) == cli.main(["run", *argv]) == 0
    wanted = start.Request(
        3, "sft", "r", "s3://bucket/x", "none", "local", 4, ("a.b=1", "c.d=2"), Path("f.json")
    )
    assert asked == [wanted, wanted]
