"""Every refusal is one sentence on stderr and a user's exit code, and leaves nothing behind."""

# ruff: noqa: E501 - a table is read a case a line

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rsi_jobs import cli, layout, runs
from rsi_jobs.layout import StageRef
from rsi_jobs.prompts import evalsets
from rsi_jobs.store import open_store
from tests.fakerun import FakeRun, small_config

SECRET = "a-secret-that-must-not-be-printed"
CONFIG, DATA, MISSING, CREATE, DENIED, USAGE, CANCELLED = 78, 65, 66, 73, 77, 64, 130
NEW = "run --store {at}/new --set model.path={at}/model"  # a run that would start, but for what follows
OLD = "--store {at}/store"

# argv, exit code, what the sentence must say
CASES: list[tuple[str, int, str]] = [
    # the recipe and the settings
    ("run --store {at}/new --recipe shaps", CONFIG, r"recipe 'shaps' is unknown: did you mean shapes\?"),
    ("run --store {at}/new --recipe zzz", CONFIG, r"recipe 'zzz' is unknown: there are shapes, "),
    (f"{NEW} --set trainin.lr=1", CONFIG, r"no section 'trainin'; did you mean training\?"),
    (f"{NEW} --set training.lrr=1", CONFIG, r"no field 'lrr'; did you mean training\.lr\?"),
    (f"{NEW} --set gate.zzz=1", CONFIG, r"no field 'zzz'; it has enabled, "),
    (f"{NEW} --set training.lr", CONFIG, r"'training\.lr' is not section\.field=value"),
    (f"{NEW} --set training.steps=many", CONFIG, r"training\.steps='many' is not accepted: .*integer"),
    (f"{NEW} --set sampling.steps=2.5", CONFIG, r"sampling\.steps=2\.5 is not accepted: .*integer"),
    (f"{NEW} --set prompts.clarity=perhaps", CONFIG, r"prompts\.clarity='perhaps' is not accepted: .*bool"),
    (f"{NEW} --set selection.method=best", CONFIG, r"selection\.method='best' .*'rank', 'mean_z'"),
    (f"{NEW} --set sampling.scheduler=ddpm", CONFIG, r"sampling\.scheduler='ddpm' .*'ddim'"),
    (f"{NEW} --set training.lr=0", CONFIG, r"training\.lr=0 is not accepted: .*greater than 0"),
    (f"{NEW} --set training.lr=NaN", CONFIG, r"training\.lr=nan is not accepted: .*finite"),
    (f"{NEW} --set weighting.cut=1.5", CONFIG, r"weighting\.cut=1\.5 is not accepted: .*less than or equal to 1"),
    (f"{NEW} --set gate.margin=-1", CONFIG, r"gate\.margin=-1 is not accepted: .*greater than or equal to 0"),
    (f"{NEW} --set training.ema=1", CONFIG, r"training\.ema=1 is not accepted: .*less than 1"),
    (f"{NEW} --set sampling.candidates=0", CONFIG, r"sampling\.candidates=0 is not accepted"),
    (f"{NEW} --set sampling.candidates=1", CONFIG, r"sampling\.candidates=1 leaves selection\.method=rank nothing"),
    (f"{NEW} --set operations.shards=99", CONFIG, r"operations\.shards=99 exceeds the \d+ batches of a round"),
    (f"{NEW} --set selection.keep=9999", CONFIG, r"selection\.keep=9999 exceeds prompts\.keep="),
    (f"{NEW} --set prompts.raw=1", CONFIG, r"prompts\.raw=1 is less than prompts\.keep="),
    (f"{NEW} --set training.replay=0.6 --set training.anchor=0.4", CONFIG, r"replay=0\.6 and training\.anchor=0\.4"),
    (f"{NEW} --set rewards.use=dual,heldout", CONFIG, r"rewards\.heldout=heldout also stands in rewards\.use"),
    (f"{NEW} --set rewards.use=dual,dual", CONFIG, r"rewards\.use=dual,dual names a reward twice"),
    (f"{NEW} --set rewards.use=", CONFIG, r"rewards\.use is empty"),
    (f"{NEW} --set rewards.use=daul", CONFIG, r"rewards\.use='daul' is unknown: did you mean dual\?"),
    (f"{NEW} --set rewards.heldout=zzz", CONFIG, r"rewards\.heldout='zzz' is unknown: choose from dual, "),
    (f"{NEW} --set rewards.use=my-module:f", CONFIG, r"'my-module:f' does not name a function"),
    (f"{NEW} --set rewards.use=no_such_module:f", CONFIG, r"module 'no_such_module' cannot be imported"),
    (f"{NEW} --set weighting.scheme=json:nothing", CONFIG, r"weighting\.scheme: .*'json' has no 'nothing'"),
    (f"{NEW} --set weighting.scheme=knm", CONFIG, r"weighting\.scheme='knm' is unknown: did you mean knn\?"),
    (f"{NEW} --set prompts.source=shape", CONFIG, r"prompts\.source='shape' is unknown: did you mean shapes\?"),
    (f"{NEW} --seed -1", CONFIG, r"--seed: seed=-1 is not accepted"),
    (f"{NEW} --seed 2147483648", CONFIG, r"seed=2147483648 is not accepted: .*less than 2147483648"),
    (f"{NEW} --rounds 0", CONFIG, r"--rounds: rounds=0 is not accepted"),
    (f"{NEW} --rounds 1000", CONFIG, r"rounds=1000 is not accepted: .*less than or equal to 999"),
    (f"{NEW} --config {{at}}/absent.json", CONFIG, r"--config .*absent\.json: there is no such file"),
    (f"{NEW} --config {{at}}/text.json", CONFIG, r"--config .*text\.json cannot be read as JSON"),
    (f"{NEW} --config {{at}}/list.json", CONFIG, r"--config .*list\.json is not an object of sections"),
    (f"{NEW} --config {{at}}/odd.json", CONFIG, r"--config .*odd\.json training\.lrr: .*did you mean training\.lr\?"),
    # prompts and evaluation sets
    (f"{NEW} --set prompts.source=file", CONFIG, r"prompts\.source=file needs prompts\.file"),
    (f"{NEW} --config {{at}}/absent-prompts.json", MISSING, r"nowhere\.txt cannot be read"),
    (f"{NEW} --config {{at}}/binary-prompts.json", DATA, r"binary\.txt is not UTF-8 text"),
    (f"{NEW} --config {{at}}/odd-prompts.json", DATA, r"prompts\.pdf: prompts are read from \.txt, "),
    (f"{NEW} --config {{at}}/empty-prompts.json", DATA, r"empty\.txt holds no prompts"),
    (f"{NEW} --config {{at}}/few-prompts.json", DATA, r"few\.txt holds 3 prompts, but prompts\.raw=\d+ of them"),
    (f"{NEW} --config {{at}}/leak-prompts.json", DATA, r"holds a prompt of the evaluation set, 'THE FIRST ONE'"),
    (f"{NEW} --set evaluation.gate=shapes:gates", CONFIG, r"evaluation set 'shapes:gates' is unknown: shapes has"),
    (f"{NEW} --set evaluation.gate_prompts=9999", CONFIG, r"'shapes:gate' has 512 prompts, 9999 were asked for"),
    (f"{NEW} --set evaluation.test=x.txt --set evaluation.test_prompts=3", MISSING, r"x\.txt cannot be read"),
    # the machine, the model, the backend
    (f"{NEW} --set operations.device=gpu", CONFIG, r"operations\.device='gpu' is unknown: give auto, cpu, cuda"),
    (f"{NEW} --set operations.device=cuda:99", CONFIG, r"cuda:99: this machine has no such CUDA device"),
    ("run --store {at}/new --set model.path={at}/empty", CONFIG, r"model\.path=.*is not a diffusers folder"),
    (f"{NEW} --backend slurm", CONFIG, r"--backend 'slurm' is not available: this version has local"),
    (f"{NEW} --backend kubernetes", CONFIG, r"--backend 'kubernetes' is not available"),
    (f"{NEW} --mlflow ftp://me:{SECRET}@host", CONFIG, r"--mlflow 'ftp://host' is not accepted: give http"),
    (f"{NEW} --mlflow mlruns", CONFIG, r"--mlflow 'mlruns' is not accepted"),
    # names and stores
    (f"{NEW} --run My_Run", CONFIG, r"--run 'My_Run' must start with a lower-case letter"),
    (f"{NEW} --run a-run-", CONFIG, r"--run 'a-run-' must start"),
    (f"{NEW} --run ''", CONFIG, r"--run '' must start"),
    (f"{NEW} --run {'a' * 29}", CONFIG, r"has 29 characters, at most 28 fit a Kubernetes Job name"),
    ("run --store '' --set model.path={at}/model", CONFIG, r"store '' is no folder"),
    ("run --store {at}/few.txt --set model.path={at}/model", CONFIG, r"store .*few\.txt is not a folder"),
    ("run --store {at}/few.txt/in --set model.path={at}/model", CONFIG, r"store .*few\.txt/in is not a folder"),
    ("run --store /sys/rsi-runs --set model.path={at}/model", DENIED, r"/sys/rsi-runs: .* give a folder that this user may write"),
    ("run --store /sys/kernel --set model.path={at}/model", DENIED, r"store /sys/kernel cannot be used: "),
    ("run --store gs://bucket/x --set model.path={at}/model", CONFIG, r"gs: is not supported; give a folder .*or s3"),
    ("run --store s3://B_B/x --set model.path={at}/model", CONFIG, r"'B_B' is no bucket name"),
    ("run --store s3://absent/x --set model.path={at}/model", CONFIG, r"--mlflow must be given, as the store s3:"),
    ("run --store s3://absent/x --mlflow none --set model.path={at}/model", DENIED, r"there is no bucket 'absent'"),
    ("run --store s3://strange/x --mlflow none --set model.path={at}/model", DENIED, r"SignatureDoesNotMatch|403"),
    ("run --store s3://readonly/x --mlflow none --set model.path={at}/model", DENIED, r"refused \(AccessDenied\)"),
    # a run that is there
    (f"run {OLD} --run made-up --seed 8 --set model.path={{at}}/model", CONFIG, r"has other settings \(seed is 7, not 8"),
    (f"run {OLD} --run corrupt", CONFIG, r"corrupt/config\.json is not JSON"),
    (f"run {OLD} --run future", CONFIG, r"future/config\.json: format=2 is not accepted"),
    (f"status {OLD} newer", DATA, r"has marker format 99, this version reads up to 1: upgrade rsi-jobs"),
    (f"prune {OLD} newer --yes", DATA, r"has marker format 99"),
    (f"run {OLD} --run cancelled", CANCELLED, r"run cancelled was cancelled: `rsi resume cancelled`"),
    (f"status {OLD} nobody", MISSING, r"there is no run 'nobody' in .*; it has: cancelled, corrupt, "),
    ("status --store {at}/new", MISSING, r"store .*new does not exist"),
    (f"cancel {OLD} nobody", MISSING, r"there is no run 'nobody'"),
    (f"resume {OLD} nobody", MISSING, r"there is no run 'nobody'"),
    (f"path {OLD} made-up dataset --round 9", MISSING, r"--round 9: the run has no such round, it has 0 to 2"),
    (f"path {OLD} made-up dataset --round last", USAGE, r"--round 'last' is no round: give best or a number"),
    (f"path {OLD} made-up dataset --round 0", MISSING, r"round 0 .* has no dataset: the base is only evaluated"),
    (f"path {OLD} made-up checkpoint --round 2", MISSING, r"round 2 has no checkpoint: its finetune was rejected"),
    (f"path {OLD} made-up pixels", USAGE, r"'pixels' cannot be named: choose from dataset, "),
    (f"lineage {OLD} made-up --image 12", USAGE, r"--image '12' is no image: give round-prompt-candidate"),
    (f"lineage {OLD} made-up --image r001-99999-00", MISSING, r"round 1 of run made-up has no such image"),
    (f"lineage {OLD} made-up --image r007-00000-00", MISSING, r"has selected no images, those that have are: 1, 2"),
    (f"export {OLD} made-up --to {{at}}/full", CREATE, r"--to .*full is there already and not empty"),
    (f"export {OLD} made-up --to {{at}}/few.txt", CREATE, r"--to .*few\.txt is there already"),
    (f"compare {OLD} made-up", USAGE, r"give at least two runs"),
    (f"compare {OLD} made-up nobody", MISSING, r"there is no run 'nobody'"),
    (f"logs {OLD} made-up --stage paint", USAGE, r"--stage 'paint' is unknown: choose from prompts, "),
    (f"logs {OLD} made-up --round 9", MISSING, r"has no attempts that match"),
    (f"logs {OLD} made-up --round 1 --stage select --attempt zz", MISSING, r"--attempt 'zz': there are a0"),
    (f"show {OLD} made-up --stage paint", USAGE, r"--stage 'paint' is unknown"),
    (f"report {OLD} made-up", MISSING, r"run made-up has no report yet"),
    # the command line itself
    ("runn", USAGE, r"No such command 'runn'"),
    ("run --zzz", USAGE, r"No such option: --zzz"),
    ("run --rounds eight", USAGE, r"--rounds.*integer"),
    ("show", USAGE, r"Missing argument 'RUN'"),
    (f"lineage {OLD} made-up", USAGE, r"Missing option '--image'"),
    ("mlflow --port 99999", USAGE, r"--port"),
]  # fmt: skip


