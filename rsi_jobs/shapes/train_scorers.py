"""Train the three learned scorers on renders and on what the decoder makes of drawn latents."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import CLIPTokenizer

from rsi_jobs.shapes.models import load_tokenizer, write_tokenizer
from rsi_jobs.shapes.render import FAULTS, Image, render_batch
from rsi_jobs.shapes.scene import (
    FACTS,
    Scene,
    change_one,
    facts,
    random_caption,
    random_scene,
    random_scenes,
)
from rsi_jobs.shapes.scorers import (
    DualTower,
    FusedRegressor,
    build_scorer,
    mean_state,
    text_ids,
)
from rsi_jobs.shapes.training import Place, cosine, note, set_rate, to_images, to_signal

BATCH = 96
NEGATIVES = {"dual": 3, "fused": 2, "heldout": 2}
FAULT_SHARE = 0.25  # of the pool; only the held-out scorer learns from these
DRAWN_NOISE = 0.3  # on latents, in their spreads: what a decoder still rounds off
SPOILT_NOISE = (0.6, 1.0)  # and what it does not
SEEDS = {"dual": 11, "fused": 12, "heldout": 13}


@dataclass
class Pool:
    """Images (n, 32, 32, 3) uint8, what they show, and whether they have a fault."""

    images: Image
    scenes: list[Scene]
    faulty: npt.NDArray[np.bool_]


def build_pool(vae: AutoencoderKL, n: int, seed: int) -> Pool:
    """`n` images, a quarter of them with a fault; half are renders, half came out of the decoder.

    A faulty image has an object too many or a malformed one, or its latents were so noisy that the
    decoder spoilt it, as it spoils a badly drawn one.
    """
    rng = np.random.default_rng((10, seed))
    scenes = [random_scene(rng) for _ in range(n)]
    faulty = rng.random(n) < FAULT_SHARE
    faults = [FAULTS[rng.integers(2)] if bad and rng.random() < 0.7 else None for bad in faulty]
    images = render_batch(scenes, rng, faults)
    spoilt = np.array([bad and fault is None for bad, fault in zip(faulty, faults, strict=True)])
    level = np.where(spoilt, rng.uniform(*SPOILT_NOISE, n), rng.uniform(0, DRAWN_NOISE, n))
    rows = np.flatnonzero(spoilt | (rng.random(n) < 0.5))
    for part in np.array_split(rows, max(1, rows.size // 500)):
        images[part] = _redrawn(vae, images[part], level[part].astype(np.float32), rng)
    return Pool(images, scenes, faulty)


@torch.inference_mode()
def _redrawn(
    vae: AutoencoderKL, images: Image, level: npt.NDArray[np.float32], rng: np.random.Generator
) -> Image:
    """Images (n, 32, 32, 3) through the autoencoder, with noise of `level` spreads on the latents."""
    latents = vae.encode(to_signal(images).to(vae.device)).latent_dist.mean
    noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32)).to(latents)
    scale = torch.from_numpy(level).to(latents)[:, None, None, None] * latents.std()
    return to_images(vae.decode(latents + scale * noise).sample)


def roughen(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Slight blur and noise on images (n, 3, 32, 32): generated ones are not clean."""
    n = len(x)
    soft = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blur = torch.from_numpy(rng.random((n, 1, 1, 1), np.float32) ** 2 * 0.9).to(x.device)
    level = torch.from_numpy(rng.random((n, 1, 1, 1), np.float32) ** 2 * 0.15).to(x.device)
    noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(x.device)
    return (x + blur * (soft - x) + level * noise).clamp(-1, 1)


def _read_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    parts = [functional.cross_entropy(a, wanted[:, i]) for i, a in enumerate(logits.split(FACTS, 1))]
    return torch.stack(parts).mean()


