"""Checkpoints open in diffusers at the right strength, and halfway is halfway."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from rsi_jobs.diffusion import adapters, checkpoints, unet
from rsi_jobs.diffusion.noise import candidate_noise
from rsi_jobs.errors import CannotCreate, DataError, RsiError
from tests import tiny

SHAPE = adapters.Shape(rank=4, alpha=10)  # alpha is not rank, on purpose
WIDE = adapters.Shape(rank=8, alpha=2, targets=("conv1", "to_q", "to_k"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("tiny"))


def opened(base: Path, checkpoint: Path | None = None) -> unet.Model:
    return unet.load(base, device="cpu", dtype=torch.float32, checkpoint=checkpoint)


def adapter(base: Path, folder: Path, shape: adapters.Shape, seed: int, rank: int = 99) -> Path:
    """An adapter with random weights (of no more than `rank`), saved."""
    network = opened(base).network
    adapters.attach(network, shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapters.parameters(network).items():
        if ".lora_B." in name:
            weight.data.normal_(0, 0.3, generator=generator)
            weight.data[:, rank:] = 0
    checkpoints.save_checkpoint(network, folder)
    return folder


def full(base: Path, folder: Path, seed: int) -> Path:
    network = opened(base).network
    generator = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        weight.data += torch.empty(weight.shape).normal_(0, 0.05, generator=generator)
    checkpoints.save_checkpoint(network, folder)
    return folder


def ours(model: unet.Model) -> torch.Tensor:
    """Images of two prompts, as the package draws them."""
    noise = candidate_noise([1, 2], model.latent_shape)
    text = unet.encode(model, ["a red circle", "a blue square"])
    kw = {"steps": 4, "guidance": 3.0, "scheduler": "ddim"}
    return unet.sample(model, text, unet.encode(model, [""]), noise, **kw).latents


def theirs(pipe: StableDiffusionPipeline) -> torch.Tensor:
    """The same images, as diffusers draws them."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe(
        ["a red circle", "a blue square"],
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=candidate_noise([1, 2], (4, 8, 8)),
        output_type="latent",
    ).images


@pytest.mark.parametrize("shape", [SHAPE, WIDE])
def test_diffusers_loads_the_adapter_at_our_strength(
    base: Path, tmp_path: Path, shape: adapters.Shape
) -> None:
    model = opened(base, adapter(base, tmp_path / "a", shape, seed=1))
    assert adapters.shape_of(model.network) == shape
    pipe = StableDiffusionPipeline.from_pretrained(base)
    plain = theirs(pipe)
    pipe.load_lora_weights(tmp_path / "a")
    images = ours(model)
    torch.testing.assert_close(theirs(pipe), images, rtol=1e-4, atol=1e-4)
    assert (images - plain).abs().mean() > 0.01
    with adapters.disabled(model.network):
        torch.testing.assert_close(ours(model), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(model), images, rtol=0, atol=0)


@pytest.mark.parametrize("make", [lambda b, t: adapter(b, t, SHAPE, seed=3), lambda b, t: full(b, t, 3)])
def test_exported_pipeline_opens_and_draws_the_same(base: Path, tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    checkpoint = make(base, tmp_path / "c")
    checkpoints.export_pipeline(base, checkpoint, tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(pipe), ours(opened(base, checkpoint)), rtol=1e-4, atol=1e-4)
    if checkpoints.is_adapter(checkpoint):
        fresh = StableDiffusionPipeline.from_pretrained(base)
        fresh.load_lora_weights(tmp_path / "out")
        torch.testing.assert_close(theirs(fresh), theirs(pipe), rtol=1e-4, atol=1e-4)
    with pytest.raises(CannotCreate, match="not empty"):
        checkpoints.export_pipeline(base, checkpoint, tmp_path / "out")


def test_exporting_no_checkpoint_is_the_base(base: Path, tmp_path: Path) -> None:
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"variant")
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    checkpoints.export_pipeline(base, None, tmp_path / "out")
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (base / "unet" / "diffusion_pytorch_model.bin").unlink()
    names = {p.relative_to(base) for p in base.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()} == names
    torch.testing.assert_close(
        theirs(DiffusionPipeline.from_pretrained(tmp_path / "out")), ours(opened(base))
    )


