"""A tiny, random Stable Diffusion: every part of the real one, small enough for unit tests."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("a", "large", "small", "red", "green", "blue", "circle", "square", "above", "on", "white")
WINDOW = 16  # tokens, with the start and the end


def tokenizer() -> CLIPTokenizer:
    """Letters and a few whole words, with the merges that make them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[0]} {pieces[1]}"
            pieces[:2] = ["".join(pieces[:2])]
            if merge not in merges:
                merges.append(merge)
                vocab.append(pieces[0])
    vocab += ["<|startoftext|>", "<|endoftext|>"]  # the highest id last: CLIP pools there
    table = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    pairs = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=table, merges=pairs, model_max_length=WINDOW)


def build(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Write the pipeline (8 x 8 latents of 4 channels, 32 x 32 images) to `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer()
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=WINDOW,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            norm_num_groups=8,
            sample_size=32,
            scaling_factor=0.7,
        )
    scheduler = PNDMScheduler(  # as Stable Diffusion 1.4 ships it
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
