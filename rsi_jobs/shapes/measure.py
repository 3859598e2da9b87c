"""Draw with a base and let the judge count: the figures beside the shipped weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTokenizer

from rsi_jobs.shapes.judge import judge_batch
from rsi_jobs.shapes.models import LATENT_CHANNELS, MAX_TOKENS, TEXT_WIDTH
from rsi_jobs.shapes.render import Image
from rsi_jobs.shapes.scene import random_caption, random_scenes
from rsi_jobs.shapes.training import to_images, to_signal

STEPS = 12


def held_out_prompts(n: int, seed: int = 77) -> list[str]:
    """Captions of `n` distinct scenes."""
    rng = np.random.default_rng(seed)
    return [random_caption(scene, rng) for scene in random_scenes(rng, n)]


def padded(tokenizer: CLIPTokenizer, prompts: list[str], device: str = "cpu") -> torch.Tensor:
    """Token ids (n, 24), as the pipeline makes them."""
    batch = tokenizer(
        prompts,
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    ids: torch.Tensor = batch.input_ids.to(device)
    return ids


@dataclass(frozen=True)
class Parts:
    """The parts of a Stable Diffusion, in evaluation mode."""

    unet: UNet2DConditionModel
    text: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler


def parts_of(pipeline: StableDiffusionPipeline) -> Parts:
    """The parts of an opened pipeline folder."""
    return Parts(pipeline.unet, pipeline.text_encoder, pipeline.vae, pipeline.tokenizer, pipeline.scheduler)


@torch.inference_mode()
def draw(parts: Parts, prompts: list[str], guidance: float, *, seed: int = 0, batch: int = 200) -> Image:
    """One image (32, 32, 3) uint8 for each prompt, with DDIM in 12 steps."""
    unet, text, vae = parts.unet, parts.text, parts.vae
    tokenizer, scheduler = parts.tokenizer, parts.scheduler
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(prompts), LATENT_CHANNELS, 8, 8), generator=generator)
    device = str(unet.device)
    nothing = text(padded(tokenizer, [""], device)).last_hidden_state
    images: list[Image] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        states = text(padded(tokenizer, part, device)).last_hidden_state
        both = torch.cat([nothing.expand_as(states), states])
        x = noise[start : start + batch].to(device)
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            if guidance == 1:
                out = unet(x, t, states).sample
            else:
                without, with_text = unet(torch.cat([x, x]), t, both).sample.chunk(2)
                out = without + guidance * (with_text - without)
            x = scheduler.step(out, int(t), x).prev_sample  # type: ignore[union-attr]
        images.append(to_images(vae.decode(x / vae.config.scaling_factor).sample))
    return np.concatenate(images)


def count(images: Image, prompts: list[str]) -> dict[str, float]:
    """Shares and means over the images, of what the judge says."""
    verdicts = judge_batch(images, prompts)

    def mean(values: list[float]) -> float:
        return round(float(np.mean(values)), 4)

    return {
        "right": mean([v.right for v in verdicts]),
        "extra": mean([v.extra for v in verdicts]),
        "missing": mean([v.missing for v in verdicts]),
        "malformed": mean([v.malformed > 0 for v in verdicts]),
        "off_palette": mean([v.off_palette > 0 for v in verdicts]),
        "clean": mean([not v.malformed and not v.off_palette for v in verdicts]),
    }


def unet_mflop(unet: UNet2DConditionModel) -> float:
    """Million floating-point operations of one forward pass of one sample."""
    device: Any = unet.device
    x = torch.zeros(1, LATENT_CHANNELS, 8, 8, device=device)
    states = torch.zeros(1, MAX_TOKENS, TEXT_WIDTH, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, torch.tensor([5], device=device), states)
    return round(counter.get_total_flops() / 1e6, 1)


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, images: Image, device: str) -> Image:
    """The images as the autoencoder gives them back."""
    parts = []
    for start in range(0, len(images), 250):
        x = to_signal(images[start : start + 250]).to(device)
        parts.append(to_images(vae.decode(vae.encode(x).latent_dist.mode()).sample))
    return np.concatenate(parts)
