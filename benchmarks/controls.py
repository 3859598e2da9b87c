"""The two controls that come before any claim of self-improvement.

    python benchmarks/controls.py --seeds 3 --prompts 1000

One round on unpicked images of its own must leave the model where it was (training itself does no harm);
one round on 300 clean renders must help a lot (the model can learn what selection would offer it).
Settings are the default recipe's, without weights, replay or gate.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
import torch

from rsi_jobs import recipes
from rsi_jobs.diffusion import base_folder, unet
from rsi_jobs.diffusion.batches import ROUND, TrainingData
from rsi_jobs.diffusion.noise import candidate_noise, candidate_seed
from rsi_jobs.diffusion.training import TrainSettings, train
from rsi_jobs.evaluation import bootstrap_mean, paired_difference
from rsi_jobs.prompts import evalsets
from rsi_jobs.shapes import judge, render, scene

SAMPLES = 300
IDENTITY = recipes.recipe("shapes")


def draw(
    model: Any, prompts: list[str], seeds: list[int], guidance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (n, C, H, W) and text embeddings (n, tokens, d)."""
    uncond = unet.encode(model, [""])
    texts, latents = unet.encode(model, prompts), []
    for start in range(0, len(prompts), IDENTITY.sampling.batch):
        here = slice(start, start + IDENTITY.sampling.batch)
        noise = candidate_noise(seeds[here], model.latent_shape)
        latents.append(
            unet.sample(
                model, texts[here], uncond, noise, steps=IDENTITY.sampling.steps, guidance=guidance,
                scheduler=IDENTITY.sampling.scheduler,
            ).latents
        )  # fmt: skip
    return torch.cat(latents), texts


def right(model: Any, prompts: list[str]) -> np.ndarray:
    """Whether each image (n,) is right, at fixed noise."""
    seeds = [candidate_seed(0, 0, prompt, 0) for prompt in prompts]
    latents, _ = draw(model, prompts, seeds, IDENTITY.evaluation.guidance)
    verdicts = judge.judge_batch(unet.decode(model, latents, batch=64).numpy(), prompts)
    return np.array([verdict.right for verdict in verdicts], dtype=float)


def data(model: Any, latents: torch.Tensor, texts: torch.Tensor) -> TrainingData:
    n = len(latents)
    return TrainingData(
        latents=latents, embeddings=texts, prompt=torch.arange(n), uncond=unet.encode(model, [""]),
        weights=torch.ones(n), ids=torch.arange(n), group=torch.full((n,), ROUND),
    )  # fmt: skip


def settings(seed: int) -> TrainSettings:
    t = IDENTITY.training
    return TrainSettings(
        seed=seed, round=1, steps=t.steps, batch_size=t.batch, mode=t.mode, rank=t.rank, alpha=t.alpha,
        learning_rate=t.lr, warmup=int(np.ceil(t.warmup * t.steps)), clip=t.clip, ema=t.ema,
        max_passes=t.max_passes, snr_gamma=t.snr_gamma, prompt_dropout=t.dropout, stratified=True,
    )  # fmt: skip


def scenes(seed: int) -> list[scene.Scene]:
    """Scenes of no evaluation set."""
    taken = {s.key() for rows in evalsets._shapes().values() for r in rows if (s := scene.parse(r.prompt))}
    return scene.random_scenes(np.random.default_rng(seed), SAMPLES, exclude=taken)


@torch.inference_mode()
def own(model: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = [s.caption() for s in scenes(seed)]
    return draw(model, prompts, [candidate_seed(seed, 1, p, 0) for p in prompts], IDENTITY.sampling.guidance)


@torch.inference_mode()
def renders(model: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = scenes(seed)
    pixels = render.render_batch(chosen, np.random.default_rng(seed))
    signal = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = model.vae.encode(signal).latent_dist.mode() * model.vae_scale
    return latents, unet.encode(model, [s.caption() for s in chosen])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--set", action="append", default=[], help="a field of TrainSettings, e.g. learning_rate=5e-5"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    changes = {k: type(getattr(settings(0), k))(v) for k, v in (item.split("=") for item in given.set)}
    prompts = [row.prompt for row in evalsets.load("shapes:test", given.prompts)]
    folder = base_folder(IDENTITY.model.path)
    began = time.monotonic()
    untouched = unet.load(folder, device="cpu", dtype=torch.float32, checkpoint=None)
    base = right(untouched, prompts)
    print(f"base: {bootstrap_mean(base).mean:6.1%} right on {len(prompts)} test prompts at guidance "
          f"{IDENTITY.evaluation.guidance}, its own best", flush=True)  # fmt: skip
    for name, make in (("own unpicked images", own), ("clean renders", renders)):
        gains = []
        for seed in range(given.seeds):
            model = unet.load(folder, device="cpu", dtype=torch.float32, checkpoint=None)
            latents, texts = make(model, seed)
            chosen = dataclasses.replace(settings(seed), **changes)
            result = train(model, data(model, latents.clone(), texts.clone()), chosen)
            gain = paired_difference(right(model, prompts), base)
            gains.append(gain.mean)
            print(
                f"{name}, seed {seed}: {gain.mean:+6.1%} [{gain.low:+.1%}, {gain.high:+.1%}] after {result.steps} "
                f"steps, {result.passes:.1f} passes", flush=True,
            )  # fmt: skip
        print(f"{name}: {np.mean(gains):+6.1%} on average", flush=True)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
