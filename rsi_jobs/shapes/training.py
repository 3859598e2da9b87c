"""What the three training scripts share: device, learning rate, resuming, figures."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rsi_jobs.shapes.models import WEIGHTS


@dataclass(frozen=True)
class Place:
    """Where a training runs and keeps its state."""

    work: Path  # checkpoints, not shipped
    out: Path = WEIGHTS  # what is shipped
    device: str = "cpu"

    def checkpoint(self, name: str) -> Path:
        self.work.mkdir(parents=True, exist_ok=True)
        return self.work / f"{name}.pt"


def to_signal(images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Images (n, 32, 32, 3) uint8 to float32 (n, 3, 32, 32) in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_images(signal: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The way back from `to_signal`, clipped."""
    pixels = ((signal.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    out: npt.NDArray[np.uint8] = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return out


def cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine down to a hundredth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


@torch.no_grad()
def update_ema(ema: list[torch.Tensor], live: list[nn.Parameter], decay: float) -> None:
    torch._foreach_lerp_(ema, [p.detach() for p in live], 1 - decay)


def save_state(path: Path, state: dict[str, Any]) -> None:
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    os.replace(beside, path)


def load_state(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def replace_folder(new: Path, old: Path) -> None:
    """Put a finished folder in the place of an old one."""
    gone = old.with_name(f".{old.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    if old.exists():
        old.rename(gone)
    new.rename(old)
    shutil.rmtree(gone, ignore_errors=True)


def note(place: Place, section: str, /, **figures: Any) -> None:
    """Merge figures into one section of `<out>/figures.json`, and print them."""
    path = place.out / "figures.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything.setdefault(section, {}).update(figures)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(everything, indent=2, sort_keys=True) + "\n")
    print(time.strftime("%H:%M:%S"), section, figures, flush=True)
