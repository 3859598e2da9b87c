"""Checkpoints: a network's full weights, or a LoRA adapter; both open in `diffusers` alone.

    <folder>/unet/diffusion_pytorch_model.safetensors, config.json   full (MMDiT: transformer/)
    <folder>/pytorch_lora_weights.safetensors                        adapter, with rank and alpha

Same weights, same bytes: a safetensors header holds its metadata in no fixed order, so at most one
key is ever written there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rsi_jobs.diffusion import adapters
from rsi_jobs.errors import CannotCreate, DataError, NotFoundError, RsiError

ADAPTER = "pytorch_lora_weights.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
METADATA = "lora_adapter_metadata"  # where diffusers looks for rank and alpha
PARTS = ("unet", "transformer")

Weights = dict[str, torch.Tensor]


def part_name(network: Any) -> str:
    """The folder of a pipeline that this network lives in."""
    return "unet" if type(network).__name__.startswith("UNet") else "transformer"


def save_checkpoint(network: Any, folder: Path) -> None:
    """Write the adapter on `network`, or its full weights where it has none.

    Refuses weights that are not finite (RsiError): training stops before it comes to that.
    """
    shape = adapters.shape_of(network)
    if shape is not None:
        weights = {k: w.detach() for k, w in adapters.parameters(network).items()}
        _write_adapter(weights, shape, part_name(network), folder)
        return
    config = {k: v for k, v in network.config.items() if k != "_name_or_path"}
    config["_class_name"] = type(network).__name__
    _write_full(network.state_dict(), config, folder / part_name(network))


def load_checkpoint(network: Any, folder: Path) -> None:
    """Put a checkpoint on a fresh base network: replace its weights, or attach the adapter."""
    if is_adapter(folder):
        weights, shape, _ = read_adapter(folder)
        adapters.attach(network, shape, seed=0)
        adapters.load_weights(network, weights)
        return
    weights = _read(_full_file(folder))
    own = network.state_dict()
    odd = sorted(own.keys() ^ weights.keys())
    odd += [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if odd:
        raise DataError(f"checkpoint {folder} does not fit the base model: weight {odd[0]} is odd")
    network.load_state_dict(weights)


def is_adapter(folder: Path) -> bool:
    """True for an adapter, False for full weights; NotFoundError for neither."""
    if (folder / ADAPTER).is_file():
        return True
    _full_file(folder)
    return False


def read_adapter(folder: Path) -> tuple[Weights, adapters.Shape, str]:
    """An adapter's weights, its shape, and the pipeline part it belongs to."""
    path = folder / ADAPTER
    weights = _read(path)
    part = next((p for p in PARTS if all(k.startswith(f"{p}.") for k in weights)), None)
    with safe_open(path, framework="pt") as file:
        packed = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    try:
        shape = adapters.Shape(
            rank=packed[f"{part}.r"],
            alpha=packed[f"{part}.lora_alpha"],
            targets=tuple(packed[f"{part}.target_modules"]),
        )
    except KeyError as error:
        raise DataError(f"adapter {path} has no {error} in its metadata: not one of ours") from None
    assert part is not None
    return {k.removeprefix(f"{part}."): w for k, w in weights.items()}, shape, part


def halfway(prev: Path | None, new: Path, out: Path, *, base: Path, share: float = 0.5) -> None:
    """Write the checkpoint `share` of the way from `prev` (None: the base) to `new`.

    Full weights are interpolated. Of adapters the dense changes are, and the result is brought back
    to `new`'s rank by SVD: exact while the ranks of the two add up to no more than that, and the
    closest of that rank otherwise. `base` is the base pipeline's folder.
    """
    if is_adapter(new):
        _halfway_adapter(prev, new, out, share)
        return
    file = _full_file(new)
    part = file.parent.name
    before = _read_all(_full_file(prev).parent if prev else base / part)
    after = _read(file)
    if before.keys() != after.keys():
        raise DataError(f"cannot go halfway: {prev or base} and {new} are of different models")
    mixed = {k: torch.lerp(before[k].double(), w.double(), share).to(w.dtype) for k, w in after.items()}
    _write_full(mixed, json.loads((file.parent / "config.json").read_text()), out / part)