class RefusingS3(BaseHTTPRequestHandler):
    """Three buckets: one that is not there, one for others, one that can only be read."""

    def do_GET(self) -> None:
        bucket = self.path.split("/")[1].split("?")[0]
        code, status = {"absent": ("NoSuchBucket", 404), "strange": ("SignatureDoesNotMatch", 403)}.get(
            bucket, ("AccessDenied", 403)
        )
        if bucket == "readonly" and self.command == "HEAD":
            code, status = "NoSuchKey", 404
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET  # noqa: N815 - the names http.server looks for

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), RefusingS3)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the cases name."""
    at = tmp_path_factory.mktemp("bad")
    for folder in ("model", "empty", "full"):
        (at / folder).mkdir()
    (at / "model/model_index.json").write_text("{}")
    (at / "full/file").write_text("x")
    (at / "few.txt").write_text("a red circle\na blue circle\na green circle\n")
    (at / "empty.txt").write_text("\n\n")
    (at / "prompts.pdf").write_text("a red circle")
    (at / "binary.txt").write_bytes(b"\xff\xfe\x00")
    gate = evalsets.load("shapes:gate", 1)[0].prompt
    (at / "leak.txt").write_text(
        "".join(f"a red circle number {n}\n" for n in range(700)) + gate.upper() + "\n"
    )
    (at / "text.json").write_text("training: {}")
    (at / "list.json").write_text("[1]")
    (at / "odd.json").write_text('{"training": {"lrr": 1}}')
    files = {"absent": "nowhere.txt", "binary": "binary.txt", "odd": "prompts.pdf", "empty": "empty.txt",
             "few": "few.txt", "leak": "leak.txt"}  # fmt: skip
    for name, file in files.items():
        body = {"prompts": {"source": "file", "file": str(at / file)}}
        (at / f"{name}-prompts.json").write_text(json.dumps(body))
    store = open_store(str(at / "store"))
    run = FakeRun(store, small_config("made-up", rounds=2))
    run.evaluation(0)
    run.round(1, "accept")
    run.training(2, "the loss is not finite at step 12")
    run.decide(2, 0, "rollback", "finetune was rejected")
    for name in ("cancelled", "newer", "future", "corrupt"):
        runs.begin(store, small_config(name).model_copy(update={"identity": run.config.identity}))
    body = json.loads(store.get("cancelled/config.json"))
    body["identity"]["model"]["path"] = str(at / "model")
    store.put("cancelled/config.json", json.dumps(body).encode())
    runs.cancel(store, "cancelled")
    store.put(layout.marker_key("newer", StageRef(0, "eval", 0, "sample"), 0), b'{"format": 99}')
    store.put("future/config.json", json.dumps(body | {"format": 2, "run": "future"}).encode())
    store.put("corrupt/config.json", store.get("corrupt/config.json")[:100])
    return at


@pytest.fixture
def environment(at: Path, refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RSI_STORE", "MLFLOW_TRACKING_URI", "KUBERNETES_SERVICE_HOST", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_ENDPOINT_URL": refusing, "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": SECRET,
                        "AWS_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(at)


def snapshot(at: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder but the store's lock, with its size and time."""
    kept = (p for p in at.rglob("*") if p.name != ".rsi-lock")
    return {
        str(p): (p.stat().st_size if p.is_file() else 0, p.stat().st_mtime_ns if p.is_file() else 0)
        for p in kept
    }


