"""The UNet family: Stable Diffusion 1.x (epsilon), 2.x (v prediction), and small ones like them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from rsi_jobs.diffusion import adapters, checkpoints
from rsi_jobs.diffusion.batches import Batch
from rsi_jobs.diffusion.noise import candidate_noise, hash63
from rsi_jobs.errors import ConfigError, DataError, NotFoundError

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
PREDICTIONS = ("epsilon", "v_prediction")

# (noisy latents, timesteps, embeddings) -> what the network predicts of them
Predictor = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Model:
    """A loaded pipeline of this family; `text_encoder`, `tokenizer` and `vae` only when asked for.

    `network` is the part that is trained; `scheduler` the base's scheduler configuration;
    `latent_shape` (channels, height, width); `vae_scale` what the latents were multiplied by;
    `signal` (T,) float32, the share of signal (alpha-bar) at every training timestep.
    """

    base: Path
    network: Any  # UNet2DConditionModel; the libraries' own types are not complete
    text_encoder: Any  # CLIPTextModel, or None
    tokenizer: Any  # CLIPTokenizer, or None
    vae: Any  # AutoencoderKL, or None
    scheduler: dict[str, Any]
    prediction_type: str
    latent_shape: tuple[int, int, int]
    vae_scale: float
    signal: torch.Tensor
    device: torch.device
    family: str = "unet"


@dataclass(frozen=True)
class Samples:
    """`latents` (n, C, H, W) float32, scaled; `x0_variance` (n,) float32, see `sample`."""

    latents: torch.Tensor
    x0_variance: torch.Tensor


def load(
    path: str | Path,
    *,
    device: str,
    dtype: torch.dtype,
    checkpoint: Path | None,
    text: bool = True,
    vae: bool = True,
) -> Model:
    """Open a pipeline folder, with a checkpoint's weights or adapter on top.

    Only safetensors are read, and every weight must come from a file. The VAE is float32 whatever
    `dtype` is (half precision overflows in Stable Diffusion 1.x's). Raises NotFoundError for a
    folder or part that is not there, DataError for one that does not fit.
    """
    base = Path(path)
    scheduler = _read_json(base, "scheduler/scheduler_config.json")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise DataError(f"prediction type {prediction!r} of {base} is not of the UNet family: {PREDICTIONS}")
    network = _part(UNet2DConditionModel, base, "unet", dtype)
    if checkpoint is not None:
        checkpoints.load_checkpoint(network, Path(checkpoint))
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    place = torch.device(device)
    return Model(
        base=base,
        network=network.requires_grad_(False).eval().to(place),
        text_encoder=_part(CLIPTextModel, base, "text_encoder", dtype).to(place) if text else None,
        tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer") if text else None,
        vae=_part(AutoencoderKL, base, "vae", torch.float32).to(place) if vae else None,
        scheduler=scheduler,
        prediction_type=prediction,
        latent_shape=(network.config.in_channels, height, width),
        vae_scale=_read_json(base, "vae/config.json").get("scaling_factor", 0.18215),
        signal=_scheduler(scheduler, "ddim").alphas_cumprod.float().to(place),
        device=place,
    )


def _read_json(base: Path, name: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((base / name).read_text())
    except FileNotFoundError:
        raise NotFoundError(f"model folder {base} has no {name}: give a diffusers folder") from None
    except ValueError as error:
        raise DataError(f"{base / name} is not JSON: {error}") from None
    return content


def _part(kind: Any, base: Path, name: str, dtype: torch.dtype) -> Any:
    """One component, frozen, in eval mode; DataError unless its file holds every weight."""
    folder = base / name
    if not any(folder.glob("*.safetensors")):
        raise NotFoundError(f"model folder {folder} has no *.safetensors file (no other is read)")
    try:
        part, info = kind.from_pretrained(
            folder, use_safetensors=True, torch_dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot load {folder}: {error}") from error
    wrong = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]
    if wrong:
        raise DataError(f"{folder} lacks or misshapes {len(wrong)} weights, the first {wrong[0]}")
    return part.requires_grad_(False).eval()


@torch.no_grad()
def encode(model: Model, prompts: Sequence[str], *, batch: int = 32) -> torch.Tensor:
    """Text embeddings (n, tokens, dim) in the model's dtype; `encode([""])` is the unconditional.

    Raises DataError for a prompt longer than the tokenizer's window: a cut prompt would be scored
    for words the model never saw.
    """
    assert model.text_encoder is not None, "loaded without text"
    encoder, tokenizer = model.text_encoder, model.tokenizer
    window = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length > window:
            raise DataError(f"prompt {prompt!r} has {length} tokens: at most {window} are read")
    parts = []
    for start in range(0, len(prompts), batch):
        tokens = tokenizer(
            list(prompts[start : start + batch]),
            padding="max_length",
            max_length=window,
            return_tensors="pt",
        )
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(model.device) if masked else None
        parts.append(encoder(tokens.input_ids.to(model.device), attention_mask=mask)[0])
    return torch.cat(parts)


def _scheduler(base: dict[str, Any], name: str) -> Any:
    """A fresh scheduler (they carry state) with the base's noise schedule.

    Sample clipping is off and the step offset 1, as StableDiffusionPipeline sets them itself.
    """
    if name not in SCHEDULERS:
        raise ConfigError(f"scheduler {name!r} is unknown: use one of {sorted(SCHEDULERS)}")
    kind: Any = SCHEDULERS[name]
    config = {**base, "clip_sample": False, "steps_offset": 1}
    known = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in config.items() if key in known})


@torch.no_grad()
def sample(
    model: Model,
    embeddings: torch.Tensor,
    uncond: torch.Tensor,
    noise: torch.Tensor,
    *,
    steps: int,
    guidance: float,
    scheduler: str,
    eta: float = 0.0,
    seeds: Sequence[int] | None = None,
) -> Samples:
    """Latents for n prompts from n noises; what StableDiffusionPipeline makes of the same.

    `embeddings` (n, t, d), `uncond` (1, t, d), `noise` (n, C, H, W) standard normal. Guidance
    (classifier-free) runs as one batch of 2n; at 1 the unconditional half is left out. `eta` > 0
    (DDIM only) draws each step's noise from `seeds` (n,), so that it does not depend on the batch.
    `x0_variance` is the variance of the predicted x0 over the last third of the steps, averaged
    over its elements: high where the trajectory hesitates (arXiv 2406.09358).
    """
    _check_sampler(scheduler, eta, seeds)
    plan = _scheduler(model.scheduler, scheduler)
    plan.set_timesteps(steps, device=model.device)
    dtype = model.network.dtype
    guided = guidance != 1.0
    context = embeddings.to(model.device, dtype)
    if guided:
        context = torch.cat([uncond.to(model.device, dtype).expand_as(context), context])
    latents = noise.to(model.device, torch.float32) * plan.init_noise_sigma
    watched = max(2, -(-len(plan.timesteps) // 3))
    predicted: list[torch.Tensor] = []
    for i, t in enumerate(plan.timesteps):
        scaled = plan.scale_model_input(latents, t)
        inputs = torch.cat([scaled, scaled]) if guided else scaled
        output = model.network(inputs.to(dtype), t, context, return_dict=False)[0].float()
        if guided:
            without, having = output.chunk(2)
            output = without + guidance * (having - without)
        if i >= len(plan.timesteps) - watched:
            predicted.append(_predicted_x0(model, plan, i, scaled, output))
        extra: dict[str, Any] = {}
        if eta > 0:
            drawn = candidate_noise([hash63("eta", s, i) for s in seeds or ()], latents.shape[1:])
            extra = {"eta": eta, "variance_noise": drawn.to(model.device)}
        latents = plan.step(output, t, latents, return_dict=False, **extra)[0]
    spread = torch.stack(predicted).var(dim=0, unbiased=False).flatten(1).mean(dim=1)
    return Samples(latents, spread)


def _check_sampler(scheduler: str, eta: float, seeds: Sequence[int] | None) -> None:
    if eta > 0 and scheduler != "ddim":
        raise ConfigError(f"eta {eta} has no meaning for scheduler {scheduler!r}: only for 'ddim'")
    assert eta == 0 or seeds is not None, "eta > 0 needs the candidates' seeds"


def _predicted_x0(
    model: Model, plan: Any, i: int, scaled: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """x0 as the network sees it at step i; `scaled` is its input, of unit variance by schedule."""
    if hasattr(plan, "sigmas"):  # noise over signal
        signal = 1 / (plan.sigmas[i] ** 2 + 1)
    else:
        signal = plan.alphas_cumprod[int(plan.timesteps[i])]
    a, s = signal.sqrt().to(scaled), (1 - signal).sqrt().to(scaled)
    epsilon = model.prediction_type == "epsilon"
    x0: torch.Tensor = (scaled - s * output) / a if epsilon else a * scaled - s * output
    return x0


@torch.no_grad()
def decode(model: Model, latents: torch.Tensor, *, batch: int = 8) -> torch.Tensor:
    """Images (n, H, W, 3) uint8 on the CPU, of scaled latents (n, C, h, w), `batch` at a time."""
    assert model.vae is not None, "loaded without the VAE"
    parts = []
    for start in range(0, len(latents), batch):
        plain = latents[start : start + batch].to(model.device, torch.float32) / model.vae_scale
        image = model.vae.decode(plain, return_dict=False)[0] / 2 + 0.5
        parts.append((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(parts).contiguous()


def loss(
    model: Model,
    batch: Batch,
    *,
    snr_gamma: float,
    beta: float,
    base: Predictor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's loss w m(t) mse(output, target) + beta mse(output, base's), and its mse.

    Both (n,) float32, mse a mean over elements; the second is detached and unweighted. m(t) is
    min(SNR, gamma)/SNR for epsilon and min(SNR, gamma)/(SNR + 1) for v (arXiv 2303.09556); gamma 0
    leaves the weighting by time out. `base` predicts from (noisy, timesteps, embeddings) without
    gradient; it is asked only when beta > 0.
    """
    timesteps = (batch.times * len(model.signal)).long()
    signal = model.signal[timesteps]
    a, s = signal.sqrt()[:, None, None, None], (1 - signal).sqrt()[:, None, None, None]
    noisy = a * batch.latents + s * batch.noise
    epsilon = model.prediction_type == "epsilon"
    target = batch.noise if epsilon else a * batch.noise - s * batch.latents
    seen = (noisy.to(model.network.dtype), timesteps, batch.embeddings.to(model.network.dtype))
    anchor = base(*seen).float() if beta > 0 and base is not None else None
    output = model.network(*seen, return_dict=False)[0].float()
    mse = (output - target).square().flatten(1).mean(dim=1)
    each = batch.weights * snr_weight(signal, snr_gamma, epsilon=epsilon) * mse
    if anchor is not None:
        each = each + beta * (output - anchor).square().flatten(1).mean(dim=1)
    return each, mse.detach()


def snr_weight(signal: torch.Tensor, gamma: float, *, epsilon: bool) -> torch.Tensor:
    """min-SNR weights m(t) of timesteps with alpha-bar `signal`; all 1 for gamma 0."""
    if gamma == 0:
        return torch.ones_like(signal)
    snr = signal / (1 - signal)
    if epsilon:
        return (gamma / snr).clamp(max=1)  # also right at zero terminal SNR
    return snr.clamp(max=gamma) / (snr + 1)


def base_predictor(model: Model, *, copy: bool) -> Predictor:
    """The untouched base's prediction: from a second, frozen copy, or `model` less its adapter."""
    frozen = _part(UNet2DConditionModel, model.base, "unet", model.network.dtype) if copy else None
    if frozen is not None:
        frozen = frozen.to(model.device)

    @torch.no_grad()
    def predict(noisy: torch.Tensor, times: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if frozen is not None:
            return torch.as_tensor(frozen(noisy, times, context, return_dict=False)[0])
        with adapters.disabled(model.network):
            return torch.as_tensor(model.network(noisy, times, context, return_dict=False)[0])

    return predict
