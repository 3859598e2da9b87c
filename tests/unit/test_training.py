"""The training loop: its loss written out again, resuming to the last bit, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from rsi_jobs.diffusion import adapters, checkpoints, noise, training, unet
from rsi_jobs.diffusion.batches import ANCHOR, REPLAY, ROUND, Batch, Composer, TrainingData
from rsi_jobs.diffusion.training import TrainSettings, train
from rsi_jobs.errors import ConfigError, DataError
from tests import tiny

LORA = TrainSettings(
    seed=3,
    round=2,
    steps=6,
    batch_size=4,
    rank=2,
    alpha=5,
    learning_rate=1e-3,
    warmup=2,
    schedule="cosine",
    replay_share=0.25,
    beta=0.1,
    ema=0.9,
    prompt_dropout=0.3,
)
FULL = dataclasses.replace(LORA, mode="full")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def v_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("tiny-v"), prediction_type="v_prediction")


def opened(base: Path, checkpoint: Path | None = None) -> unet.Model:
    kw = {"device": "cpu", "dtype": torch.float32, "text": False, "vae": False}
    return unet.load(base, checkpoint=checkpoint, **kw)


@pytest.fixture(scope="module")
def data() -> TrainingData:
    """12 picks, 5 replayed, 5 anchors; three prompts; weights far from 1."""
    g = torch.Generator().manual_seed(0)
    group = torch.tensor([ROUND] * 12 + [REPLAY] * 5 + [ANCHOR] * 5)
    weights = torch.rand(22, generator=g) + 0.1
    weights[:12] /= weights[:12].mean()
    return TrainingData(
        latents=torch.randn(22, 4, 8, 8, generator=g),
        embeddings=torch.randn(3, tiny.WINDOW, 16, generator=g),
        prompt=torch.arange(22) % 3,
        uncond=torch.randn(1, tiny.WINDOW, 16, generator=g),
        weights=weights,
        ids=torch.arange(22) * 7 + 100,
        group=group,
    )


def trained(model: unet.Model) -> dict[str, torch.Tensor]:
    """A copy of what training changes."""
    return {k: w.detach().clone() for k, w in model.network.named_parameters()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_is_the_formula(
    base: Path, v_base: Path, data: TrainingData, prediction: str, beta: float
) -> None:
    """A sample at a time, with diffusers' own forward process."""
    model = opened(base if prediction == "epsilon" else v_base)
    other = opened(v_base).network
    times = torch.tensor([0.0015, 0.3, 0.55, 0.9995], dtype=torch.float64)
    drawn = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = Batch(data.latents[:4], data.embeddings[[0, 1, 2, 0]], drawn, times, data.weights[:4])
    with torch.no_grad():
        got, raw = unet.loss(model, batch, snr_gamma=5.0, beta=beta, base=lambda x, t, c: other(x, t, c)[0])
    ddpm = DDPMScheduler.from_pretrained(base / "scheduler")
    for i, t in enumerate([1, 300, 550, 999]):
        x0, eps = batch.latents[i : i + 1], drawn[i : i + 1]
        step = torch.tensor([t])
        noisy = ddpm.add_noise(x0, eps, step)
        snr = float(ddpm.alphas_cumprod[t] / (1 - ddpm.alphas_cumprod[t]))
        if prediction == "epsilon":
            target, m = eps, min(snr, 5) / snr
        else:
            target, m = ddpm.get_velocity(x0, eps, step), min(snr, 5) / (snr + 1)
        with torch.no_grad():
            output = model.network(noisy, step, batch.embeddings[i : i + 1])[0]
            anchor = other(noisy, step, batch.embeddings[i : i + 1])[0]
        mse = torch.nn.functional.mse_loss(output, target)
        away = torch.nn.functional.mse_loss(output, anchor)
        torch.testing.assert_close(raw[i], mse, rtol=1e-4, atol=1e-6)
        wanted = data.weights[i] * m * mse + beta * away
        torch.testing.assert_close(got[i], wanted, rtol=1e-4, atol=1e-6)