def arguments(at: Path, argv: str) -> list[str]:
    return ["" if part == "''" else part for part in argv.format(at=at).split()]


def check(said: str, code: int, wanted: tuple[int, str], at: Path) -> None:
    gate = evalsets.load("shapes:gate", 1)[0].prompt
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    assert SECRET not in said
    assert re.search(wanted[1].replace("THE FIRST ONE", gate.upper()), said), said
    assert code == wanted[0], said


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("argv", "code", "says"), CASES, ids=[re.sub(r"\S*\{at\}", "", c[0])[-60:] for c in CASES]
)
def test_it_is_refused_in_one_sentence_and_nothing_is_written(
    argv: str, code: int, says: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(at)
    ended = cli.main(arguments(at, argv))
    said = capsys.readouterr()
    check(said.err, ended, (code, says), at)
    assert said.out == ""
    assert snapshot(at) == before


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("program", "argv", "code", "says"),
    [
        ("rsi_jobs.controller", "--store {at}/new --recipe shaps", CONFIG, "did you mean shapes"),
        ("rsi_jobs.cli", "run --rounds eight", USAGE, "--rounds"),
    ],
)
def test_a_process_ends_with_the_same_code_and_sentence(
    program: str, argv: str, code: int, says: str, at: Path
) -> None:
    command = [sys.executable, "-m", program, *arguments(at, argv)]
    root = str(Path(cli.__file__).parents[1])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=at, env=os.environ | {"PYTHONPATH": root}
    )
    check(done.stderr, done.returncode, (code, says), at)