def dual_loss(model: DualTower, x: torch.Tensor, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Contrastive over the batch's captions and every hard negative; ids (k, n, 24)."""
    raw_image, raw_text = model.embed_raw(x), model.read_raw(ids.flatten(0, 1))
    scale = model.log_scale.exp().clamp(max=50)
    logits = scale * functional.normalize(raw_image) @ functional.normalize(raw_text).T
    target = torch.arange(len(x), device=x.device)
    loss = functional.cross_entropy(logits, target)
    loss = loss + functional.cross_entropy(logits[:, : len(x)].T, target)
    loss = loss + _read_loss(model.facts(raw_image), wanted)
    return loss + _read_loss(model.text_facts(raw_text[: len(x)]), wanted)


def fused_loss(
    model: FusedRegressor,
    x: torch.Tensor,
    ids: torch.Tensor,
    wanted: torch.Tensor,
    good: torch.Tensor,
) -> torch.Tensor:
    """Match against no match; ids (k, n, 24), the first of the k is the image's caption."""
    k, n = ids.shape[:2]
    patches = model.patches(x)
    states, mask = model.text(ids.flatten(0, 1))
    logits = model.fuse_read(patches.repeat(k, 1, 1), states, mask).view(k, n)
    target = torch.zeros_like(logits)
    target[0] = good
    loss = functional.binary_cross_entropy_with_logits(
        logits, target, pos_weight=torch.tensor(float(k - 1), device=x.device)
    )
    # Which of the captions is this image's: a faulty image has none.
    chosen = functional.cross_entropy(logits.T, torch.zeros_like(good).long(), reduction="none")
    loss = loss + (chosen * good).mean()
    read = _read_loss(model.text_facts(mean_state(states[:n], mask[:n])), wanted)
    return loss + read + _read_loss(model.facts(patches.flatten(1)), wanted)


def train_one(
    name: str, pool: Pool, tokenizer: CLIPTokenizer, place: Place, *, steps: int, rate: float = 1.5e-3
) -> nn.Module:
    """Train one scorer and write `<out>/scorer_<name>.safetensors`."""
    torch.manual_seed(SEEDS[name])
    rng, begun = np.random.default_rng(SEEDS[name]), time.time()
    model = build_scorer(name, tokenizer).to(place.device)
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.98), weight_decay=0.01)
    usable = np.arange(len(pool.images))
    if name != "heldout":
        usable = usable[~pool.faulty]
    for step in range(steps):
        pick = rng.choice(usable, BATCH)
        scenes = [pool.scenes[i] for i in pick]
        rows = [[random_caption(s, rng) for s in scenes]]
        for _ in range(NEGATIVES[name]):
            rows.append([random_caption(change_one(s, rng), rng) for s in scenes])
        ids = torch.stack([text_ids(row, tokenizer) for row in rows]).to(place.device)
        x = roughen(to_signal(pool.images[pick]).to(place.device), rng)
        wanted = torch.tensor([facts(s) for s in scenes], device=place.device)
        if isinstance(model, DualTower):
            loss = dual_loss(model, x, ids, wanted)
        else:
            good = torch.from_numpy(~pool.faulty[pick]).float().to(place.device)
            loss = fused_loss(model, x, ids, wanted, good)
        set_rate(optimizer, cosine(step, steps, rate, 50))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            spent = time.time() - begun
            print(f"{name} {step} loss {loss.detach():.3f} {spent:.0f} s", flush=True)
    model.eval()
    save_file(model.state_dict(), place.out / f"scorer_{name}.safetensors")
    note(place, "scorers", **{name: {**measure(model), "seconds": round(time.time() - begun)}})
    return model


def auc(positive: npt.NDArray[np.float32], negative: npt.NDArray[np.float32]) -> float:
    """The share of (positive, negative) pairs in the right order; ties count half."""
    both = np.sort(negative)
    below = np.searchsorted(both, positive, "left") + np.searchsorted(both, positive, "right")
    return round(float(below.mean() / 2 / len(negative)), 4)


def measure(model: DualTower | FusedRegressor, n: int = 1000) -> dict[str, float]:
    """AUC of right renders against one change in the caption, and against faulty images."""
    rng = np.random.default_rng(99)
    scenes = random_scenes(rng, n)
    images = render_batch(scenes, rng)
    captions = [random_caption(s, rng) for s in scenes]
    right = model.score(images, captions)
    out: dict[str, float] = {}
    changed = model.score(images, [random_caption(change_one(s, rng), rng) for s in scenes])
    out["auc_changed"] = auc(right, changed)
    out["pairs_changed"] = round(float((right > changed).mean()), 4)
    for fault in FAULTS:
        bad = render_batch(scenes, rng, [fault] * n)
        out[f"auc_{fault}"] = auc(right, model.score(bad, captions))
    out["parameters"] = sum(p.numel() for p in model.parameters())
    return out


def train(place: Place, steps: int, names: tuple[str, ...] = tuple(SEEDS)) -> None:
    """Train the scorers named."""
    write_tokenizer(place.out / "tokenizer")
    tokenizer = load_tokenizer(place.out / "tokenizer")
    vae = AutoencoderKL.from_pretrained(place.work / "vae").to(place.device).eval()
    pool = build_pool(vae, 24_000, 0)
    for name in names:
        train_one(name, pool, tokenizer, place, steps=steps)