def test_a_step_is_adamw_on_the_global_mean(base: Path, data: TrainingData) -> None:
    """One step from the base, written out: batch, draws, dropout, mean, clipping, AdamW."""
    settings = dataclasses.replace(FULL, steps=1, beta=0, ema=0.0, snr_gamma=0, clip=0.01)
    model = opened(base)
    result = train(model, data, settings)
    reference = opened(base).network.requires_grad_(True)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3 / 2, weight_decay=1e-2)
    ddpm = DDPMScheduler.from_pretrained(base / "scheduler")
    shares = {"replay_share": 0.25, "anchor_share": 0.0}
    rows = Composer(data, seed=3, round=2, size=4, **shares).rows_of(0)
    total = torch.zeros(())
    for row in rows.tolist():
        key = (3, 2, 0, [int(data.ids[row])])
        eps = noise.keyed_noise(*key, (4, 8, 8))
        t = (noise.keyed_times(*key) * 1000).long()
        text = data.embeddings[data.prompt[row]][None]
        text = data.uncond if noise.keyed_dropout(*key, 0.3)[0] else text
        output = reference(ddpm.add_noise(data.latents[row][None], eps, t), t, text)[0]
        total = total + data.weights[row] * (output - eps).square().mean() / 4
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    optimizer.step()
    torch.testing.assert_close(result.records[0].loss, float(total), rtol=1e-4, atol=0)
    torch.testing.assert_close(result.records[0].grad_norm, float(norm), rtol=1e-3, atol=0)
    wanted = dict(reference.named_parameters())
    moved = [(w - wanted[k]).abs().max() for k, w in model.network.named_parameters()]
    assert max(moved) < 2e-5  # AdamW's first step is +-5e-4 wherever a gradient is clear
    assert any(noise.keyed_dropout(3, 2, 0, data.ids[rows].tolist(), 0.3))


@pytest.mark.parametrize("settings", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("stop", [1, 4])
def test_resuming_is_bit_identical(
    base: Path, data: TrainingData, tmp_path: Path, settings: TrainSettings, stop: int
) -> None:
    settings = dataclasses.replace(settings, checkpoint_every=1)
    whole = opened(base)

    def keep(step: int, files: dict[str, Path]) -> None:
        assert sorted(files) == sorted(training.STATE_FILES)
        for name, path in files.items():
            (tmp_path / str(step)).mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / str(step) / name)

    full_run = train(whole, data, settings, state_dir=tmp_path / "state", save_state=keep)
    assert full_run.rejected is None
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "state") == list("123456")
    resumed = opened(base)
    seen: list[int] = []
    again = train(
        resumed,
        data,
        settings,
        resume_from=tmp_path / str(stop),
        on_step=lambda record: seen.append(record.step),
    )
    assert seen == list(range(stop, 6))
    assert again.records == full_run.records
    assert same(trained(resumed), trained(whole))
    assert not same(trained(whole), trained(opened(base)))
    changed = dataclasses.replace(settings, learning_rate=5e-4)
    with pytest.raises(DataError, match="another run: learning_rate differs"):
        train(opened(base), data, changed, resume_from=tmp_path / "1")


