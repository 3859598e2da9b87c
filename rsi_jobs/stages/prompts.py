"""Stage `prompts`: construct a round's prompts and filter them; every dropped one keeps its reason.

Outputs: prompts.parquet, one row a constructed prompt: prompt_id (-1 when dropped), prompt, category, kept,
reason, detail.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import numpy as np

from rsi_jobs import dataset
from rsi_jobs.diffusion import base_folder
from rsi_jobs.layout import StageRef
from rsi_jobs.prompts import evalsets, filters, sources
from rsi_jobs.prompts.settings import FilterSettings
from rsi_jobs.stages.attempt import Attempt, Outcome, main

TOO_FEW = 0.5  # share of the wanted prompts below which a round is not worth its GPU time


def work(attempt: Attempt) -> Outcome:
    settings = attempt.identity.prompts
    rng = np.random.default_rng([attempt.identity.seed, attempt.ref.round, 1])
    given = {"path": settings.file} if settings.source == "file" else {}
    with attempt.timed("construct"):
        raw = sources.draw(settings.source, settings.raw, rng, given)
    with attempt.timed("filter"):
        rows = filters.construct(
            raw,
            n=settings.keep,
            settings=FilterSettings(
                clarity=settings.clarity, specificity=settings.specificity, diversity=settings.diversity
            ),
            earlier=_earlier(attempt),
            evaluation=evalsets.all_prompts(attempt.identity.evaluation),
            window=settings.window,
            count_tokens=token_counter(attempt),
            key=sources.DOMAIN_KEYS.get(attempt.identity.model.domain),
        )
    print(filters.statement(rows, settings.keep))
    kept = np.array([row.kept for row in rows])
    ids = np.where(kept, np.cumsum(kept) - 1, -1)
    dataset.write(
        attempt.write("prompts.parquet"),
        dataset.table(
            {
                "prompt_id": ids.astype(np.int64),
                "prompt": [row.prompt for row in rows],
                "category": [row.category for row in rows],
                "kept": kept,
                "reason": [row.reason for row in rows],
                "detail": [row.detail for row in rows],
            }
        ),
    )
    dropped = Counter(row.reason for row in rows if not row.kept)
    metrics = {"raw": float(len(rows)), "kept": float(kept.sum())}
    metrics |= {f"dropped.{reason}": float(count) for reason, count in sorted(dropped.items())}
    if kept.sum() < TOO_FEW * settings.keep:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common(3))
        return Outcome(metrics, f"only {kept.sum()} of {settings.keep} prompts passed the filters ({why})")
    return Outcome(metrics)


def token_counter(attempt: Attempt) -> Callable[[str], int]:
    """Counts as the base model's own tokenizer does, begin and end marks included."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(base_folder(attempt.identity.model.path) / "tokenizer")
    return lambda prompt: len(tokenizer(prompt).input_ids)


def _earlier(attempt: Attempt) -> list[str]:
    """The prompts that earlier rounds kept, whether or not their checkpoint was accepted."""
    earlier: list[str] = []
    for round_ in range(1, attempt.ref.round):
        rows = dataset.read(attempt.read(StageRef(round_, "train", 0, "prompts"), "prompts.parquet"))
        earlier.extend(rows["prompt"][rows["kept"]])
    return earlier


if __name__ == "__main__":
    sys.exit(main("prompts", work))
