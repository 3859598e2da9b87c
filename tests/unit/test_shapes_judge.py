"""The exact judge: exact on renders, tolerant of a decoder, blind to no hallucination."""

import numpy as np
import pytest

from rsi_jobs.shapes.judge import judge, judge_batch, read_batch, scene_of
from rsi_jobs.shapes.render import PALETTE, Image, render, render_batch
from rsi_jobs.shapes.scene import (
    CHANGES,
    Scene,
    Thing,
    change_one,
    parse,
    random_caption,
    random_scenes,
)

N = 2000
PROMPT = "a large red circle above a small blue square on white"


@pytest.fixture(scope="module")
def renders() -> tuple[list[Scene], list[str], Image]:
    rng = np.random.default_rng(20)
    scenes = random_scenes(rng, N)
    return scenes, [random_caption(s, rng) for s in scenes], render_batch(scenes, rng)


def _image(fault: str | None = None, seed: int = 0) -> Image:
    scene = parse(PROMPT)
    assert scene is not None
    return render(scene, np.random.default_rng(seed), fault)


def test_right_renders_are_right_and_read_back(
    renders: tuple[list[Scene], list[str], Image],
) -> None:
    scenes, prompts, images = renders
    assert np.mean([v.right for v in judge_batch(images, prompts)]) >= 0.995
    shown = [scene_of(r) for r in read_batch(images)]
    same = [a is not None and a.key() == b.key() for a, b in zip(shown, scenes, strict=True)]
    assert np.mean(same) >= 0.995


@pytest.mark.parametrize("kind", CHANGES)
def test_one_change_is_wrong(kind: str, renders: tuple[list[Scene], list[str], Image]) -> None:
    scenes, _, images = renders
    rng = np.random.default_rng(21)
    said = [random_caption(change_one(s, rng, (kind,)), rng) for s in scenes[:500]]
    assert np.mean([v.right for v in judge_batch(images[:500], said)]) <= 0.01


@pytest.mark.parametrize("fault", ["extra", "malformed"])
def test_hallucinations_are_wrong(fault: str, renders: tuple[list[Scene], list[str], Image]) -> None:
    scenes, prompts, _ = renders
    rng = np.random.default_rng(22)
    images = render_batch(scenes[:1000], rng, [fault] * 1000)
    verdicts = judge_batch(images, prompts[:1000])
    assert np.mean([v.right for v in verdicts]) <= 0.01
    counted = [v.extra == 1 if fault == "extra" else v.malformed >= 1 for v in verdicts]
    assert np.mean(counted) >= 0.95


def test_a_decoder_s_blur_and_noise_are_forgiven(
    renders: tuple[list[Scene], list[str], Image],
) -> None:
    _, prompts, images = renders
    x = images[:500].astype(np.float32)
    near = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    around = sum(near[:, 1 + dy : 33 + dy, 1 + dx : 33 + dx] for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)))
    noise = np.random.default_rng(23).normal(0, 6, x.shape)
    soft = (0.6 * x + 0.1 * around + noise).clip(0, 255).astype(np.uint8)
    assert np.mean([v.right for v in judge_batch(soft, prompts[:500])]) >= 0.98


def test_hand_made_hallucinations_are_counted() -> None:
    assert judge(_image(), PROMPT).right
    extra = _image()
    corner = extra[24:31, :7]
    assert (corner == PALETTE["white"]).all()
    corner[:] = PALETTE["green"]
    verdict = judge(extra, PROMPT)
    assert not verdict.right
    assert verdict.extra == 1
    assert verdict.wrong == ("extra",)
    assert Thing("small", "green", "square") in [f.thing for f in verdict.found]

    blob = _image("malformed")
    assert judge(blob, PROMPT).malformed >= 1 or "shape" in judge(blob, PROMPT).wrong

    stain = _image()
    stain[24:31, :7] = (150, 200, 120)  # an olive that is in no palette
    verdict = judge(stain, PROMPT)
    assert not verdict.right
    assert verdict.off_palette > 0

    empty = np.full((32, 32, 3), 250, np.uint8)
    verdict = judge(empty, PROMPT)
    assert not verdict.right
    assert verdict.missing == 2
    assert verdict.extra == 0


def test_noise_is_never_right() -> None:
    rng = np.random.default_rng(24)
    images = rng.integers(0, 256, (50, 32, 32, 3), np.uint8)
    assert not any(v.right for v in judge_batch(images, [PROMPT] * 50))


def test_a_vague_prompt_is_not_judgeable() -> None:
    verdict = judge(_image(), "a thing")
    assert not verdict.right
    assert not verdict.judgeable
    assert verdict.extra == 0


def test_a_wrong_array_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        judge_batch(np.zeros((1, 16, 16, 3), np.uint8), [PROMPT])
    with pytest.raises(ValueError, match="2 images but 1"):
        judge_batch(np.zeros((2, 32, 32, 3), np.uint8), [PROMPT])
    assert judge_batch(np.zeros((0, 32, 32, 3), np.uint8), []) == []


def test_a_fault_must_be_known() -> None:
    with pytest.raises(ValueError, match="ghost"):
        _image("ghost")
