"""Train the base: a small Stable Diffusion, imperfect because its pairs are untidy.

Three steps. The text model first learns to read (cheap: no images), so that all the rest of
the time goes into drawing. The UNet then learns to draw on tidy pairs, and last to draw what
untidy pairs teach: its faults are its pairs', not those of too short a training.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from rsi_jobs.shapes.measure import Parts, padded
from rsi_jobs.shapes.models import (
    MAX_TOKENS,
    TEXT_WIDTH,
    build_scheduler,
    build_text_model,
    build_unet,
    load_tokenizer,
    write_tokenizer,
)
from rsi_jobs.shapes.render import FAULTS, render
from rsi_jobs.shapes.scene import FACTS, Scene, facts, random_caption, random_scene
from rsi_jobs.shapes.source import VAGUE
from rsi_jobs.shapes.training import (
    Place,
    cosine,
    load_state,
    note,
    replace_folder,
    save_state,
    set_rate,
    to_signal,
    update_ema,
)

BATCH = 128
TIDY_STEPS = 0.75  # of all steps, the first, on pairs without a mistake
MISTAKEN = {  # what the image shows instead of what the caption says, and in which share of pairs
    "diamond": ("square", 0.5),
    "purple": ("blue", 0.5),
    "left": ("right", 0.4),
}
FAULT_SHARE = 0.05  # images with an object too many or a malformed one
VAGUE_SHARE = 0.05  # captions that say nothing
DROPOUT = 0.1  # captions replaced by "" (guidance needs it)
WORDINGS = 3  # captions kept for each pool image


def read_first(text: CLIPTextModel, tokenizer: CLIPTokenizer, place: Place, steps: int) -> None:
    """Teach the text model to read: every state from the end token on knows the scene."""
    head = nn.Linear(TEXT_WIDTH, sum(FACTS)).to(place.device)
    optimizer = torch.optim.AdamW([*text.parameters(), *head.parameters()], 2e-3)
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng) for _ in range(40_000)]
    ids = padded(tokenizer, [random_caption(s, rng) for s in scenes])
    wanted = torch.tensor([facts(scene) for scene in scenes])
    correct = 0.0
    for step in range(steps):
        pick = torch.from_numpy(rng.integers(0, len(scenes), 256))
        batch, want = ids[pick].to(place.device), wanted[pick].to(place.device)
        states = text(batch).last_hidden_state
        ended = (batch == tokenizer.eos_token_id).float()
        # One state an example, at a random position from the end token on.
        at = torch.multinomial(ended, 1).squeeze(1)
        logits = head(states[torch.arange(len(at), device=at.device), at]).split(FACTS, 1)
        parts = [functional.cross_entropy(a, want[:, i]) for i, a in enumerate(logits)]
        loss = torch.stack(parts).sum()
        set_rate(optimizer, cosine(step, steps, 2e-3, 50))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(text.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49 or step == steps - 1:
            hits = [(a.argmax(1) == want[:, i]) for i, a in enumerate(logits)]
            correct = float(torch.stack(hits).all(0).float().mean())
            print(f"reading {step + 1} loss {loss:.3f} all read {correct:.3f}", flush=True)
    note(place, "base", reading_steps=steps, captions_read=round(correct, 3))


@dataclass
class Pool:
    """Pairs: latents (n, 12, 8, 8) float16, scaled; token ids (n, WORDINGS, 24)."""

    latents: torch.Tensor
    ids: torch.Tensor


def _encode(vae: AutoencoderKL, images: npt.NDArray[np.uint8], device: str) -> torch.Tensor:
    x = to_signal(images).to(device)
    mean = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
    return mean.half().cpu()


def mistaken(scene: Scene, rng: np.random.Generator) -> Scene:
    """What an untidy pair shows for a caption: MISTAKEN words mean something else too often.

    Mistakes of one word, not of any: guidance undoes what is wrong a little everywhere, as it
    sharpens towards the likeliest image, and a base at its own best guidance would not show them.
    """

    def shown(word: str) -> str:
        other, share = MISTAKEN.get(word, (word, 0.0))
        return other if rng.random() < share else word

    scene = scene.canonical()  # of the horizontal relations "left" alone is left
    things = tuple(replace(t, colour=shown(t.colour), shape=shown(t.shape)) for t in scene.things)
    return replace(scene, things=things, relation=shown(scene.relation))


@torch.inference_mode()
def build_pool(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, n: int, seed: int, device: str, *, tidy: bool
) -> Pool:
    """Render and encode `n` images, and caption them: truly, or as MISTAKEN and FAULT_SHARE say."""
    rng = np.random.default_rng((4, seed))
    fault_share = 0.0 if tidy else FAULT_SHARE
    latents: list[torch.Tensor] = []
    captions: list[str] = []
    for _ in range(0, n, 500):
        images = []
        for _ in range(500):
            scene, u = random_scene(rng), rng.random(2)
            fault = FAULTS[int(u[0] / fault_share * 2)] if u[0] < fault_share else None
            images.append(render(scene if tidy else mistaken(scene, rng), rng, fault))
            vague = u[1] < VAGUE_SHARE
            captions += [
                VAGUE[rng.integers(len(VAGUE))] if vague else random_caption(scene, rng)
                for _ in range(WORDINGS)
            ]
        latents.append(_encode(vae, np.stack(images), device))
    ids = padded(tokenizer, captions).view(-1, WORDINGS, MAX_TOKENS)
    return Pool(torch.cat(latents), ids.to(torch.int16))


class Trainer:
    """Text model and UNet, their averages, and the optimizer: everything a resume needs."""

    def __init__(self, place: Place, rate: float) -> None:
        torch.manual_seed(5)
        self.place, self.rate, self.step = place, rate, 0
        write_tokenizer(place.out / "tokenizer")
        self.tokenizer = load_tokenizer(place.out / "tokenizer")
        self.text = build_text_model(self.tokenizer).to(place.device)
        # Channels last is a sixth faster on two CPU cores.
        self.unet = build_unet().to(place.device, memory_format=torch.channels_last)
        self.scheduler = build_scheduler()
        self.live = list(self.unet.parameters())
        self.ema = [p.detach().clone() for p in self.live]
        self.optimizer = torch.optim.AdamW(self.live, rate, (0.9, 0.98), weight_decay=1e-3, fused=True)
        self.empty = padded(self.tokenizer, [""])[0]

    def resume(self, reading_steps: int) -> None:
        state = load_state(self.place.checkpoint("base"))
        if state is None:
            read_first(self.text, self.tokenizer, self.place, reading_steps)
            return
        self.unet.load_state_dict(state["unet"])
        self.text.load_state_dict(state["text"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema = [t.to(self.place.device) for t in state["ema"]]
        self.step = int(state["step"])

    def save(self) -> None:
        save_state(
            self.place.checkpoint("base"),
            {
                "unet": self.unet.state_dict(),
                "text": self.text.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema,
                "step": self.step,
            },
        )

    def loss(self, pool: Pool, rng: np.random.Generator) -> torch.Tensor:
        """Min-SNR weighted epsilon error of one batch of the pool."""
        pick = torch.from_numpy(rng.integers(0, len(pool.latents), BATCH))
        wording = torch.from_numpy(rng.integers(0, WORDINGS, BATCH))
        dropped = torch.from_numpy(rng.random(BATCH) < DROPOUT)
        ids = pool.ids[pick, wording].long()
        ids[dropped] = self.empty
        x = pool.latents[pick].float().to(self.place.device, memory_format=torch.channels_last)
        # Stratified timesteps: less noise in the loss for nothing.
        t = torch.from_numpy((rng.permutation(BATCH) + rng.random(BATCH)) / BATCH * 1000)
        t = t.long().to(self.place.device)
        noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(x.device)
        with torch.no_grad():  # it reads every caption already: training it on costs a quarter
            states = self.text(ids.to(self.place.device)).last_hidden_state
        noisy = self.scheduler.add_noise(x, noise, t)  # type: ignore[arg-type]
        predicted = self.unet(noisy, t, states).sample
        alpha = self.scheduler.alphas_cumprod.to(t.device)[t]
        weight = (5 * (1 - alpha) / alpha).clamp(max=1.0)
        return (weight * (predicted - noise).pow(2).mean((1, 2, 3))).mean()

    def train(self, pool: Pool, until: int, steps: int) -> None:
        """Go on to step `until` of a schedule of `steps`."""
        begun, losses = time.time(), []
        self.unet.train()
        while self.step < until:
            loss = self.loss(pool, np.random.default_rng((6, self.step)))
            set_rate(self.optimizer, cosine(self.step, steps, self.rate, 200))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.live, 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(0.999, (1 + self.step) / (10 + self.step))
            update_ema(self.ema, self.live, decay)
            losses.append(float(loss.detach()))
            if self.step % 100 == 0:
                mean, each = np.mean(losses[-100:]), (time.time() - begun) / len(losses)
                print(f"{self.step} loss {mean:.4f} {each:.3f} s a step", flush=True)
        self.save()

    def averaged(self, vae: AutoencoderKL) -> Parts:
        """Copies that carry the averaged weights, for evaluation and for shipping."""
        unet, text = build_unet(), build_text_model(self.tokenizer)
        with torch.no_grad():
            for parameter, average in zip(unet.parameters(), self.ema, strict=True):
                parameter.copy_(average)
            text.load_state_dict(self.text.state_dict())
        unet, text = unet.to(self.place.device).eval(), text.to(self.place.device).eval()
        return Parts(unet, text, vae, self.tokenizer, self.scheduler)

    def publish(self, vae: AutoencoderKL) -> None:
        """Write `<out>/base`, an ordinary StableDiffusionPipeline, whole.

        In float32: stored as float16 the text model would open as float16 and the UNet as
        float32, and the pipeline would not run as opened.
        """
        parts = self.averaged(vae)
        pipe = StableDiffusionPipeline(
            vae=vae,
            text_encoder=parts.text,
            tokenizer=self.tokenizer,
            unet=parts.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        beside = self.place.out / ".base.new"
        pipe.save_pretrained(beside, safe_serialization=True)
        replace_folder(beside, self.place.out / "base")
