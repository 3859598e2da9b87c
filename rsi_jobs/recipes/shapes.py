"""Recipes of the shapes world. The ablations say only what they change."""

from __future__ import annotations

from typing import Any

from rsi_jobs.config import Identity


def change(identity: Identity, **sections: dict[str, Any]) -> Identity:
    """The same identity with some fields of some sections changed, and checked again."""
    body = identity.model_dump()
    for name, fields in sections.items():
        body[name] |= fields
    return Identity.model_validate(body)


def shapes() -> Identity:
    return Identity()


def no_gate() -> Identity:
    return change(shapes(), gate={"enabled": False})


def paper() -> Identity:
    return change(
        no_gate(),
        training={"replay": 0.0, "anchor": 0.0, "base_penalty": 0.0},
        sampling={"guidance_decay": 1.0},
    )


def no_prompt_filter() -> Identity:
    return change(shapes(), prompts={"clarity": False, "specificity": False, "diversity": False})


def no_preference() -> Identity:
    return change(shapes(), selection={"method": "random", "margin": 0.0, "floor": 0.0})


def no_weighting() -> Identity:
    return change(shapes(), weighting={"scheme": "uniform"})


def sft() -> Identity:
    return change(
        paper(),
        prompts={"clarity": False, "specificity": False, "diversity": False},
        sampling={"candidates": 1},
        selection={"method": "first", "margin": 0.0, "floor": 0.0, "quota": False},
        weighting={"scheme": "uniform"},
    )


def oracle() -> Identity:
    return change(shapes(), rewards={"use": ("oracle",)}, selection={"margin": 0.0, "floor": 0.0})


def smoke() -> Identity:
    return change(
        shapes(),
        prompts={"raw": 72, "keep": 24},
        sampling={"candidates": 4, "steps": 4, "batch": 32},
        selection={"keep": 16},
        training={"steps": 6, "batch": 16, "checkpoint_every": 3},
        evaluation={"gate_prompts": 24, "bootstrap": 200},
    )
