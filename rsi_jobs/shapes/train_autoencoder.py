"""Train the autoencoder: renders to 8 x 8 x 12 latents and back."""

from __future__ import annotations

import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from rsi_jobs.shapes.models import LATENT_CHANNELS, build_autoencoder
from rsi_jobs.shapes.render import FAULTS, PALETTE, SIDE, WIDTHS, Image, render_batch, shape_mask
from rsi_jobs.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, random_scene
from rsi_jobs.shapes.training import (
    Place,
    cosine,
    load_state,
    note,
    save_state,
    set_rate,
    to_images,
    to_signal,
)

BATCH = 48
KL_WEIGHT = 1e-5  # per latent element: keeps latents near unit scale, costs no detail
FAULT_SHARE = 0.2  # extra and malformed objects are reconstructed faithfully too


def _images(rng: np.random.Generator, n: int) -> Image:
    faults = [FAULTS[rng.integers(len(FAULTS))] if rng.random() < FAULT_SHARE else None for _ in range(n)]
    return render_batch([random_scene(rng) for _ in range(n)], rng, faults)


def _busy(rng: np.random.Generator, n: int) -> Image:
    """Images full of shapes anywhere: most of a real scene is plain and teaches nothing."""
    images = np.empty((n, SIDE, SIDE, 3), np.uint8)
    for image in images:
        image[:] = PALETTE[BACKGROUNDS[rng.integers(len(BACKGROUNDS))]]
        for _ in range(rng.integers(4, 9)):
            width = WIDTHS[SIZES[int(rng.integers(3) == 0)]]
            y, x = rng.integers(0, SIDE - width + 1, 2)
            mask = shape_mask(SHAPES[rng.integers(len(SHAPES))], width, width)
            image[y : y + width, x : x + width][mask] = PALETTE[COLOURS[rng.integers(len(COLOURS))]]
    return images


def train(place: Place, steps: int, rate: float = 2e-3) -> AutoencoderKL:
    """Train (or go on training) and write `<work>/vae`."""
    torch.manual_seed(0)
    # Channels last is a third faster on two CPU cores.
    model = build_autoencoder().to(place.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.98), weight_decay=1e-3)
    path = place.checkpoint("autoencoder")
    state = load_state(path) or {"step": 0}
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    start, seconds = int(state["step"]), time.time()
    for step in range(start, steps):
        rng = np.random.default_rng((1, step))
        images = np.concatenate([_images(rng, BATCH // 2), _busy(rng, BATCH // 2)])
        x = to_signal(images).to(place.device)  # a view: channels are last
        posterior = model.encode(x).latent_dist
        y = model.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / (LATENT_CHANNELS * 64)
        # L1 keeps the edges sharp, the square pulls in the last gross errors.
        error = functional.l1_loss(y, x) + functional.mse_loss(y, x)
        loss = error + KL_WEIGHT * kl
        set_rate(optimizer, cosine(step, steps, rate, 50))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            spent = time.time() - seconds
            print(f"{step} error {error:.4f} kl {kl:.2f} {spent:.0f} s", flush=True)
        if step % 250 == 249 or step == steps - 1:
            save_state(
                path,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )
    finish(place, model)
    note(place, "autoencoder", steps=steps, seconds=round(time.time() - seconds))
    return model


def _edges(x: torch.Tensor) -> torch.Tensor:
    """Weights (n, 1, 32, 32), mean about 2: four times as much at an edge, where errors live."""
    around = functional.pad(x, (1, 1, 1, 1), mode="replicate")
    spread = functional.max_pool2d(around, 3, 1) + functional.max_pool2d(-around, 3, 1)
    return 1 + 4 * (spread.amax(1, keepdim=True) > 0.1).float()


def sharpen(place: Place, steps: int, rate: float = 2e-3) -> None:
    """Train the decoder on alone: the latents, and so any base trained on them, stay valid."""
    model = AutoencoderKL.from_pretrained(place.work / "vae").to(place.device)
    model = model.to(memory_format=torch.channels_last).requires_grad_(False)
    live = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    for parameter in live:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(live, rate, (0.9, 0.98), weight_decay=1e-3, fused=True)
    path = place.checkpoint("decoder")
    state = load_state(path) or {"step": 0}
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(int(state["step"]), steps):
        x = to_signal(_images(np.random.default_rng((3, step)), BATCH)).to(place.device)
        with torch.no_grad():
            z = model.encode(x).latent_dist.mean
            # A drawn latent is never exact: the decoder learns to round it off to clean shapes.
            level = 0.25 * torch.rand(len(z), 1, 1, 1, device=z.device) * z.std()
            z = z + level * torch.randn_like(z)
        error = (model.decode(z).sample - x).abs()
        loss = (_edges(x) * (error + error**2)).mean()
        set_rate(optimizer, cosine(step, steps, rate, 50))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(live, 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"decoder {step} error {loss.detach():.4f}", time.strftime("%H:%M:%S"), flush=True)
        if step % 200 == 199 or step == steps - 1:
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_state(path, kept)
    note(place, "autoencoder", decoder_steps=steps)
    model.eval().save_pretrained(place.work / "vae")


@torch.inference_mode()
def finish(place: Place, model: AutoencoderKL) -> None:
    """Measure the latents' scale, write the folder, note the figures."""
    model.eval()
    rng = np.random.default_rng(2)
    images = _images(rng, 2000)
    x = to_signal(images).to(place.device)
    latents = torch.cat([model.encode(b).latent_dist.mean for b in x.split(250)])
    model.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    back = torch.cat([model.decode(b).sample for b in latents.split(250)])
    wrong = np.abs(to_images(back).astype(int) - images).max(-1) > 64
    with FlopCounterMode(display=False) as decode:
        model.decode(latents[:1])
    with FlopCounterMode(display=False) as encode:
        model.encode(x[:1])
    model.save_pretrained(place.work / "vae")
    note(
        place,
        "autoencoder",
        scaling_factor=model.config.scaling_factor,
        channel_std=[round(float(s), 3) for s in latents.std((0, 2, 3))],
        pixels_off_by_64=round(float(wrong.mean()), 5),
        decode_mflop=round(decode.get_total_flops() / 1e6, 1),
        encode_mflop=round(encode.get_total_flops() / 1e6, 1),
        parameters=sum(p.numel() for p in model.parameters()),
    )