@pytest.mark.parametrize("settings", [LORA, FULL], ids=["lora", "full"])
def test_micro_batches_and_row_order_change_nothing_but_rounding(
    base: Path, data: TrainingData, settings: TrainSettings
) -> None:
    settings = dataclasses.replace(settings, steps=2, stratified=True)
    one, two = opened(base), opened(base)
    whole = train(one, data, settings)
    order = torch.randperm(22, generator=torch.Generator().manual_seed(5))
    rows = ("latents", "prompt", "weights", "ids", "group")
    shuffled = dataclasses.replace(data, **{f: getattr(data, f)[order] for f in rows})
    split = train(two, shuffled, dataclasses.replace(settings, micro_batch=3))
    for a, b in zip(whole.records, split.records, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert a.quartiles == pytest.approx(b.quartiles, rel=1e-5)
        assert None not in a.quartiles  # stratified: a sample in each quarter


def test_processes_add_up_to_the_whole_batch(
    base: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of two processes, 4 samples of 7 and 3, sum to the gradient of one process."""
    settings = dataclasses.replace(FULL, batch_size=7, steps=1, clip=1e9)

    def gradients() -> dict[str, torch.Tensor]:
        model = opened(base)
        state = training._start(model, settings)
        composer = training._composer(data, settings)
        copy = unet.base_predictor(model, copy=True)
        training._step(training._Run(model, data, settings, composer, copy, 1), state)
        return {k: w.grad.clone() for k, w in state.weights.items() if w.grad is not None}

    whole = gradients()
    assert whole
    monkeypatch.setattr(training, "_reduce", lambda *_: None)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(training, "_rank_and_world", lambda rank=rank: (rank, 2))
        parts.append(gradients())
    for name, gradient in whole.items():
        total = parts[0][name] + parts[1][name]
        torch.testing.assert_close(total, gradient, rtol=1e-3, atol=1e-6)


def test_adapter_is_continued_from_the_saved_average(base: Path, data: TrainingData, tmp_path: Path) -> None:
    first = opened(base)
    result = train(first, data, LORA)
    checkpoints.save_checkpoint(first.network, tmp_path / "r1")
    assert result.passes == pytest.approx(6 * 3 / 12)
    second = opened(base, tmp_path / "r1")
    assert same(trained(second), trained(first))
    before = adapters.parameters(opened(base, tmp_path / "r1").network)
    train(second, data, dataclasses.replace(LORA, round=3))
    after = adapters.parameters(second.network)
    assert after.keys() == before.keys()
    assert any(not torch.equal(before[k], w) for k, w in after.items())
    # Only the adapter moved, and it still sits on the untouched base.
    plain = trained(opened(base))
    for name, weight in second.network.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(weight, plain[name.replace(".base_layer", "")])
    with pytest.raises(ConfigError, match="adapter to continue"):
        train(second, data, dataclasses.replace(LORA, rank=3))
    with pytest.raises(ConfigError, match="carries an adapter"):
        train(second, data, FULL)


@pytest.mark.parametrize("settings", [LORA, FULL], ids=["lora", "full"])
def test_beta_measures_from_the_round_zero_base(
    base: Path, data: TrainingData, tmp_path: Path, settings: TrainSettings
) -> None:
    """A second round's first loss holds the distance to the base, not to the round's start."""
    first = opened(base)
    train(first, data, dataclasses.replace(settings, learning_rate=1e-2, beta=0, ema=0.0))
    checkpoints.save_checkpoint(first.network, tmp_path / "r1")

    def first_loss(checkpoint: Path | None, beta: float) -> float:
        short = dataclasses.replace(settings, steps=1, beta=beta)
        return train(opened(base, checkpoint), data, short).records[0].loss

    assert first_loss(None, 10.0) == pytest.approx(first_loss(None, 0.0), rel=1e-5)
    assert first_loss(tmp_path / "r1", 10.0) > first_loss(tmp_path / "r1", 0.0) * 1.01


def test_ema_is_the_result(base: Path, data: TrainingData) -> None:
    """By hand from the weights after every step (ema 0 ends with the last of them)."""
    plain = dataclasses.replace(FULL, beta=0, schedule="constant", ema=0.0)
    average = trained(opened(base))
    for steps in range(1, 4):
        model = opened(base)
        train(model, data, dataclasses.replace(plain, steps=steps))
        decay = min(0.3, steps / (9 + steps))
        for name, weight in trained(model).items():
            average[name] = decay * average[name] + (1 - decay) * weight
    model = opened(base)
    result = train(model, data, dataclasses.replace(plain, steps=3, ema=0.3))
    assert result.ema_decay == 0.3
    for name, weight in model.network.named_parameters():
        torch.testing.assert_close(weight.detach(), average[name], rtol=1e-5, atol=1e-7)


def test_explosion_is_rejected_and_never_saved(base: Path, data: TrainingData, tmp_path: Path) -> None:
    wild = dataclasses.replace(
        FULL, steps=30, max_passes=99, learning_rate=3.0, warmup=10, beta=0, checkpoint_every=1
    )
    saved: list[int] = []
    result = train(opened(base), data, wild, state_dir=tmp_path, save_state=lambda s, _: saved.append(s))
    assert result.rejected is not None
    assert f"step {result.steps}: loss" in result.rejected
    assert saved == list(range(1, result.steps + 1))
    assert result.steps < 30


def test_a_loss_that_is_not_finite_is_rejected_at_its_step(
    base: Path, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    original = unet.loss

    def third_is_nan(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        each, mse = original(*args, **kwargs)  # type: ignore[arg-type]
        return (each * float("nan"), mse) if next(calls) == 2 else (each, mse)

    monkeypatch.setattr(unet, "loss", third_is_nan)
    model = opened(base)
    result = train(model, data, LORA)
    assert result.rejected is not None
    assert result.rejected.startswith("step 2: loss nan")
    assert result.steps == 2
    assert all(torch.isfinite(w).all() for w in model.network.parameters())


def test_batches_hold_fixed_shares_and_whole_passes(data: TrainingData) -> None:
    composer = Composer(data, seed=0, round=1, size=8, replay_share=0.25, anchor_share=0.125)
    groups = [data.group[composer.rows_of(step)].tolist() for step in range(20)]
    assert all((g.count(REPLAY), g.count(ANCHOR), g.count(ROUND)) == (2, 1, 5) for g in groups)
    picks = torch.cat([composer.rows_of(step) for step in range(12)])
    assert picks[data.group[picks] == ROUND].bincount(minlength=12)[:12].tolist() == [5] * 12
    # A share too small for one batch is kept over many; that of an empty group goes to the round.
    small = Composer(data, seed=0, round=1, size=4, replay_share=0.1, anchor_share=0.0)
    assert small.taken(100) == [360, 40, 0]
    group, weights = torch.full((22,), ROUND), torch.ones(22)
    only = dataclasses.replace(data, group=group, weights=weights)
    alone = Composer(only, seed=0, round=1, size=4, replay_share=0.5, anchor_share=0.25)
    assert alone.taken(10) == [40, 0, 0]
    other = Composer(data, seed=0, round=2, size=8, replay_share=0.25, anchor_share=0.125)
    assert composer.rows_of(0).tolist() != other.rows_of(0).tolist()


def test_passes_over_the_rounds_picks_are_capped(data: TrainingData) -> None:
    many = dataclasses.replace(LORA, steps=1000, batch_size=8)
    steps = training.planned_steps(data, many)
    assert steps * 6 <= 4 * 12 < (steps + 1) * 6
    assert training.planned_steps(data, dataclasses.replace(many, steps=3)) == 3


def test_learning_rate_and_default_average() -> None:
    cosine = dataclasses.replace(LORA, learning_rate=1.0, warmup=4)
    rates = [training.learning_rate(cosine, step, 14) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    constant = dataclasses.replace(cosine, schedule="constant")
    assert training.learning_rate(constant, 13, 14) == 1.0
    auto = dataclasses.replace(LORA, ema=None)
    assert [training.ema_decay(auto, n) for n in (40, 1000, 9000)] == [0.95, 0.995, 0.999]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "both"),
        ("schedule", "step"),
        ("steps", 0),
        ("ema", 1.0),
        ("learning_rate", 0.0),
        ("prompt_dropout", 1.5),
        ("replay_share", 1.0),
    ],
)
def test_settings_that_cannot_be_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{field} is {value!r}"):
        dataclasses.replace(LORA, **{field: value})


def test_data_that_cannot_be_trained_on_is_named(data: TrainingData) -> None:
    for change, message in (
        ({"ids": torch.zeros(22, dtype=torch.long)}, "not unique"),
        ({"weights": data.weights * 2}, "have mean 2"),
        ({"group": torch.full((22,), REPLAY)}, "no training sample is of this round"),
        ({"latents": data.latents[:5]}, "latents has 5 rows"),
        ({"latents": data.latents * float("inf")}, "latents has values that are not finite"),
    ):
        with pytest.raises(DataError, match=message):
            dataclasses.replace(data, **change)


def test_state_of_a_newer_format_is_refused(base: Path, data: TrainingData, tmp_path: Path) -> None:
    short = dataclasses.replace(LORA, steps=1, checkpoint_every=1)
    train(opened(base), data, short, state_dir=tmp_path, save_state=lambda *_: None)
    path = tmp_path / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(DataError, match="has format 2: this reads 1"):
        train(opened(base), data, short, resume_from=tmp_path)
