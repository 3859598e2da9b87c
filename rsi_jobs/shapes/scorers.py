"""Learned image-text scorers: they stand where HPSv2 and ImageReward stand, and err.

`dual` (two towers, contrastive) and `fused` (text attends to the image) are the rewards;
`heldout` also learned what extra and malformed objects look like, and serves the gate only.
Trained on renders by `python -m rsi_jobs.shapes.train scorers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import CLIPTokenizer

from rsi_jobs.shapes.models import MAX_TOKENS, WEIGHTS, load_tokenizer
from rsi_jobs.shapes.render import Image
from rsi_jobs.shapes.scene import FACTS
from rsi_jobs.shapes.training import to_signal

BATCH: Final = 256  # fixed, so that a score does not depend on how many were asked for
Scores = npt.NDArray[np.float32]


@lru_cache(maxsize=1)
def _tokenizer() -> CLIPTokenizer:
    return load_tokenizer()


def text_ids(prompts: Sequence[str], tokenizer: CLIPTokenizer | None = None) -> torch.Tensor:
    """Token ids (n, 24) int64, padded and truncated."""
    batch = (tokenizer or _tokenizer())(
        list(prompts),
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    ids: torch.Tensor = batch.input_ids
    return ids


class Block(nn.Module):
    """A transformer block; with `memory` the attention also reads a second sequence."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(n, t, width), mask (n, 1, 1, keys) true where a key may be read."""
        h = self.norm1(x)
        keys = h if memory is None else torch.cat([h, memory], 1)

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        k, v = self.kv(keys).chunk(2, -1)
        y = functional.scaled_dot_product_attention(split(self.q(h)), split(k), split(v), attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class TextTower(nn.Module):
    """Token ids (n, 24) to states (n, 24, width) and their mask (n, 24)."""

    def __init__(self, vocabulary: int, end: int, width: int, layers: int) -> None:
        super().__init__()
        self.end = end
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(MAX_TOKENS, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Padding repeats the end token: all up to the first of them is text.
        ended = (ids == self.end).long().cumsum(1)
        mask = (ended == 0) | ((ended == 1) & (ids == self.end))
        x = self.embed(ids) + self.position
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return x, mask


def mean_state(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean (n, width) of the states (n, t, width) that the mask (n, t) keeps."""
    share = mask.float() / mask.sum(1, keepdim=True)
    return (x * share[..., None]).sum(1)


def image_tower(widths: tuple[int, int, int, int]) -> nn.Sequential:
    """Images (n, 3, 32, 32) to features (n, widths[-1], 4, 4)."""
    layers: list[nn.Module] = []
    before = 3
    for width, stride in zip(widths, (2, 2, 1, 2), strict=True):
        layers += [nn.Conv2d(before, width, 3, stride, 1), nn.GroupNorm(4, width), nn.SiLU()]
        before = width
    return nn.Sequential(*layers)


class Scorer(nn.Module):
    """What all scorers share: batches in, arrays out."""

    def embed(self, signal: torch.Tensor) -> torch.Tensor:
        """Normalised features (n, d) of images (n, 3, 32, 32) in -1..1."""
        raise NotImplementedError

    def match(self, signal: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Scores (n,) of images and token ids (n, 24)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.inference_mode()
    def embed_image(self, images: Image) -> Scores:
        """Normalised features (n, d) float32 of images (n, 32, 32, 3) uint8."""
        parts = [self.embed(to_signal(b).to(self.device)) for b in _batches(images)]
        out: Scores = torch.cat(parts).float().cpu().numpy()
        return out

    @torch.inference_mode()
    def score(self, images: Image, prompts: Sequence[str]) -> Scores:
        """How well each image (n, 32, 32, 3) uint8 matches its prompt: (n,) float32."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        if len(images) == 0:
            return np.zeros(0, np.float32)
        ids = text_ids(prompts).to(self.device).split(BATCH)
        parts = [
            self.match(to_signal(b).to(self.device), i) for b, i in zip(_batches(images), ids, strict=True)
        ]
        out: Scores = torch.cat(parts).float().cpu().numpy()
        return out


def _batches(images: Image) -> list[Image]:
    return [images[i : i + BATCH] for i in range(0, max(1, len(images)), BATCH)]


class DualTower(Scorer):
    """Image and caption as two unit vectors; the score is their cosine."""

    def __init__(self, vocabulary: int, end: int, facts: int, width: int = 128) -> None:
        super().__init__()
        self.text = TextTower(vocabulary, end, 64, 2)
        self.image = image_tower((24, 48, 64, 96))
        self.image_out = nn.Linear(96 * 16, width)
        self.text_out = nn.Linear(64, width)
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        # Reading off the facts is an extra task in training; scoring does not use it.
        self.facts = nn.Linear(width, facts)
        self.text_facts = nn.Linear(width, facts)

    def embed_raw(self, signal: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.image_out(self.image(signal).flatten(1))
        return out

    def embed(self, signal: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.embed_raw(signal), dim=-1)

    def read_raw(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.text(ids)
        at = (ids == self.text.end).int().argmax(1)
        out: torch.Tensor = self.text_out(states[torch.arange(len(ids), device=ids.device), at])
        return out

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Normalised features (n, d) of token ids (n, 24)."""
        return functional.normalize(self.read_raw(ids), dim=-1)

    def match(self, signal: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return (self.embed(signal) * self.read(ids)).sum(-1)


class FusedRegressor(Scorer):
    """The caption's words look at the image's patches; the score is a match logit."""

    def __init__(self, vocabulary: int, end: int, facts: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.text = TextTower(vocabulary, end, width, 1)
        self.image = image_tower((24, 48, 64, width))
        self.place = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.facts = nn.Linear(16 * width, facts)
        self.text_facts = nn.Linear(width, facts)

    def patches(self, signal: torch.Tensor) -> torch.Tensor:
        """Image features (n, 16, width)."""
        out: torch.Tensor = self.image(signal).flatten(2).transpose(1, 2)
        return out

    def embed(self, signal: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.patches(signal).flatten(1), dim=-1)

    def fuse(self, patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits (n,) from patches (n, 16, width) and token ids (n, 24)."""
        return self.fuse_read(patches, *self.text(ids))

    def fuse_read(self, patches: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits (n,) from patches and a caption's states (n, 24, width) and mask."""
        memory = patches + self.place
        both = torch.cat([mask, mask.new_ones(len(x), 16)], 1)[:, None, None, :]
        for block in self.blocks:
            x = block(x, both, memory)
        out: torch.Tensor = self.out(mean_state(x, mask)).squeeze(-1)
        return out

    def match(self, signal: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.fuse(self.patches(signal), ids)


class HeldoutScorer(FusedRegressor):
    """The gate's judge: wider and deeper, and it has seen extra and malformed objects."""

    def __init__(self, vocabulary: int, end: int, facts: int) -> None:
        super().__init__(vocabulary, end, facts, width=80, layers=3)


KINDS: Final[dict[str, type[DualTower] | type[FusedRegressor]]] = {
    "dual": DualTower,
    "fused": FusedRegressor,
    "heldout": HeldoutScorer,
}


def build_scorer(name: str, tokenizer: CLIPTokenizer) -> DualTower | FusedRegressor:
    """An untrained scorer."""
    if name not in KINDS:
        raise ValueError(f"scorer {name!r} is none of {sorted(KINDS)}")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return KINDS[name](len(tokenizer), end, sum(FACTS))


def load_scorer(name: str, folder: Path = WEIGHTS) -> DualTower | FusedRegressor:
    """A trained scorer, "dual", "fused" or "heldout", ready for inference."""
    scorer = build_scorer(name, load_tokenizer(folder / "tokenizer"))
    scorer.load_state_dict(load_file(folder / f"scorer_{name}.safetensors"))
    return scorer.eval().requires_grad_(False)
