"""What the whole loop leaves behind, and what it does when something is wrong on the way."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from rsi_jobs import layout, marker, plan
from rsi_jobs.layout import StageRef
from rsi_jobs.marker import MarkerReader
from rsi_jobs.store import open_store
from tests import killer


def rsi(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rsi_jobs.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_round_datasets_open_with_the_datasets_library_images_decoded(undisturbed: Path) -> None:
    found = rsi("path", "smoke", "--round", "1", "dataset", "--store", str(undisturbed))
    assert found.returncode == 0, found.stderr
    rows = datasets.load_dataset("parquet", data_files=found.stdout.split(), split="train")
    assert rows.num_rows == 24 * 4
    assert rows[0]["image"].size == (32, 32)
    assert {"prompt", "seed", "dual", "fused", "selected", "weight"} <= set(rows.column_names)
    selected = [row for row in rows.remove_columns("image") if row["selected"]]
    assert len(selected) <= 16
    assert np.mean([row["weight"] for row in selected]) == pytest.approx(1.0, abs=1e-4)


def test_the_exported_checkpoint_is_an_ordinary_diffusers_folder(undisturbed: Path, tmp_path: Path) -> None:
    done = rsi("export", "smoke", "--round", "1", "--to", str(tmp_path / "out"), "--store", str(undisturbed))
    assert done.returncode == 0, done.stderr
    code = (
        "import sys; sys.modules['rsi_jobs'] = None\n"  # our package must not be needed
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(pipe('a large red circle above a small blue square on white', num_inference_steps=2).images[0].size)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.stdout.strip() == "(32, 32)", made.stderr
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    names = [o.name for o in marker.read_one(open_store(str(undisturbed)), "smoke", finetune(1), 0).outputs]
    assert any(name.startswith("checkpoint/") for name in names)
    assert all(torch.isfinite(weight).all() for weight in pipe.unet.parameters())


def finetune(round_: int) -> StageRef:
    return StageRef(round_, "train", 0, "finetune")


def test_a_second_controller_says_so_and_leaves_without_harm(tmp_path: Path) -> None:
    first = killer.start(tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "smoke" / layout.LEASE).exists():
            assert first.poll() is None, first.communicate()[0].decode()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        second = killer.start(tmp_path)
        output, _ = second.communicate(timeout=60)
        assert second.returncode == 75
        assert f"process {first.pid}" in output.decode()
    finally:
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
    assert first.returncode == 130
    killer.finish(tmp_path)
    assert killer.ran_after_commit(tmp_path) == []


def test_damage_found_late_is_made_again_and_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """A bit flips in round 1's data after the run; a longer run replays that round and finds it."""
    store = tmp_path / "copy"
    shutil.copytree(undisturbed, store)
    opened = open_store(str(store))
    before = killer.results(store)
    made = marker.read_one(opened, "smoke", StageRef(1, "train", 0, "select"), 0).output("selection.parquet")
    data = bytearray(opened.get(made.key))
    data[len(data) // 2] ^= 1
    opened.put(made.key, bytes(data))
    killer.finish(store, "--rounds", "4")
    after = killer.results(store)
    assert {k: after[k] for k in before} == before
    assert any("_DAMAGED" in entry.key for entry in opened.list("smoke/r001/train-t0/select/"))


@pytest.mark.parametrize(
    ("setting", "stage", "reason"),
    [
        ("training.lr=1e30", "finetune", "not finite|times"),
        ("rewards.use=tests.rewards_for_tests:nan_in_training,dual", "select", "nan_in_training"),
        ("rewards.use=tests.rewards_for_tests:constant_in_training,dual", "select", "constant_in_training"),
    ],
)
def test_a_bad_result_is_rejected_with_its_reason_and_the_round_rolls_back(
    tmp_path: Path, setting: str, stage: str, reason: str
) -> None:
    killer.finish(tmp_path, "--set", setting)
    markers = MarkerReader(open_store(str(tmp_path)), "smoke").read()
    rejected = [
        (ref, m) for (ref, _), m in markers.items() if m.outcome == "rejected" and ref.stage != "gate"
    ]
    assert {(ref.round, ref.stage) for ref, _ in rejected} == {(1, stage), (2, stage)}
    for ref, bad in rejected:
        assert re.search(reason, bad.reason, re.IGNORECASE), bad.reason
        gate = markers[plan.gate_ref(ref.round, 0), 0]
        assert gate.decision == "rollback"
        assert bad.reason in gate.reason
    assert plan.best_round(markers, 3) == (0, 0)


def test_a_reward_that_fails_on_the_base_ends_the_run_with_its_name(tmp_path: Path) -> None:
    run = killer.start(tmp_path, "--set", "rewards.use=tests.rewards_for_tests:nan,dual")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 65, output.decode()
    assert "tests.rewards_for_tests:nan" in output.decode()


def test_the_report_and_every_number_in_the_markers_are_finite(undisturbed: Path) -> None:
    page = (undisturbed / "smoke" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    for (ref, _), m in MarkerReader(open_store(str(undisturbed)), "smoke").read().items():
        json.loads(m.dumps())
        assert m.seconds >= 0, ref
