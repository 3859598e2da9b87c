"""LoRA adapters on a network: attach, read, switch off, and the dense change they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from rsi_jobs.errors import DataError

ATTENTION = ("to_k", "to_out.0", "to_q", "to_v")
NAME = "default"


@dataclass(frozen=True)
class Shape:
    """An adapter's form: its change to a weight is alpha / rank times B A.

    `targets` are module names, or the ends of them, that the adapter sits on.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ATTENTION

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(sorted(self.targets)))  # a set, in fixed order


def attach(network: Any, shape: Shape, *, seed: int) -> None:
    """Put a fresh adapter on `network`: B zero, A uniform from `seed`, the same on every device."""
    kind: Any = LoraConfig  # which takes a fractional alpha, but does not say so
    config = kind(r=shape.rank, lora_alpha=shape.alpha, target_modules=list(shape.targets))
    network.add_adapter(config, NAME)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in parameters(network).items():
        weight.data = weight.data.float()  # training state stays float32 on a bfloat16 base
        if ".lora_A." in name:
            bound = weight[0].numel() ** -0.5
            drawn = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
            weight.data.copy_(drawn)


def shape_of(network: Any) -> Shape | None:
    """The shape of the adapter on `network`, None without one."""
    config = getattr(network, "peft_config", {}).get(NAME)
    if config is None:
        return None
    return Shape(config.r, config.lora_alpha, tuple(config.target_modules))


def parameters(network: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's weights by the names they have in a file, sorted: `….to_q.lora_A.weight`."""
    found = {
        name.replace(f".{NAME}.", "."): weight
        for name, weight in network.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    return dict(sorted(found.items()))


def load_weights(network: Any, weights: dict[str, torch.Tensor]) -> None:
    """Copy weights into the attached adapter; DataError unless names and shapes match exactly."""
    own = parameters(network)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise DataError(f"the adapter does not fit this model: {len(odd)} odd names, first {odd[0]}")
    for name, weight in own.items():
        if weight.shape != weights[name].shape:
            raise DataError(
                f"adapter weight {name} has shape {tuple(weights[name].shape)}: "
                f"this model takes {tuple(weight.shape)}"
            )
        weight.data.copy_(weights[name])


@contextmanager
def disabled(network: Any) -> Iterator[None]:
    """Within, the network predicts as the base it sits on. Leaves gradients as they were."""
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for name, weight in network.named_parameters():
            weight.requires_grad_(name in trained)


def pairs(weights: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of every adapted module, by its name."""
    names = [name.removesuffix(".lora_A.weight") for name in weights if ".lora_A." in name]
    return {n: (weights[f"{n}.lora_A.weight"], weights[f"{n}.lora_B.weight"]) for n in names}


def dense(a: torch.Tensor, b: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The change of the weight itself, in float64, in the weight's own shape (linear or conv).

    A is (rank, in, ...), B is (out, rank, ...).
    """
    flat = b.double().flatten(1) @ a.double().flatten(1)
    return (shape.alpha / shape.rank) * flat.reshape(b.shape[0], *a.shape[1:])


def refactor(
    terms: Sequence[tuple[float, torch.Tensor, torch.Tensor, Shape]], shape: Shape
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best A, B of `shape` for a sum of share * (alpha / rank) B A (Eckart-Young).

    The sum's rank is at most the sum of the ranks, so thin QR of the stacked factors comes first
    and the SVD is of a small matrix; all in float64.
    """
    left = torch.cat([s * f.alpha / f.rank * b.double().flatten(1) for s, _, b, f in terms], 1)
    right = torch.cat([a.double().flatten(1) for _, a, _, _ in terms], 0)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, sizes, v = torch.linalg.svd(r_left @ r_right.T)
    keep = min(shape.rank, len(sizes))
    root = (sizes[:keep] * shape.rank / shape.alpha).sqrt()
    new_b = (q_left @ u[:, :keep]) * root
    new_a = root[:, None] * (v[:keep] @ q_right.T)
    _, like_a, like_b, _ = terms[-1]
    pad = shape.rank - keep  # a layer narrower than the rank: the rest stays zero
    new_b = torch.nn.functional.pad(new_b, (0, pad))
    new_a = torch.nn.functional.pad(new_a, (0, 0, 0, pad))
    return (
        new_a.reshape(shape.rank, *like_a.shape[1:]).float().contiguous(),
        new_b.reshape(like_b.shape[0], shape.rank, *like_b.shape[2:]).float().contiguous(),
    )
