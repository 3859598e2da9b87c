"""Stage `sample`: draw the candidates of a shard.

Outputs: candidates.parquet (a row an image, with its PNG), tensors.safetensors (`latents` (n, C, H, W) as
the sampler left them, `x0_variance` (n,)), text.safetensors (`embeddings` (p, tokens, d) of the shard's
prompts, `prompt_ids` (p,), `uncond` (1, tokens, d)).
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from safetensors.torch import save_file

from rsi_jobs import dataset
from rsi_jobs.diffusion import noise
from rsi_jobs.stages.attempt import Attempt, Outcome, main
from rsi_jobs.stages.candidates import Candidates, candidates
from rsi_jobs.stages.model import family, load_model, prepare_torch

FLAT = 2.0  # standard deviation of pixel values (0 to 255) below which an image shows nothing
MOST_FLAT = 0.5  # share of flat images at which the model, not the prompt, is broken


def guidance(attempt: Attempt) -> float:
    """Guidance scale of a phase; one's own training data may be drawn with less each round."""
    if attempt.ref.phase != "train":
        return attempt.identity.evaluation.guidance
    sampling = attempt.identity.sampling
    decay: float = sampling.guidance_decay ** (attempt.ref.round - 1)
    return 1 + (sampling.guidance - 1) * decay


def work(attempt: Attempt) -> Outcome:
    device = prepare_torch(attempt)
    rows = candidates(attempt)
    sampling = attempt.identity.sampling
    batches = rows.batches(sampling.batch, len(attempt.shards(attempt.ref)), attempt.shard)
    denoiser = family(attempt)
    with attempt.timed("load"):
        model = load_model(attempt, device, vae=True)
    mine = np.concatenate([np.arange(b.start, b.stop) for b in batches] or [np.arange(0)])
    unique = list(dict.fromkeys(rows.prompt_id[mine].tolist()))
    texts = {int(i): rows.prompt[int(np.flatnonzero(rows.prompt_id == i)[0])] for i in unique}
    with attempt.timed("compute"), torch.inference_mode():
        uncond = denoiser.encode(model, [""])
        embeddings = denoiser.encode(model, [texts[i] for i in unique]) if unique else uncond[:0]
    where = {prompt: n for n, prompt in enumerate(unique)}
    images: list[np.ndarray] = []
    latents, variances = [], []
    for batch in batches:
        index = torch.tensor([where[int(i)] for i in rows.prompt_id[batch]])
        with attempt.timed("compute"), torch.inference_mode():
            start = noise.candidate_noise(rows.seed[batch].tolist(), model.latent_shape).to(device)
            made = denoiser.sample(
                model, embeddings[index], uncond, start, steps=sampling.steps, guidance=guidance(attempt),
                scheduler=sampling.scheduler,
            )  # fmt: skip
            images.extend(denoiser.decode(model, made.latents).numpy())
        latents.append(made.latents.float().cpu())
        variances.append(made.x0_variance.float().cpu())
        attempt.progress(len(images), len(mine), "images")
    flat = np.array([image.std() < FLAT for image in images], dtype=bool)
    with attempt.timed("write"):
        _write(attempt, rows, mine, images, flat)
        save_file(
            {
                "latents": torch.cat(latents) if latents else torch.zeros(0, *model.latent_shape),
                "x0_variance": torch.cat(variances) if variances else torch.zeros(0),
            },
            attempt.write("tensors.safetensors"),
        )
        save_file(
            {
                "embeddings": embeddings.cpu().contiguous(),
                "prompt_ids": torch.tensor(unique, dtype=torch.int64),
                "uncond": uncond.cpu().contiguous(),
            },
            attempt.write("text.safetensors"),
        )
    metrics = {"images": float(len(images)), "flat": float(flat.sum()), "guidance": guidance(attempt)}
    bad = not all(torch.isfinite(x).all() for x in latents)
    if bad:
        return Outcome(metrics, "the sampler's latents are not finite", sampling.batch)
    if images and flat.mean() > MOST_FLAT:
        return Outcome(metrics, f"{flat.sum()} of {len(images)} images are black or constant", sampling.batch)
    return Outcome(metrics, micro_batch=sampling.batch)


def _write(
    attempt: Attempt, rows: Candidates, mine: np.ndarray, images: list[np.ndarray], flat: np.ndarray
) -> None:
    names = [f"{attempt.ref.round:03d}-{rows.prompt_id[i]:05d}-{rows.candidate[i]:02d}.png" for i in mine]
    dataset.write(
        attempt.write("candidates.parquet"),
        dataset.table(
            {
                "prompt_id": rows.prompt_id[mine],
                "candidate": rows.candidate[mine],
                "prompt": dataset.text(rows.prompt[i] for i in mine),
                "category": dataset.text(rows.category[i] for i in mine),
                "seed": rows.seed[mine],
                "flat": flat,
                "image": dataset.images_column(images, names),
            }
        ),
    )


if __name__ == "__main__":
    sys.exit(main("sample", work))