def test_same_weights_same_bytes(base: Path, tmp_path: Path) -> None:
    weights, shape, part = checkpoints.read_adapter(adapter(base, tmp_path / "a", WIDE, seed=1))
    turned = dict(reversed(weights.items()))
    digests = set()
    for _ in range(8):  # safetensors orders a header's metadata by a hash that it draws each time
        checkpoints._write_adapter(turned, shape, part, tmp_path / "b")
        digests.add(hashlib.sha256((tmp_path / "b" / checkpoints.ADAPTER).read_bytes()).digest())
    assert digests == {hashlib.sha256((tmp_path / "a" / checkpoints.ADAPTER).read_bytes()).digest()}
    full(base, tmp_path / "f", 1)
    full(base, tmp_path / "g", 1)
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert (tmp_path / "f/unet" / name).read_bytes() == (tmp_path / "g/unet" / name).read_bytes()
    assert str(base) not in (tmp_path / "f/unet/config.json").read_text()


def changes(folder: Path) -> dict[str, torch.Tensor]:
    weights, shape, _ = checkpoints.read_adapter(folder)
    return {n: adapters.dense(a, b, shape) for n, (a, b) in adapters.pairs(weights).items()}


@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize("with_prev", [True, False])
def test_halfway_adapter_is_the_dense_interpolation(
    base: Path, tmp_path: Path, share: float, with_prev: bool
) -> None:
    """Ranks 3 and 5 fit into 8; the earlier one has another rank and alpha."""
    narrow = adapters.Shape(rank=3, alpha=7, targets=WIDE.targets)
    prev = adapter(base, tmp_path / "p", narrow, seed=1) if with_prev else None
    new = adapter(base, tmp_path / "n", WIDE, seed=2, rank=5)
    checkpoints.halfway(prev, new, tmp_path / "h", base=base, share=share)
    got, after = changes(tmp_path / "h"), changes(new)
    before = changes(prev) if prev else {n: torch.zeros_like(d) for n, d in after.items()}
    assert any(d.dim() == 4 for d in after.values())  # a convolution is among them
    for name, change in after.items():
        wanted = before[name] + share * (change - before[name])
        assert wanted.abs().max() > 0.001
        torch.testing.assert_close(got[name], wanted, rtol=1e-4, atol=1e-6)
    assert checkpoints.read_adapter(tmp_path / "h")[1] == WIDE
    opened(base, tmp_path / "h")


def test_halfway_of_too_much_rank_is_the_closest_of_that_rank(base: Path, tmp_path: Path) -> None:
    prev, new = (adapter(base, tmp_path / n, SHAPE, seed=i) for i, n in enumerate("pn"))
    checkpoints.halfway(prev, new, tmp_path / "h", base=base)
    before, after, got = changes(prev), changes(new), changes(tmp_path / "h")
    for name, change in got.items():
        wanted = (before[name] + after[name]) / 2
        lost = torch.linalg.svdvals(wanted)[SHAPE.rank :].square().sum().sqrt()
        assert lost > 0.01
        torch.testing.assert_close((wanted - change).norm(), lost, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("with_prev", [True, False])
def test_halfway_full_is_the_interpolation(base: Path, tmp_path: Path, with_prev: bool) -> None:
    prev = full(base, tmp_path / "p", 1) if with_prev else None
    new = full(base, tmp_path / "n", 2)
    checkpoints.halfway(prev, new, tmp_path / "h", base=base, share=0.25)
    name = "unet/diffusion_pytorch_model.safetensors"
    start, end, got = (load_file(f / name) for f in (prev or base, new, tmp_path / "h"))
    for key, value in got.items():
        torch.testing.assert_close(value, 0.75 * start[key] + 0.25 * end[key])
    opened(base, tmp_path / "h")


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    network = opened(base).network
    network.conv_in.weight.data[0] = float("nan")
    with pytest.raises(RsiError, match=r"conv_in\.weight is not finite"):
        checkpoints.save_checkpoint(network, tmp_path / "nan")
    assert not (tmp_path / "nan").exists()
    one = adapter(base, tmp_path / "a", SHAPE, seed=1)
    other = adapter(base, tmp_path / "b", WIDE, seed=1)
    with pytest.raises(DataError, match="different modules"):
        checkpoints.halfway(one, other, tmp_path / "h", base=base)
    path = one / checkpoints.ADAPTER
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        opened(base, one)
    checkpoint = full(base, tmp_path / "f", 1)
    weights = load_file(checkpoint / "unet/diffusion_pytorch_model.safetensors")
    weights["conv_in.weight"] = weights["conv_in.weight"][:1].clone()
    config = json.loads((checkpoint / "unet/config.json").read_text())
    checkpoints._write_full(weights, config, checkpoint / "unet")
    with pytest.raises(DataError, match=r"weight conv_in\.weight is odd"):
        opened(base, checkpoint)
