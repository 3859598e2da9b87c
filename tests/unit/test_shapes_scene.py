"""Captions and scenes are inverse to each other; the tokenizer and the source know them."""

import numpy as np
import pytest

from rsi_jobs.shapes.models import MAX_TOKENS, known_words, load_tokenizer, write_tokenizer
from rsi_jobs.shapes.scene import (
    CHANGES,
    N_TEMPLATES,
    PLACES,
    RELATIONS,
    Scene,
    Thing,
    change_one,
    count_scenes,
    parse,
    random_caption,
    random_scene,
    random_scenes,
)
from rsi_jobs.shapes.source import VAGUE, untidy_prompts

RED = Thing("large", "red", "circle")
BLUE = Thing("small", "blue", "square")


def test_every_template_parses_back() -> None:
    scenes = [Scene((RED, BLUE), r, "white") for r in RELATIONS]
    scenes += [Scene((RED,), place, "pink") for place in PLACES]
    for scene in scenes:
        captions = {scene.caption(t, p) for t in range(N_TEMPLATES) for p in range(2)}
        assert len(captions) >= N_TEMPLATES
        assert all(parse(caption) == scene for caption in captions)


def test_both_wordings_of_a_relation_are_one_scene() -> None:
    one = parse("a large red circle above a small blue square on white")
    other = parse("white background, a small blue square below a large red circle")
    swapped = parse("a small blue square above a large red circle on white")
    assert one is not None
    assert other is not None
    assert swapped is not None
    assert one.key() == other.key() != swapped.key()


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a thing",
        "a red circle",
        "a large red circle in the centre",
        "white background, a large red circle in the centre on white",
        "a large red circle above itself on white",
        "a large red circle above a small blue square and a small red ring on white",
        *VAGUE,
    ],
)
def test_what_is_no_caption_parses_to_nothing(prompt: str) -> None:
    assert parse(prompt) is None


def test_a_change_is_always_a_change() -> None:
    rng = np.random.default_rng(0)
    for kind in CHANGES:
        for _ in range(100):
            scene = random_scene(rng)
            changed = change_one(scene, rng, (kind,))
            assert changed.key() != scene.key()
            assert parse(random_caption(changed, rng)) is not None


def test_scenes_are_many_distinct_and_exclude() -> None:
    assert count_scenes() >= 40_000
    first = {s.key() for s in random_scenes(np.random.default_rng(1), 500)}
    # The same generator would draw the same again.
    again = {s.key() for s in random_scenes(np.random.default_rng(1), 500, exclude=first)}
    assert len(first) == len(again) == 500
    assert not first & again
    with pytest.raises(ValueError, match="53640"):
        random_scenes(np.random.default_rng(1), 40_000)


def test_the_source_is_untidy_and_repeatable() -> None:
    prompts = untidy_prompts(np.random.default_rng(2), 1000)
    assert prompts == untidy_prompts(np.random.default_rng(2), 1000)
    scenes = [parse(p) for p in prompts]
    good = [s for s in scenes if s is not None]
    assert 600 < len(good) < 850
    assert len({s.key() for s in good}) < len(good), "no duplicates in other words"
    assert any("http" in p for p in prompts)
    assert any(p.endswith("?") for p in prompts)
    assert any(len(p.split()) > 40 for p in prompts)


def test_tokenizer_knows_each_word_and_takes_any_text(tmp_path) -> None:  # type: ignore[no-untyped-def]
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert all(len(tokenizer(w).input_ids) == 3 for w in known_words())
    rng = np.random.default_rng(3)
    for _ in range(200):
        caption = random_caption(random_scene(rng), rng)
        ids = tokenizer(caption).input_ids
        assert len(ids) <= MAX_TOKENS
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.replace(" ,", ",").strip() == caption
    strange = tokenizer("Ein größerer дракон 龙 🐉").input_ids
    assert tokenizer.unk_token_id not in strange[1:-1]