def _halfway_adapter(prev: Path | None, new: Path, out: Path, share: float) -> None:
    weights, shape, part = read_adapter(new)
    ours = adapters.pairs(weights)
    earlier, old_shape, _ = read_adapter(prev) if prev else ({}, shape, part)
    theirs = adapters.pairs(earlier)
    if theirs and theirs.keys() != ours.keys():
        raise DataError(f"cannot go halfway: adapters {prev} and {new} sit on different modules")
    result: Weights = {}
    for name, (a, b) in ours.items():
        terms = [(share, a, b, shape)]
        if name in theirs:
            terms.insert(0, (1 - share, *theirs[name], old_shape))
        new_a, new_b = adapters.refactor(terms, shape)
        result |= {f"{name}.lora_A.weight": new_a, f"{name}.lora_B.weight": new_b}
    _write_adapter(result, shape, part, out)


def export_pipeline(base: Path, checkpoint: Path | None, out: Path) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained` opens, with the checkpoint in it.

    Full weights take the base's place. An adapter is added into the weights, in the base's dtype,
    and also lies beside them as its own file, for `load_lora_weights` on the untouched base.
    Variants (fp16) and weights that are not safetensors stay behind.
    """
    if out.exists() and any(out.iterdir()):
        raise CannotCreate(f"export folder {out} is not empty: name a new one")
    if not (base / "model_index.json").is_file():
        raise NotFoundError(f"model folder {base} has no model_index.json: give a diffusers folder")
    for source in sorted(base.rglob("*")):
        if source.is_file() and _belongs(source):
            target = out / source.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    if checkpoint is None:
        return
    if is_adapter(checkpoint):
        shutil.copyfile(checkpoint / ADAPTER, out / ADAPTER)
        _fuse(out, checkpoint)
        return
    part = _full_file(checkpoint).parent
    shutil.rmtree(out / part.name)
    shutil.copytree(part, out / part.name)


def _belongs(source: Path) -> bool:
    if source.suffix == ".safetensors":
        return source.name.count(".") == 1  # model.fp16.safetensors is a variant
    return source.suffix not in {".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".pb"}


def _fuse(pipeline: Path, checkpoint: Path) -> None:
    """Add an adapter's dense changes to the weight files of a pipeline folder, in place."""
    weights, shape, part = read_adapter(checkpoint)
    changes = {f"{name}.weight": ab for name, ab in adapters.pairs(weights).items()}
    for path in sorted((pipeline / part).glob("*.safetensors")):
        content = _read(path)
        for name in changes.keys() & content.keys():
            a, b = changes.pop(name)
            weight = content[name]
            content[name] = (weight.double() + adapters.dense(a, b, shape)).to(weight.dtype)
        save_file(content, path, metadata={"format": "pt"})
    if changes:
        raise DataError(f"adapter {checkpoint} does not fit {pipeline}: no {min(changes)}")


def _write_adapter(weights: Weights, shape: adapters.Shape, part: str, folder: Path) -> None:
    alpha = int(shape.alpha) if shape.alpha == int(shape.alpha) else shape.alpha
    facts = {"r": shape.rank, "lora_alpha": alpha, "target_modules": shape.targets}
    packed = json.dumps({f"{part}.{k}": v for k, v in facts.items()}, sort_keys=True)
    named = {f"{part}.{k}": w for k, w in weights.items()}
    _write(named, folder / ADAPTER, {METADATA: packed})


def _write_full(weights: Weights, config: dict[str, Any], folder: Path) -> None:
    _write(weights, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write(weights: Weights, path: Path, metadata: dict[str, str]) -> None:
    bad = [k for k, w in weights.items() if not torch.isfinite(w).all()]
    if bad:
        raise RsiError(f"refusing to write {path.name}: weight {bad[0]} is not finite")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: weights[k].cpu().contiguous() for k in sorted(weights)}, path, metadata=metadata)


def _read(path: Path) -> Weights:
    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise NotFoundError(f"no weights at {path}") from None
    except SafetensorError as error:
        raise DataError(f"{path} is not a whole safetensors file: {error}") from error


def _read_all(folder: Path) -> Weights:
    """The weights of one pipeline part, which may lie in several files."""
    weights: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        if _belongs(path):
            weights.update(_read(path))
    return weights


def _full_file(folder: Path) -> Path:
    for part in PARTS:
        if (folder / part / WEIGHTS).is_file():
            return folder / part / WEIGHTS
    raise NotFoundError(f"checkpoint {folder} has neither {ADAPTER} nor unet/{WEIGHTS}")
