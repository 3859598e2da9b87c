"""Make the shapes world's weights again, from nothing.

    python -m rsi_jobs.shapes.train [all|autoencoder|scorers|base] [--work FOLDER] …

writes `rsi_jobs/shapes/weights/` and the figures reached, `figures.json`, beside them.
Stopped, it goes on where its last checkpoint in `--work` stands when started again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from rsi_jobs.shapes import train_autoencoder, train_base, train_scorers
from rsi_jobs.shapes.judge import judge_batch
from rsi_jobs.shapes.measure import count, draw, held_out_prompts, reconstruct, unet_mflop
from rsi_jobs.shapes.models import WEIGHTS
from rsi_jobs.shapes.render import FAULTS, render_batch
from rsi_jobs.shapes.scene import change_one, count_scenes, random_caption, random_scenes
from rsi_jobs.shapes.train_base import Pool
from rsi_jobs.shapes.training import Place, load_state, note, save_state

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)


def judge_figures(place: Place) -> None:
    """How exact the judge is on renders, on changed ones, and on reconstructions."""
    rng = np.random.default_rng(98)
    scenes = random_scenes(rng, 2000)
    captions = [random_caption(s, rng) for s in scenes]
    images = render_batch(scenes, rng)
    vae = AutoencoderKL.from_pretrained(place.work / "vae").to(place.device).eval()
    back = reconstruct(vae, images, place.device)
    other = [random_caption(change_one(s, rng), rng) for s in scenes]

    def right(shown: np.ndarray, said: list[str]) -> float:
        return round(float(np.mean([v.right for v in judge_batch(shown, said)])), 4)

    faults = {f"{f}_judged_right": right(render_batch(scenes, rng, [f] * 2000), captions) for f in FAULTS}
    note(
        place,
        "judge",
        scenes=count_scenes(),
        renders_right=right(images, captions),
        changed_judged_right=right(images, other),
        reconstructions_right=right(back, captions),
        **faults,
    )


def base_figures(trainer: train_base.Trainer, vae: AutoencoderKL, n: int = 1000) -> None:
    """What the judge says of the base on held-out prompts, by guidance."""
    parts = trainer.averaged(vae)
    prompts = held_out_prompts(n)
    table = {str(g): count(draw(parts, prompts, g), prompts) for g in GUIDANCES}
    best = max(table, key=lambda g: table[g]["right"])
    note(
        trainer.place,
        "base",
        by_guidance=table,
        best_guidance=float(best),
        right=table[best]["right"],
        extra_per_image=table[best]["extra"],
        prompts=n,
        unet_mflop=unet_mflop(parts.unet),
        unet_parameters=sum(p.numel() for p in parts.unet.parameters()),
        text_parameters=sum(p.numel() for p in parts.text.parameters()),
        steps=trainer.step,
        tidy_steps=train_base.TIDY_STEPS,
        batch=train_base.BATCH,
        mistaken=train_base.MISTAKEN,
        fault_share=train_base.FAULT_SHARE,
        vague_share=train_base.VAGUE_SHARE,
    )


def _pool(place: Place, vae: AutoencoderKL, trainer: train_base.Trainer, n: int, tidy: bool) -> Pool:
    """A pool of latents, kept beside the checkpoints."""
    path = place.checkpoint("tidy" if tidy else "untidy")
    kept = load_state(path)
    if kept is not None:
        return Pool(kept["latents"], kept["ids"])
    pool = train_base.build_pool(vae, trainer.tokenizer, n, int(tidy), place.device, tidy=tidy)
    save_state(path, {"latents": pool.latents, "ids": pool.ids})
    return pool


def base(place: Place, steps: int, every: int, pool_size: int, until: int) -> None:
    """Train the base, publishing a usable folder every `every` steps."""
    vae = AutoencoderKL.from_pretrained(place.work / "vae").to(place.device).eval()
    trainer = train_base.Trainer(place, 2e-3)
    begun, tidy_steps = time.time(), round(steps * train_base.TIDY_STEPS)
    trainer.resume(400)
    prompts = held_out_prompts(128)
    while trainer.step < min(until, steps):
        tidy = trainer.step < tidy_steps
        pool = _pool(place, vae, trainer, pool_size, tidy)
        trainer.train(pool, min(until, tidy_steps if tidy else steps, trainer.step + every), steps)
        parts = trainer.averaged(vae)
        for guidance in (1.0, 3.0):
            drawn = count(draw(parts, prompts, guidance), prompts)
            print(trainer.step, "guidance", guidance, drawn, flush=True)
        trainer.publish(vae)
    trainer.publish(vae)  # the decoder may be newer than the last step
    base_figures(trainer, vae)
    note(place, "base", seconds_last_run=round(time.time() - begun))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="?", default="all", choices=("all", "autoencoder", "scorers", "base"))
    parser.add_argument("--work", type=Path, default=Path("build/shapes"))
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--autoencoder-steps", type=int, default=2500)
    parser.add_argument("--decoder-steps", type=int, default=2500)
    parser.add_argument("--scorer-steps", type=int, default=1000)
    parser.add_argument("--scorer", action="append", choices=tuple(train_scorers.SEEDS))
    parser.add_argument("--base-steps", type=int, default=12_000)
    parser.add_argument("--base-until", type=int, default=10**9, help="stop early, for now")
    parser.add_argument("--base-every", type=int, default=1000)
    parser.add_argument("--pool", type=int, default=60_000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.out.mkdir(parents=True, exist_ok=True)
    place = Place(args.work, args.out, args.device)
    if args.what in ("all", "autoencoder"):
        train_autoencoder.train(place, args.autoencoder_steps)
        train_autoencoder.sharpen(place, args.decoder_steps)
        judge_figures(place)
    if args.what in ("all", "scorers"):
        names = tuple(args.scorer or train_scorers.SEEDS)
        train_scorers.train(place, args.scorer_steps, names)
    if args.what in ("all", "base"):
        base(place, args.base_steps, args.base_every, args.pool, args.base_until)


if __name__ == "__main__":
    main()
