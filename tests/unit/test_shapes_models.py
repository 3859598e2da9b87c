"""The shipped weights: they open as anybody's would, and do what they are shipped for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

from rsi_jobs.shapes.judge import judge_batch
from rsi_jobs.shapes.measure import draw, held_out_prompts, parts_of, reconstruct
from rsi_jobs.shapes.models import WEIGHTS, build_autoencoder, build_unet
from rsi_jobs.shapes.render import render_batch
from rsi_jobs.shapes.scene import change_one, random_caption, random_scenes
from rsi_jobs.shapes.scorers import KINDS, load_scorer
from rsi_jobs.shapes.train_scorers import auc


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(WEIGHTS / "base")


def test_all_shipped_files_are_small() -> None:
    assert sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file()) <= 14e6


def test_the_base_is_an_ordinary_pipeline(pipeline: StableDiffusionPipeline) -> None:
    assert pipeline.safety_checker is None
    assert not pipeline.config.requires_safety_checker
    tokenizer = pipeline.tokenizer
    assert pipeline.text_encoder.config.eos_token_id == tokenizer.eos_token_id != 2
    images = pipeline(
        ["a large red circle above a small blue square on white", "a thing"],
        num_inference_steps=2,
        guidance_scale=2.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert images.shape == (2, 32, 32, 3)
    assert np.isfinite(images).all()


def test_our_sampler_is_the_pipeline_s(pipeline: StableDiffusionPipeline) -> None:
    prompts = held_out_prompts(4)
    ours = draw(parts_of(pipeline), prompts, 2.0, seed=3)
    noise = torch.randn((4, *build_latent_shape(pipeline)), generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        prompts, latents=noise, num_inference_steps=12, guidance_scale=2.0, output_type="np"
    ).images
    assert np.abs(ours / 255.0 - theirs).mean() < 0.01


def build_latent_shape(pipeline: StableDiffusionPipeline) -> tuple[int, int, int]:
    unet = pipeline.unet
    return unet.config.in_channels, unet.config.sample_size, unet.config.sample_size


def test_the_autoencoder_gives_right_renders_back_right(pipeline: StableDiffusionPipeline) -> None:
    rng = np.random.default_rng(6)
    scenes = random_scenes(rng, 1000)
    back = reconstruct(pipeline.vae, render_batch(scenes, rng), "cpu")
    right = [v.right for v in judge_batch(back, [random_caption(s, rng) for s in scenes])]
    assert np.mean(right) >= 0.98


def test_the_base_draws_and_errs(pipeline: StableDiffusionPipeline) -> None:
    figures = json.loads((WEIGHTS / "figures.json").read_text())["base"]
    assert 0.2 <= figures["right"] <= 0.5
    prompts = held_out_prompts(300, seed=5)
    verdicts = judge_batch(draw(parts_of(pipeline), prompts, figures["best_guidance"]), prompts)
    # The figure is of 1,000 other prompts: three standard errors of the difference are 0.1.
    assert np.mean([v.right for v in verdicts]) == pytest.approx(figures["right"], abs=0.1)


def test_a_pass_is_cheap() -> None:
    unet, vae = build_unet(), build_autoencoder()
    channels = unet.config.in_channels
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.zeros(1, channels, 8, 8), torch.tensor([5]), torch.zeros(1, 24, 96))
    assert counter.get_total_flops() <= 40e6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(torch.zeros(1, channels, 8, 8))
    assert counter.get_total_flops() <= 60e6


@pytest.mark.parametrize("name", sorted(KINDS))
def test_scorers_tell_right_from_changed(name: str) -> None:
    scorer = load_scorer(name)
    rng = np.random.default_rng(30)
    scenes = random_scenes(rng, 300)
    images = render_batch(scenes, rng)
    right = scorer.score(images, [random_caption(s, rng) for s in scenes])
    changed = scorer.score(images, [random_caption(change_one(s, rng), rng) for s in scenes])
    assert right.dtype == np.float32
    assert right.shape == (300,)
    assert 0.75 <= auc(right, changed) <= 0.995


@pytest.mark.parametrize("name", sorted(KINDS))
def test_scorers_take_any_words_and_repeat_themselves(name: str) -> None:
    scorer = load_scorer(name)
    rng = np.random.default_rng(31)
    images = render_batch(random_scenes(rng, 3), rng)
    prompts = ["", "龙 a turquoise hexagon 🐉", "a thing " * 50]
    first, again = scorer.score(images, prompts), scorer.score(images, prompts)
    assert np.isfinite(first).all()
    assert (first == again).all()
    features = scorer.embed_image(images)
    assert features.dtype == np.float32
    assert len(features) == 3
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-4)
    assert scorer.score(images[:0], []).shape == (0,)


def test_only_the_held_out_scorer_was_taught_hallucinations() -> None:
    rng = np.random.default_rng(32)
    scenes = random_scenes(rng, 300)
    captions = [random_caption(s, rng) for s in scenes]
    clean = render_batch(scenes, rng)
    faulty = render_batch(scenes, rng, ["extra", "malformed"] * 150)
    found = {}
    for name in KINDS:
        scorer = load_scorer(name)
        found[name] = auc(scorer.score(clean, captions), scorer.score(faulty, captions))
    assert found["heldout"] >= max(found["dual"], found["fused"])


def test_an_unknown_scorer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dual"):
        load_scorer("hpsv2")
