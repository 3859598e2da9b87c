"""Sampling, encoding and decoding equal diffusers' own pipeline on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)

from rsi_jobs.diffusion import family, unet
from rsi_jobs.diffusion.noise import candidate_noise
from rsi_jobs.errors import ConfigError, DataError, NotFoundError
from tests import tiny

KINDS = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
PROMPTS = ["a red circle", "a small blue square on white", "zebra"]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("tiny"), prediction_type=request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> unet.Model:
    return unet.load(folder, device="cpu", dtype=torch.float32, checkpoint=None)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_equals_the_pipeline(
    model: unet.Model, pipeline: StableDiffusionPipeline, name: str, guidance: float
) -> None:
    noise = candidate_noise([1, 2, 3], model.latent_shape)
    ours = unet.sample(
        model,
        unet.encode(model, PROMPTS),
        unet.encode(model, [""]),
        noise,
        steps=6,
        guidance=guidance,
        scheduler=name,
    )
    # As Stable Diffusion 1.4 ships it; DDIM clips otherwise, which latents must not be.
    pipeline.scheduler = KINDS[name].from_config(pipeline.scheduler.config, clip_sample=False)
    call = {"num_inference_steps": 6, "guidance_scale": guidance, "latents": noise}
    theirs = pipeline(PROMPTS, output_type="latent", **call).images
    torch.testing.assert_close(ours.latents, theirs, rtol=1e-4, atol=1e-4)
    images = unet.decode(model, ours.latents, batch=2)
    pictures = (pipeline(PROMPTS, output_type="np", **call).images * 255).round()
    assert images.shape == (3, 32, 32, 3)
    assert images.dtype == torch.uint8
    assert np.abs(images.numpy().astype(int) - pictures.astype(int)).max() <= 1
    assert images.float().std() > 10  # a picture, not a constant


def test_calls_do_not_leak_state_and_samples_do_not_depend_on_their_batch(
    model: unet.Model,
) -> None:
    noise = candidate_noise([4, 5], model.latent_shape)
    text, uncond = unet.encode(model, PROMPTS[:2]), unet.encode(model, [""])
    kw = {"steps": 5, "guidance": 3.0, "scheduler": "dpm++"}
    both = unet.sample(model, text, uncond, noise, **kw)
    again = unet.sample(model, text, uncond, noise, **kw)
    assert torch.equal(both.latents, again.latents)
    alone = unet.sample(model, text[1:], uncond, noise[1:], **kw)
    torch.testing.assert_close(alone.latents, both.latents[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.x0_variance, both.x0_variance[1:], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_x0_variance_is_that_of_the_schedulers_own_x0(
    model: unet.Model, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a scheduler tells its predicted x0, ours is the same; the last three of nine count."""
    noise = candidate_noise([4, 5], model.latent_shape)
    text = unet.encode(model, PROMPTS[:2])
    seen: list[torch.Tensor] = []
    original = KINDS[name].convert_model_output if name == "dpm++" else KINDS[name].step

    def watch(self: object, *args: object, **kwargs: object) -> object:
        result = original(self, *args, **({**kwargs, "return_dict": True} if name != "dpm++" else kwargs))
        if name == "dpm++":
            seen.append(result)
            return result
        seen.append(result.pred_original_sample)
        return (result.prev_sample,)

    method = "convert_model_output" if name == "dpm++" else "step"
    monkeypatch.setattr(KINDS[name], method, watch)
    ours = unet.sample(model, text, text[:1], noise, steps=9, guidance=1.0, scheduler=name)
    wanted = torch.stack(seen[-3:]).var(dim=0, unbiased=False).mean(dim=(1, 2, 3))
    assert len(seen) == 9
    torch.testing.assert_close(ours.x0_variance, wanted, rtol=1e-3, atol=1e-7)
    assert (ours.x0_variance > 0).all()


def test_eta_noise_follows_the_candidate(model: unet.Model) -> None:
    noise = candidate_noise([4, 5], model.latent_shape)
    text = unet.encode(model, PROMPTS[:2])
    kw = {"steps": 5, "guidance": 1.0, "scheduler": "ddim"}
    plain = unet.sample(model, text, text[:1], noise, **kw)
    both = unet.sample(model, text, text[:1], noise, eta=1.0, seeds=[4, 5], **kw)
    alone = unet.sample(model, text[1:], text[:1], noise[1:], eta=1.0, seeds=[5], **kw)
    torch.testing.assert_close(alone.latents, both.latents[1:], rtol=1e-4, atol=1e-5)
    assert (both.latents - plain.latents).abs().max() > 0.1
    with pytest.raises(ConfigError, match="only for 'ddim'"):
        unet.sample(model, text, text[:1], noise, **{**kw, "scheduler": "euler"}, eta=0.5, seeds=[1])


def test_long_prompts_are_refused_by_name(model: unet.Model) -> None:
    fits = "a " * (tiny.WINDOW - 2)
    assert unet.encode(model, [fits]).shape == (1, tiny.WINDOW, 16)
    with pytest.raises(DataError, match=f"'{fits}red' has {tiny.WINDOW + 1} tokens: at most 16"):
        unet.encode(model, ["a red circle", fits + "red"])


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'nope'"):
        family("nope")
    assert family("unet") is unet
    kw = {"device": "cpu", "dtype": torch.float32}
    with pytest.raises(NotFoundError, match=r"no scheduler/scheduler_config.json"):
        unet.load(tmp_path, checkpoint=None, **kw)
    with pytest.raises(NotFoundError, match="neither pytorch_lora_weights"):
        unet.load(folder, checkpoint=tmp_path, **kw)


def test_a_base_with_a_missing_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "base")
    path = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_in.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"conv_in\.weight"):
        unet.load(tmp_path / "base", device="cpu", dtype=torch.float32, checkpoint=None)
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(NotFoundError, match=r"no \*\.safetensors"):
        unet.load(tmp_path / "base", device="cpu", dtype=torch.float32, checkpoint=None)
