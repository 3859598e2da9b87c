"""Chooses the prompts of a round: clear, specific, unlike each other, and none seen before.

`construct` runs three filters, each of which can be switched off, and says for every raw prompt
whether it was kept and, if not, which filter dropped it and why. Whatever is switched off, no
prompt of an evaluation set and no prompt of an earlier round gets through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from rsi_jobs.prompts import similarity
from rsi_jobs.prompts.clarity import clarity, overlong, tidy
from rsi_jobs.prompts.settings import PASS, REASONS, Filtered, FilterSettings, Verdict
from rsi_jobs.prompts.sources import RawPrompt
from rsi_jobs.prompts.wording import Reading, read

Key = Callable[[str], str | None]
"""What a prompt of a closed world means: equal for equal pictures, None if it is outside it."""


def construct(
    raw: Sequence[RawPrompt],
    *,
    n: int,
    settings: FilterSettings,
    earlier: Sequence[str],
    evaluation: Sequence[str],
    window: int,
    count_tokens: Callable[[str], int] | None = None,
    key: Key | None = None,
) -> list[Filtered]:
    """Filter `raw` and choose `n` prompts: one row for each raw prompt, in order.

    earlier: the prompts kept in all earlier rounds; evaluation: those of every evaluation set.
    window, count_tokens: see `clarity`. key: for a closed world; where it gives an answer it
    alone decides what is a duplicate, as one word makes another picture there.
    Exactly `n` rows are kept, or all that pass if those are fewer (`statement` says so).
    """
    texts = [tidy(r.prompt) if settings.clarity else r.prompt.strip() for r in raw]
    readings = [read(text) for text in texts]
    keys = [key(text) if key else None for text in texts]
    verdicts = [PASS] * len(raw)
    if settings.clarity:
        _note(verdicts, clarity(texts, settings, window, count_tokens, readings))
    else:  # no model is ever handed a prompt that it would cut
        _note(verdicts, overlong(texts, window, count_tokens))
    if settings.specificity:
        _note(verdicts, specificity(texts, settings, readings))
    if settings.clarity and key:
        # Last, as "vague" or "overloaded" tells more of the source than this does.
        _note(verdicts, [Verdict("off vocabulary") if k is None else PASS for k in keys])
    _note(verdicts, seen_before(texts, earlier, evaluation, key, rewordings=settings.diversity))
    near = _Nearest(texts, [not v.reason for v in verdicts], earlier, evaluation)
    if settings.diversity:
        _note(verdicts, duplicates(texts, keys, [not v.reason for v in verdicts]))
        _note(verdicts, _near_duplicates(near, keys, verdicts, settings.max_similarity))
    categories = [r.category for r in raw]
    passing = [i for i, verdict in enumerate(verdicts) if not verdict.reason]
    chosen = set(passing[:n])
    if settings.diversity and len(passing) > n:
        order = sorted(passing, key=lambda i: (similarity.normalise(texts[i]), i))
        chosen = set(_farthest(order, n, near, categories, settings.quota))
    surplus = Verdict("quota", f"{len(passing)} pass, {n} were wanted")
    _note(verdicts, [PASS if i in chosen else surplus for i in range(len(raw))])
    return [
        Filtered(
            text, category, not v.reason, v.reason, v.detail, reading.n_words,
            len(reading.attributes), float(nearest),
        )
        for text, category, v, reading, nearest in zip(
            texts, categories, verdicts, readings, near.any, strict=True
        )
    ]  # fmt: skip


def statement(rows: Sequence[Filtered], n: int) -> str:
    """One sentence for the log: how many were kept of how many, and what dropped the others."""
    kept = sum(row.kept for row in rows)
    counts = Counter(row.reason for row in rows)
    dropped = ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts[reason])
    short = f", {n - kept} fewer than the {n} wanted" if kept < n else ""
    return f"{kept} of {len(rows)} prompts kept{short}" + (f"; dropped: {dropped}" if dropped else "")


def _note(verdicts: list[Verdict], new: Sequence[Verdict]) -> None:
    """Keep the first reason of each prompt."""
    for i, verdict in enumerate(new):
        if not verdicts[i].reason:
            verdicts[i] = verdict


def specificity(
    prompts: Sequence[str],
    settings: FilterSettings,
    readings: Sequence[Reading] | None = None,
) -> list[Verdict]:
    """Whether each (tidied) prompt says enough of what is to be seen, and not too much."""
    known = readings if readings is not None else [read(prompt) for prompt in prompts]
    return [_specificity(reading, settings) for reading in known]


def _specificity(reading: Reading, settings: FilterSettings) -> Verdict:
    if reading.vague_objects:
        return Verdict("vague", reading.vague_objects[0])
    # Two named things and what one does to the other are a picture: "a stork playing a violin".
    details = (*reading.attributes, *reading.objects[1:])
    if len(details) < settings.min_details:
        return Verdict("vague", f"{len(details)} details ({', '.join(details) or 'none'})")
    if len(reading.objects) > settings.max_objects:
        return Verdict("overloaded", f"{len(reading.objects)} objects")
    return PASS


def seen_before(
    prompts: Sequence[str],
    earlier: Sequence[str],
    evaluation: Sequence[str],
    key: Key | None = None,
    rewordings: bool = True,
) -> list[Verdict]:
    """Which prompts are, after normalisation or by their key, ones that must not come back.

    Never switched off: an evaluation prompt that is trained on, in whatever words, makes every
    later score worthless. `rewordings`: whether an earlier round's are refused by key as well.
    """
    taken: dict[str, Verdict] = {}
    for prompt in earlier:
        for mark in _marks(prompt, key if rewordings else None):
            taken[mark] = Verdict("earlier round", prompt)
    for prompt in evaluation:
        for mark in _marks(prompt, key):
            taken[mark] = Verdict("evaluation prompt", prompt)
    return [next((taken[mark] for mark in _marks(prompt, key) if mark in taken), PASS) for prompt in prompts]


def _marks(prompt: str, key: Key | None) -> list[str]:
    """What identifies a prompt: its words, and its meaning where a key can tell it."""
    text = tidy(prompt)
    meaning = key(text) if key else None
    words = "words:" + similarity.normalise(text)
    return [words] if meaning is None else [words, "key:" + meaning]


def duplicates(prompts: Sequence[str], keys: Sequence[str | None], passing: Sequence[bool]) -> list[Verdict]:
    """Which passing prompts repeat the words or the key of an earlier one in the list."""
    first: dict[str, str] = {}
    verdicts = [PASS] * len(prompts)
    for i, (prompt, meaning) in enumerate(zip(prompts, keys, strict=True)):
        if not passing[i]:
            continue
        marks = ["words:" + similarity.normalise(prompt)]
        if meaning is not None:
            marks.append("key:" + meaning)
        same = next((first[mark] for mark in marks if mark in first), None)
        if same is not None:
            verdicts[i] = Verdict("duplicate", same)
        else:
            first.update(dict.fromkeys(marks, prompt))
    return verdicts


class _Nearest:
    """How near every prompt is to the earlier, the evaluation and the other prompts."""

    def __init__(
        self,
        prompts: Sequence[str],
        passing: Sequence[bool],
        earlier: Sequence[str],
        evaluation: Sequence[str],
    ) -> None:
        signatures = similarity.signatures(prompts)
        self.prompts, self.seen_prompts = prompts, (earlier, evaluation)
        self.earlier, self.earlier_at = similarity.nearest(signatures, similarity.signatures(earlier))
        self.evaluation, self.evaluation_at = similarity.nearest(
            signatures, similarity.signatures(evaluation)
        )
        self.among = similarity.similarity(signatures, signatures)
        np.fill_diagonal(self.among, 0.0)
        others = np.where(np.asarray(passing, bool)[None, :], self.among, 0.0)
        self.any: npt.NDArray[np.float32] = np.maximum.reduce(
            [self.earlier, self.evaluation, others.max(1, initial=0.0)]
        )


def _near_duplicates(
    near: _Nearest, keys: Sequence[str | None], verdicts: Sequence[Verdict], threshold: float
) -> list[Verdict]:
    """The first of a group of near duplicates stays; prompts with a key are not judged."""
    found = [PASS] * len(verdicts)
    earlier, evaluation = near.seen_prompts
    stay: list[int] = []
    for i, meaning in enumerate(keys):
        if verdicts[i].reason or meaning is not None:
            continue
        if near.evaluation[i] >= threshold:
            found[i] = Verdict("evaluation prompt", evaluation[near.evaluation_at[i]])
        elif near.earlier[i] >= threshold:
            found[i] = Verdict("earlier round", earlier[near.earlier_at[i]])
        elif stay and near.among[i, stay].max() >= threshold:
            found[i] = Verdict("near duplicate", near.prompts[stay[near.among[i, stay].argmax()]])
        else:
            stay.append(i)
    return found


def _farthest(
    order: list[int],
    n: int,
    near: _Nearest,
    categories: Sequence[str],
    quota: Literal["source", "equal"],
) -> list[int]:
    """Greedy farthest-point choice (Gonzalez 1985) of `n` of `order`, ties to the first in it.

    Starts as far as can be from the earlier rounds; not from the evaluation prompts, or training
    would lean away from what it is judged by.
    """
    left = allot(Counter(categories[i] for i in order), n, quota)
    rows = np.array(order)
    closest = near.earlier[rows].copy()
    category = np.array([categories[i] for i in order])
    is_open = np.isin(category, list(left))
    chosen: list[int] = []
    while len(chosen) < n:
        at = int(np.where(is_open, closest, np.inf).argmin())
        chosen.append(order[at])
        is_open[at] = False
        closest = np.maximum(closest, near.among[rows[at], rows])
        name = categories[order[at]]
        left[name] -= 1
        if left[name] == 0:
            is_open &= category != name
    return chosen


def allot(available: Counter[str], n: int, quota: Literal["source", "equal"]) -> dict[str, int]:
    """How many of `n` each category gets (Webster's method); none gets more than it has.

    "source": in proportion to what is available, so that the choice shifts no category; "equal":
    the same for each, what a small category cannot fill going to the others. n <= sum(available).
    """
    given = dict.fromkeys(sorted(available), 0)
    for _ in range(n):
        room = [name for name in given if given[name] < available[name]]
        weight = available if quota == "source" else dict.fromkeys(given, 1)
        given[min(room, key=lambda name: (given[name] + 0.5) / weight[name])] += 1
    return {name: count for name, count in given.items() if count}
