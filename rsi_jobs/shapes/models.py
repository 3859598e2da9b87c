"""The networks of the shapes world, untrained: autoencoder, text model, UNet, tokenizer.

Sizes are chosen for two CPU cores: at most 40 MFLOP a UNet pass and image, at most
60 MFLOP a decode. Training from nothing is `python -m rsi_jobs.shapes.train`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rsi_jobs.shapes import scene
from rsi_jobs.shapes.source import SOURCE_WORDS

MAX_TOKENS: Final = 24
"""Our longest caption is 20 tokens; padding to 32 would cost a third more text model."""
TEXT_WIDTH: Final = 96
LATENT_CHANNELS: Final = 12
START, END = "<|startoftext|>", "<|endoftext|>"
WEIGHTS: Final = Path(__file__).parent / "weights"


def known_words() -> list[str]:
    """Every word that is one token, in a fixed order."""
    words: list[str] = []
    phrases = [p for ps in scene.RELATION_PHRASES.values() for p in ps]
    for text in (
        *scene.SHAPES,
        *scene.COLOURS,
        *scene.SIZES,
        *scene.BACKGROUNDS,
        *phrases,
        *scene.PLACE_PHRASES.values(),
        "a picture of on background ,",
        *SOURCE_WORDS,
    ):
        words += [word for word in text.split() if word not in words]
    return words


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of a word under the merges so far, in order of their rank."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    for left, right in merges:
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == (left, right):
                pieces[i : i + 2] = [left + right]
            i += 1
    return pieces


def write_tokenizer(folder: Path) -> None:
    """An ordinary CLIP tokenizer: all bytes, and merges that make each known word one token."""
    merges: list[tuple[str, str]] = []
    for word in known_words():
        # Later merges rank lower, so they never disturb a word that is already whole.
        pieces = _pieces(word, merges)
        for i in range(1, len(pieces)):
            merges.append(("".join(pieces[:i]), pieces[i]))
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [*list(dict.fromkeys(left + right for left, right in merges)), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")


def load_tokenizer(folder: Path = WEIGHTS / "tokenizer") -> CLIPTokenizer:
    """The tokenizer in a folder that `write_tokenizer` (or a pipeline) wrote."""
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(folder))
    return tokenizer


def build_autoencoder() -> AutoencoderKL:
    """An autoencoder from (n, 3, 32, 32) in -1..1 to latents (n, 12, 8, 8)."""
    return AutoencoderKL(
        block_out_channels=(12, 24, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )


def build_text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model, hidden states (n, 24, 96)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            # The default, 2, would pool at the highest token id (a legacy path).
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet on latents (n, 12, 8, 8), epsilon prediction, cross-attention at 4 x 4."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        # Four more convolutions in the middle cost a third of a pass and gain little.
        mid_block_type=None,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads (a quirk of diffusers)
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule; trailing spacing suits 10 to 16 steps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )
