"""Each reason to drop a prompt, the guarantees of `construct`, and the choice it makes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rsi_jobs.errors import ConfigError
from rsi_jobs.prompts.clarity import clarity, tidy
from rsi_jobs.prompts.filters import allot, construct, specificity, statement
from rsi_jobs.prompts.settings import REASONS, Filtered, FilterSettings
from rsi_jobs.prompts.sources import RawPrompt, draw, shapes_key

ON = FilterSettings()
OFF = FilterSettings(clarity=False, specificity=False, diversity=False)
SHAPES = FilterSettings(max_objects=2)

# (reason, what it must drop, its nearest innocent neighbour)
CLARITY = [
    ("unreadable", "a red \x07 ball on grass", "a red ball on grass"),
    ("unreadable", "a red \ufffd ball on grass", "a red café on a beach"),
    ("unreadable", "一只红色的猫 坐在桌子上 cat", "a red São Paulo tram at night"),
    ("unreadable", "@@@ ### $$$ %%% ball", "a red & blue ball, at night!"),
    ("url", "a red ball, see https://example.com/a", "a red ball by a spider web"),
    ("url", "a red ball www.balls.example", "a red ball worth 2.5 dollars"),
    ("url", "a red ball from ball.com", "a red ball on U.S. 101"),
    ("markup", "<b>a red ball</b> on grass", "a red ball < a blue one"),
    ("markup", "a (red ball:1.3) on grass", "farm animals (cows, sheep) on grass"),
    ("markup", "a red ball on grass --ar 16:9", "a red ball on well-kept grass"),
    ("markup", "1. a red ball on grass", "1 red ball on grass"),
    ("markup", "# a red ball on grass", "a player in a #1 shirt on grass"),
    ("markup", "Prompt: a red ball on grass", "prompt waiters in a red hall"),
    ("text rendering", "a red sign with 'STOP' on it", "the dogs' red bowl and the cats' toys"),
    ("text rendering", 'a wall, "be kind" in red', "a wall in red, a kind man before it"),
    ("text rendering", "the word hello on a red wall", "a crossword on a red table"),
    ("text rendering", "a red sign that says hello", "a cat reading a red newspaper"),
    ("text rendering", "equations written on a black board", "a red typewriter on a black board"),
    ("instruction", "a red ball please", "a pleased boy with a red ball"),
    ("instruction", "Describe a red ball on grass", "a scribe and a red ball on grass"),
    ("instruction", "a red ball. Make it large", "a red ball. A maker of toys on grass"),
    ("question", "can you draw a red ball", "a can of red paint on grass"),
    ("question", "a red ball on grass?", "a red ball on grass!"),
    ("question", "what a red ball looks like", "somewhat red balls on grass"),
    ("negation", "a red car with no windows", "a red car with a knot of rope"),
    ("negation", "a ball that isn't red on grass", "a red ball in a tin on grass"),
    ("negation", "a red street without cars", "a red street within walls"),
    ("too short", "red ball", "a red ball"),
    ("abstract", "the meaning of life", "the red mane of a lion"),
    ("abstract", "hope, justice and a ball", "hope for three red balls, a cat and a dog"),
    ("contradiction", "a red blue ball on grass", "a red and blue ball on grass"),
    ("contradiction", "a red small blue ball", "a woman with red hair and blue eyes"),
    ("contradiction", "a scarlet blue ball on grass", "a scarlet red ball on grass"),
    ("contradiction", "a large small red ball", "a large red ball, a small red ball"),
    ("contradiction", "a red ball that is blue", "a red ball that is large"),
    ("contradiction", "a red ball above itself", "a red rope wrapped around itself"),
    ("contradiction", "a ball above and below a box", "a ball above and next to a box"),
    ("contradiction", "the red ball behind the red ball", "a red ball behind a red ball"),
]

SPECIFICITY = [
    ("vague", "a very special thing on a red table", "a very special vase on a red table"),
    ("vague", "some kind of stuff in a forest", "some kind of owl in a forest"),
    ("vague", "a chair for people", "a wooden chair on grass"),
    ("vague", "a robot cooking", "a robot cooking an egg"),
    (
        "overloaded",
        "a cat, a dog, a cow, a pig, a hen, a fox, an owl, a bat and a rat on red sand",
        "a cat, a dog, a cow, a pig, a hen, a fox, an owl, a bat on red sand",
    ),
]


@pytest.mark.parametrize(("reason", "bad", "good"), CLARITY, ids=lambda text: str(text)[:30])
def test_clarity_tells_bad_from_its_neighbour(reason: str, bad: str, good: str) -> None:
    verdicts = clarity([bad, good], ON, 77)
    assert [verdict.reason for verdict in verdicts] == [reason, ""], verdicts
    assert verdicts[0].detail


@pytest.mark.parametrize(("reason", "bad", "good"), SPECIFICITY)
def test_specificity_tells_bad_from_its_neighbour(reason: str, bad: str, good: str) -> None:
    verdicts = specificity([bad, good], ON)
    assert [verdict.reason for verdict in verdicts] == [reason, ""], verdicts
    assert verdicts[0].detail
    assert not clarity([bad, good], ON, 77)[0].reason, "clarity would drop it first"


def test_too_long_is_judged_by_the_readers_own_tokens() -> None:
    prompt = "a red ball on green grass"
    counts = {"words": lambda text: len(text.split()) + 2}
    assert clarity([prompt], ON, 7, counts["words"])[0] == ("too long", "8 of 7 tokens")
    assert clarity([prompt], ON, 8, counts["words"])[0].reason == ""
    assert clarity([prompt], ON, 7)[0].reason == "too long"
    assert clarity([prompt], ON, 8)[0].reason == ""


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("Generate an image of a red ball", "a red ball"),
        ("please draw me a red ball", "a red ball"),
        ("Create a picture showing two red balls", "two red balls"),
        ("Imagine a red ball", "a red ball"),
        ("draw a watercolor of a cat", "a watercolor of a cat"),
        ('"A red ball on grass."', "A red ball on grass."),
        ("a\n red\tball  ", "a red ball"),
        # No verb: these begin with the noun.
        ("sketch of a red ball", "sketch of a red ball"),
        ("paint splashes on a wall", "paint splashes on a wall"),
        ("show horses in a ring", "show horses in a ring"),
        ('"go" on a red sign, and "stop"', '"go" on a red sign, and "stop"'),
    ],
)
def test_tidy_takes_off_only_what_is_around_the_caption(prompt: str, wanted: str) -> None:
    assert tidy(prompt) == wanted


def run(prompts: list[str], settings: FilterSettings = ON, **given: Any) -> list[Filtered]:
    arguments: dict[str, Any] = {
        "n": len(prompts), "earlier": [], "evaluation": [], "window": 77, **given
    }  # fmt: skip
    return construct([RawPrompt(p) for p in prompts], settings=settings, **arguments)


def reasons(rows: list[Filtered]) -> list[str]:
    return [row.reason for row in rows]


LONG = "an oil painting of a raccoon wearing formal clothes and holding a cane in a red hall"
NEAR = LONG.replace("cane", "vase")
FAR = "an oil painting of two owls sitting on a blue boat under a bridge at night"


def test_duplicates_and_near_duplicates_within_a_round() -> None:
    rows = run([LONG, LONG.upper() + "!", NEAR, FAR, "Draw " + LONG])
    assert reasons(rows) == ["", "duplicate", "near duplicate", "", "duplicate"]
    assert rows[2].detail == LONG
    assert rows[2].nearest > 0.7
    assert rows[3].nearest < 0.3


def test_a_dropped_prompt_drops_no_other() -> None:
    assert reasons(run([LONG + " with no hat", LONG])) == ["negation", ""]


@pytest.mark.parametrize("where", ["earlier", "evaluation"])
def test_known_prompts_do_not_come_back(where: str) -> None:
    name = {"earlier": "earlier round", "evaluation": "evaluation prompt"}[where]
    known: dict[str, Any] = {where: [LONG]}
    rows = run([LONG, NEAR, FAR], **known)
    assert reasons(rows) == [name, name, ""]
    # With all filters off the words themselves are still refused, in any spelling.
    rows = run([LONG + " !", NEAR, FAR, f"draw {LONG}"], OFF, **known)
    assert reasons(rows) == [name, "", "", name]


def test_an_evaluation_prompt_that_is_an_earlier_one_too_is_called_so() -> None:
    assert reasons(run([LONG], earlier=[LONG], evaluation=[LONG])) == ["evaluation prompt"]


SCENE = "a large red circle above a small blue square on white"
REWORDED = "white background, a picture of a small blue square below a large red circle"
OTHER = "a large red circle above a small blue ring on white"


def test_a_scene_is_known_in_other_words_and_one_word_makes_another_scene() -> None:
    rows = run([SCENE, REWORDED, OTHER], SHAPES, key=shapes_key)
    assert reasons(rows) == ["", "duplicate", ""]
    for settings in (SHAPES, OFF):
        rows = run([REWORDED, OTHER], settings, key=shapes_key, evaluation=[SCENE])
        assert reasons(rows) == ["evaluation prompt", ""]
    assert reasons(run([REWORDED], SHAPES, key=shapes_key, earlier=[SCENE])) == ["earlier round"]
    assert reasons(run([REWORDED], OFF, key=shapes_key, earlier=[SCENE])) == [""]


def test_off_vocabulary_belongs_to_clarity_and_to_a_domain() -> None:
    dragon = "a majestic dragon over a misty castle"
    assert reasons(run([dragon], key=shapes_key)) == ["off vocabulary"]
    assert reasons(run([dragon])) == [""]
    assert reasons(run([dragon], replace(ON, clarity=False), key=shapes_key)) == [""]


@pytest.mark.parametrize(
    ("off", "prompt", "reason"),
    [
        ("clarity", "a red car with no windows", "negation"),
        ("specificity", "a special thing on a red table", "vague"),
        ("diversity", LONG, "duplicate"),
    ],
)
def test_each_filter_can_be_switched_off(off: str, prompt: str, reason: str) -> None:
    prompts = [LONG, prompt]
    assert reasons(run(prompts)) == ["", reason]
    without: dict[str, Any] = {off: False}
    assert reasons(run(prompts, replace(ON, **without))) == ["", ""]


def test_without_diversity_the_first_n_are_kept_and_the_text_is_untouched() -> None:
    rows = run(["draw a cat", "x", FAR], OFF, n=2)
    assert [(row.prompt, row.kept, row.reason) for row in rows] == [
        ("draw a cat", True, ""), ("x", True, ""), (FAR, False, "quota")
    ]  # fmt: skip


def untidy(n: int, seed: int) -> list[RawPrompt]:
    return draw("shapes", n, np.random.default_rng(seed), {})


def shapes_round(raw: list[RawPrompt], n: int, settings: FilterSettings = SHAPES) -> list[Filtered]:
    evaluation = [row.prompt for row in untidy(50, 99)]
    return construct(
        raw, n=n, settings=settings, earlier=[], evaluation=evaluation, window=35, key=shapes_key
    )


def test_a_round_of_the_untidy_source() -> None:
    raw = untidy(300, 3)
    rows = shapes_round(raw, 100)
    assert rows == shapes_round(raw, 100)
    assert [tidy(row.prompt) for row in raw] == [row.prompt for row in rows]
    assert sum(row.kept for row in rows) == 100
    assert all(row.kept == (row.reason == "") for row in rows)
    keys = [shapes_key(row.prompt) for row in rows if row.kept]
    assert None not in keys
    assert len(set(keys)) == 100
    assert {
        "too short",
        "negation",
        "contradiction",
        "overloaded",
        "duplicate",
        "off vocabulary",
    } < {row.reason for row in rows}


def test_the_choice_does_not_depend_on_the_order_of_distinct_prompts() -> None:
    raw = [row for row in untidy(300, 4) if shapes_key(row.prompt)]
    raw = list({shapes_key(row.prompt): row for row in raw}.values())
    shuffled = [raw[i] for i in np.random.default_rng(0).permutation(len(raw))]
    one, two = ({r.prompt for r in shapes_round(rows, 40) if r.kept} for rows in (raw, shuffled))
    assert one == two
    assert len(one) == 40


def test_fewer_than_n_is_said_and_counted() -> None:
    rows = run([LONG, NEAR, FAR, "bond"], n=3)
    assert [row.kept for row in rows] == [True, False, True, False]
    assert statement(rows, 3) == (
        "2 of 4 prompts kept, 1 fewer than the 3 wanted; dropped: 1 too short, 1 near duplicate"
    )
    assert statement(run([FAR]), 1) == "1 of 1 prompts kept"
    assert statement(run([]), 5) == "0 of 0 prompts kept, 5 fewer than the 5 wanted"


def test_the_farthest_are_chosen() -> None:
    # Two groups of alike prompts and a lone one: three places take one of each.
    loose = replace(ON, max_similarity=1.0)
    rows = run([LONG, NEAR, FAR, FAR.replace("owls", "cats"), "a red ball on a sunny beach"], loose, n=3)
    assert sum(row.kept for row in rows[:2]) == 1
    assert sum(row.kept for row in rows[2:4]) == 1
    assert rows[4].kept
    # What lies next to an earlier round's prompt comes last.
    rows = run([LONG, FAR], loose, n=1, earlier=[NEAR])
    assert [row.kept for row in rows] == [False, True]


COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
ANIMALS = ("cats", "owls", "horses", "lobsters", "squirrels", "elephants", "pandas", "kangaroos")


@pytest.mark.parametrize(
    ("quota", "wanted"),
    [("source", {"a": 16, "b": 3, "c": 1}), ("equal", {"a": 10, "b": 8, "c": 2})],
)
def test_quotas(quota: Any, wanted: dict[str, int]) -> None:
    words = [f"two {c} {x} {place}" for c in COLOURS for x in ANIMALS for place in ("at dawn",)]
    categories = ["a"] * 38 + ["b"] * 8 + ["c"] * 2
    raw = [RawPrompt(w, c) for w, c in zip(words, categories, strict=True)]
    settings = replace(ON, quota=quota, max_similarity=1.0)
    rows = construct(raw, n=20, settings=settings, earlier=[], evaluation=[], window=77)
    assert Counter(row.category for row in rows if row.kept) == wanted


def test_allot_gives_all_and_to_none_more_than_it_has() -> None:
    available = Counter(a=5, b=1, c=100)
    assert allot(available, 106, "equal") == available
    assert allot(available, 9, "equal") == {"a": 4, "b": 1, "c": 4}
    assert allot(available, 10, "source") == {"c": 10}
    assert allot(available, 11, "source") == {"a": 1, "c": 10}


@pytest.mark.parametrize(
    ("field", "value"),
    [("min_words", 0), ("max_objects", 0), ("min_details", -1), ("min_concrete", 1.5),
     ("max_similarity", -0.1), ("quota", "fair")],
)  # fmt: skip
def test_settings_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"prompts.{field} is {value!r}"):
        FilterSettings(**{field: value})


def test_every_reason_has_a_case_here() -> None:
    tested = {row[0] for row in (*CLARITY, *SPECIFICITY)} | {
        "too long", "off vocabulary", "evaluation prompt", "earlier round", "duplicate",
        "near duplicate", "quota",
    }  # fmt: skip
    assert tested == set(REASONS)


def test_a_prompt_that_would_be_cut_is_dropped_whatever_is_switched_off() -> None:
    off = FilterSettings(clarity=False, specificity=False, diversity=False)
    raw = [RawPrompt("a red circle " * 5), RawPrompt("a red circle")]
    rows = construct(raw, n=2, settings=off, earlier=[], evaluation=[], window=10)
    assert reasons(rows) == ["too long", ""]
