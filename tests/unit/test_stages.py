"""The stages on the real, shipped model: what is fixed by a key, and what is a bad result."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rsi_jobs import dataset, layout, marker, recipes, runs
from rsi_jobs.config import RunConfig, apply
from rsi_jobs.diffusion import base_folder
from rsi_jobs.layout import StageRef
from rsi_jobs.stages import prompts, sample, score, select
from rsi_jobs.stages.attempt import main
from rsi_jobs.store import Store, open_store

STAGES = {"prompts": prompts.work, "sample": sample.work, "score": score.work, "select": select.work}


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """Stages set threads and determinism for their process; here that is the tests' own."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.set_flush_denormal(False)


def begin(folder: Path, **changes: object) -> Store:
    store = open_store(str(folder))
    config = RunConfig(run="r", identity=recipes.recipe("smoke"))
    fields = {"sampling.candidates": 2, "prompts.keep": 12, "prompts.raw": 40, "selection.keep": 8} | changes
    runs.begin(store, apply(config, fields, "test"))
    return store


def run(store: Store, *names: str, phase: str = "train") -> None:
    for name in names:
        argv = ["--run", f"{store.uri}/r", "--round", "1" if phase == "train" else "0", "--phase", phase]
        assert main(name, STAGES[name], argv) == 0  # type: ignore[arg-type]


def made(store: Store, stage: layout.Stage, phase: layout.Phase = "train") -> marker.Marker:
    return marker.read_one(store, "r", StageRef(1 if phase == "train" else 0, phase, 0, stage), 0)


def output(store: Store, stage: layout.Stage, name: str, folder: Path) -> Path:
    path = folder / name
    store.download(made(store, stage).output(name).key, path)
    return path


def test_every_constructed_prompt_is_kept_or_has_its_reason(tmp_path: Path) -> None:
    store = begin(tmp_path / "s")
    run(store, "prompts")
    rows = dataset.read(output(store, "prompts", "prompts.parquet", tmp_path))
    assert len(rows["prompt"]) == 40
    assert all((reason == "") == kept for reason, kept in zip(rows["reason"], rows["kept"], strict=True))
    assert sorted(rows["prompt_id"][rows["kept"]]) == list(range(12))


def test_too_few_usable_prompts_reject_the_round(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"what is thing number {n}?\n" for n in range(40)))
    store = begin(tmp_path / "s", **{"prompts.source": "file", "prompts.file": str(file)})
    run(store, "prompts")
    assert made(store, "prompts").outcome == "rejected"
    assert "0 of 12 prompts passed" in made(store, "prompts").reason


def test_a_model_that_draws_black_images_is_a_rejected_result(tmp_path: Path) -> None:
    broken = tmp_path / "base"
    shutil.copytree(base_folder("shapes:base"), broken)
    weights = load_file(broken / "vae" / "diffusion_pytorch_model.safetensors")
    for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
        weights[name] = torch.zeros_like(weights[name])
    save_file(weights, broken / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    store = begin(tmp_path / "s", **{"model.path": str(broken)})
    run(store, "prompts", "sample")
    result = made(store, "sample")
    assert result.outcome == "rejected"
    assert result.reason == "24 of 24 images are black or constant"


def test_the_best_by_rank_is_weighted_and_published_with_its_image(tmp_path: Path) -> None:
    store = begin(tmp_path / "s", **{"sampling.candidates": 4})
    run(store, "prompts", "sample", "score", "select")
    rows = dataset.read(output(store, "select", "selection.parquet", tmp_path))
    selected = rows["selected"]
    assert 0 < selected.sum() <= 8
    assert (rows["picked"] >= selected).all()
    assert rows["weight"][selected].mean() == pytest.approx(1.0, abs=1e-5)
    assert (rows["weight"][~selected] == 0).all()
    for prompt in np.unique(rows["prompt_id"][selected]):
        mine = rows["prompt_id"] == prompt
        assert rows["score"][mine & selected] == rows["score"][mine].max()
    part = made(store, "select").output("dataset/part-00000.parquet")
    (tmp_path / "part").write_bytes(store.get(part.key))
    images = dataset.read(tmp_path / "part", ["image", "seed"])
    assert dataset.pixels(images["image"][0]).shape == (32, 32, 3)
    assert len(set(images["seed"])) == len(images["seed"])


def test_evaluation_noise_is_the_same_in_every_run_whatever_its_seed(tmp_path: Path) -> None:
    seeds = []
    for seed in (0, 1):
        store = begin(tmp_path / str(seed), seed=seed)
        run(store, "sample", phase="eval")
        path = tmp_path / f"{seed}.parquet"
        store.download(made(store, "sample", "eval").output("candidates.parquet").key, path)
        seeds.append(dataset.read(path)["seed"])
    assert np.array_equal(*seeds)


def test_training_noise_differs_between_runs_and_candidates(tmp_path: Path) -> None:
    seeds = []
    for seed in (0, 1):
        store = begin(tmp_path / str(seed), seed=seed)
        run(store, "prompts", "sample")
        seeds.append(dataset.read(output(store, "sample", "candidates.parquet", tmp_path))["seed"])
    assert len(set(seeds[0]) | set(seeds[1])) == len(seeds[0]) + len(seeds[1])


def test_what_the_judge_says_never_reaches_selection_or_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(folder: Path) -> dict[str, np.ndarray]:
        store = begin(folder)
        run(store, "prompts", "sample", "score", "select")
        return dataset.read(output(store, "select", "selection.parquet", folder))

    honest = choose(tmp_path / "a")
    real = score.judge_columns

    def liar(images: list[np.ndarray], texts: list[str]) -> dict[str, np.ndarray]:
        columns = real(images, texts)
        return columns | {"judge.right": ~columns["judge.right"], "judge.extra": columns["judge.extra"] + 7}

    monkeypatch.setattr(score, "judge_columns", liar)
    lied_to = choose(tmp_path / "b")
    assert not np.array_equal(honest["judge.right"], lied_to["judge.right"])
    for name in ("selected", "weight", "score", "distance"):
        assert np.array_equal(honest[name], lied_to[name]), name


def test_an_attempt_reads_only_through_markers(tmp_path: Path) -> None:
    """A stray file beside the winning attempt's is never seen."""
    store = begin(tmp_path / "s")
    run(store, "prompts")
    ref = StageRef(1, "train", 0, "prompts")
    store.put(layout.attempt_key("r", ref, 0, "stray", "prompts.parquet"), b"garbage")
    run(store, "sample")
    assert made(store, "sample").metrics["images"] == 24
