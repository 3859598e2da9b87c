"""Stage `select`: sees the whole round, without the pixels.

In phase train it picks, drops, weights and publishes the round's dataset: selection.parquet (a row a
candidate, no pixels) and dataset/part-*.parquet (the same rows with their images, one part a shard).
In phases eval and test it computes the metrics against the base and the best accepted round:
images.parquet (a row an image), features.safetensors, grid.png (the first prompts' images).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image
from safetensors.numpy import load_file, save_file

from rsi_jobs import dataset, evaluation, plan, selection, weighting
from rsi_jobs.layout import StageRef
from rsi_jobs.plugins import load_function
from rsi_jobs.stages.attempt import Attempt, Outcome, Rejected, main

GRID = 6  # the grid shows GRID x GRID images
PASSING = 0.5  # quantile of the base's held-out score that an image must reach to count for diversity


@dataclass(frozen=True)
class Round:
    """All candidates of a phase, shard after shard."""

    rows: dict[str, np.ndarray]  # candidates and scores, joined
    features: np.ndarray  # (n, d)
    variance: np.ndarray  # (n,) of the predicted x0 over the last steps
    sizes: list[int]  # rows a shard


def work(attempt: Attempt) -> Outcome:
    with attempt.timed("read"):
        everything = gather(attempt)
    names = list(attempt.identity.rewards.use)
    scores = {name: np.where(everything.rows["flat"], np.nan, everything.rows[name]) for name in names}
    fault = selection.degenerate_reward(scores)
    if fault:
        raise Rejected(fault)
    with attempt.timed("compute"):
        if attempt.ref.phase == "train":
            return choose(attempt, everything, scores)
        return judge(attempt, everything, scores)


def gather(attempt: Attempt) -> Round:
    """Join the sample and score shards, row by row."""
    ref = attempt.ref
    parts, features, variance = [], [], []
    for shard in attempt.shards(StageRef(ref.round, ref.phase, ref.attempt_no, "sample")):
        sample = StageRef(ref.round, ref.phase, ref.attempt_no, "sample")
        score = StageRef(ref.round, ref.phase, ref.attempt_no, "score")
        rows = dataset.read(attempt.read(sample, "candidates.parquet", shard))
        scores = dataset.read(attempt.read(score, "scores.parquet", shard))
        for key in ("prompt_id", "candidate"):
            if not np.array_equal(rows[key], scores.pop(key)):
                raise AssertionError(f"{sample} and {score}, shard {shard}, hold different candidates")
        if not len(rows["prompt_id"]):
            parts.append((rows | scores, 0))
            continue
        parts.append((rows | scores, len(rows["prompt_id"])))
        features.append(load_file(attempt.read(score, "features.safetensors", shard))["features"])
        variance.append(load_file(attempt.read(sample, "tensors.safetensors", shard))["x0_variance"])
    if not features:
        raise Rejected("the phase has no images")
    filled = [rows for rows, n in parts if n]
    return Round(
        dataset.concatenate(filled), np.concatenate(features), np.concatenate(variance), [n for _, n in parts]
    )


def choose(attempt: Attempt, everything: Round, scores: dict[str, np.ndarray]) -> Outcome:
    """Preference sampling and weights of a training round."""
    rows, settings = everything.rows, attempt.identity.selection
    chosen = selection.select(
        scores, rows["prompt_id"], rows["candidate"], rows["category"],
        keep=settings.keep, method=settings.method, margin=settings.margin, floor=settings.floor,
        quota=settings.quota, seed=attempt.identity.seed * 1000 + attempt.ref.round,
    )  # fmt: skip
    if not chosen.selected.any():
        raise Rejected("no candidate was selected: every prompt was dropped", {"selected": 0.0})
    distance, weighed = weigh(attempt, everything, chosen)
    weight = weighed.weights.astype(np.float32)  # 0 where not selected
    reason = [chosen.dropped.get(int(p), "") for p in rows["prompt_id"]]
    columns = {
        **rows, "score": chosen.score.astype(np.float32), "margin": chosen.margin.astype(np.float32),
        "picked": chosen.picked, "selected": chosen.selected, "weight": weight,
        "distance": distance.astype(np.float32), "reason": dataset.text(reason),
    }  # fmt: skip
    table = dataset.table(columns)
    dataset.write(attempt.write("selection.parquet"), table)
    publish(attempt, table, everything.sizes)
    picked = chosen.selected
    metrics = {
        "candidates": float(len(weight)),
        "selected": float(picked.sum()),
        "images_per_kept": len(weight) / float(picked.sum()),
        "ess": weighed.ess,
        "ess_share": weighed.ess / float(picked.sum()),
        "tau": weighed.tau,
        "margin": float(np.mean(chosen.margin[picked])),
    }
    for name, values in scores.items():
        metrics |= {f"{name}.candidates": _mean(values), f"{name}.selected": _mean(values[picked])}
    for name in [n for n in rows if n.startswith("judge.")]:
        values = rows[name].astype(np.float64)
        metrics |= {f"{name}.candidates": _mean(values), f"{name}.selected": _mean(values[picked])}
        metrics[f"{name}.weighted"] = float(np.average(values[picked], weights=weight[picked]))
    for why in sorted(set(chosen.dropped.values())):
        metrics[f"dropped.{why}"] = float(sum(r == why for r in chosen.dropped.values()))
    return Outcome(metrics)


def weigh(
    attempt: Attempt, everything: Round, chosen: selection.Selection
) -> tuple[np.ndarray, weighting.Weights]:
    """Distances (n,) of all candidates and the weights of the selected ones."""
    settings = attempt.identity.weighting
    group = everything.rows["category"] if settings.by_category else None
    reference = weighting.reference_set(chosen.score, settings.reference, group=group)
    scheme = load_function(settings.scheme) if ":" in settings.scheme else settings.scheme
    distance = weighting.distances(
        everything.features, reference, scheme=scheme, k=settings.neighbours, group=group,  # type: ignore[arg-type]
        prompt=everything.rows["prompt_id"], residual=settings.residual, variance=everything.variance,
    )  # fmt: skip
    weighed = weighting.weights(
        distance, reference, selected=chosen.selected, group=group, temperature=settings.temperature,
        low=settings.low, high=settings.high, cut=settings.cut, min_ess=settings.min_ess,
    )  # fmt: skip
    return distance, weighed


def publish(attempt: Attempt, table: pa.Table, sizes: list[int]) -> None:
    """Write the dataset a shard at a time, so that memory holds one shard's images."""
    ref, start = attempt.ref, 0
    sample = StageRef(ref.round, "train", 0, "sample")
    for shard, size in enumerate(sizes):
        part = table.slice(start, size)
        start += size
        if size:
            images = dataset.read_arrow(attempt.read(sample, "candidates.parquet", shard)).column("image")
            dataset.write(
                attempt.write(f"dataset/part-{shard:05d}.parquet"), part.append_column("image", images)
            )


def judge(attempt: Attempt, everything: Round, scores: dict[str, np.ndarray]) -> Outcome:
    """Metrics of an evaluation phase, against the base and against the best accepted round."""
    rows, ref, identity = everything.rows, attempt.ref, attempt.identity
    columns = scores | {"heldout": np.where(rows["flat"], np.nan, rows[identity.rewards.heldout])}
    columns |= {name: rows[name].astype(np.float64) for name in rows if name.startswith("judge.")}
    mine = dataset.table({
        "prompt_id": rows["prompt_id"], "candidate": rows["candidate"], "prompt": rows["prompt"],
        "category": rows["category"], **columns,
    })  # fmt: skip
    dataset.write(attempt.write("images.parquet"), mine)
    save_file({"features": everything.features}, attempt.write("features.safetensors"))
    write_grid(attempt, rows)
    base_ref = StageRef(0, ref.phase, 0, "select")
    at_base = ref.round == 0
    base_rows = rows | columns if at_base else dataset.read(attempt.read(base_ref, "images.parquet"))
    base_features = everything.features if at_base else _features(attempt, base_ref)
    base = phase(attempt, base_rows, base_features, base_rows, base_features)
    new = (
        base
        if at_base
        else phase(attempt, {**rows, **columns}, everything.features, base_rows, base_features)
    )
    reference = None
    if ref.phase == "eval" and not at_base:
        best = plan.best_round(attempt.markers(), ref.round)
        if best == (0, 0):
            reference = base
        else:
            best_ref = StageRef(best[0], "eval", best[1], "select")
            best_rows = dataset.read(attempt.read(best_ref, "images.parquet"))
            reference = phase(attempt, best_rows, _features(attempt, best_ref), base_rows, base_features)
    metrics = evaluation.summarise(
        new, base=None if at_base else base, reference=reference, n=identity.evaluation.bootstrap
    )
    return Outcome(metrics)


def phase(
    attempt: Attempt,
    rows: dict[str, np.ndarray],
    features: np.ndarray,
    base_rows: dict[str, np.ndarray],
    base_features: np.ndarray,
) -> evaluation.Phase:
    """A phase's scores in the base's units, its distance from the base's good images, its diversity."""
    heldout, held_base = rows["heldout"], base_rows["heldout"]
    spread = float(np.nanstd(held_base)) or 1.0
    columns = {name: rows[name] for name in attempt.identity.rewards.use if name in rows}
    columns |= {name: rows[name].astype(np.float64) for name in rows if name.startswith("judge.")}
    columns["heldout"] = (heldout - float(np.nanmean(held_base))) / spread
    columns["distance"] = distance_from_base(rows, features, base_rows, base_features)
    passing = heldout >= np.nanquantile(held_base, PASSING)
    return evaluation.Phase(
        prompt=rows["prompt_id"],
        candidate=rows["candidate"],
        scores=columns,
        diversity=evaluation.diversity(features, rows["prompt_id"], passing),
    )


def distance_from_base(
    rows: dict[str, np.ndarray],
    features: np.ndarray,
    base_rows: dict[str, np.ndarray],
    base_features: np.ndarray,
) -> np.ndarray:
    """Robust z of each image's distance to the base's good images of its kind: (n,).

    The reference is the top half of the base's images by the held-out score; an image is never its own
    neighbour, nor that of the base's image from the same noise, which would flatter the base.
    """
    good = weighting.reference_set(base_rows["heldout"], 0.5, group=base_rows["category"])
    result = np.zeros(len(features))
    for kind in np.unique(base_rows["category"]):
        here, there = rows["category"] == kind, base_rows["category"] == kind
        anchors = np.flatnonzero(there & good)
        gaps = np.linalg.norm(features[here][:, None] - base_features[anchors][None], axis=2)
        same = (rows["prompt_id"][here][:, None] == base_rows["prompt_id"][anchors][None]) & (
            rows["candidate"][here][:, None] == base_rows["candidate"][anchors][None]
        )
        gaps[same] = np.inf
        k = max(1, min(15, len(anchors) - 1))
        result[here] = np.sort(gaps, axis=1)[:, :k].mean(axis=1)
        own = np.linalg.norm(base_features[anchors][:, None] - base_features[anchors][None], axis=2)
        np.fill_diagonal(own, np.inf)
        of_good = np.sort(own, axis=1)[:, :k].mean(axis=1)
        middle = np.median(of_good)
        scale = 1.4826 * np.median(np.abs(of_good - middle)) or 1.0
        result[here] = (result[here] - middle) / scale
    return result


def write_grid(attempt: Attempt, rows: dict[str, np.ndarray]) -> None:
    """grid.png: the first prompts' first images, the same prompts and noise in every round."""
    sample = StageRef(attempt.ref.round, attempt.ref.phase, attempt.ref.attempt_no, "sample")
    first = dataset.read(attempt.read(sample, "candidates.parquet", 0), ["candidate", "image"])
    chosen = first["image"][first["candidate"] == 0][: GRID * GRID]
    images = [dataset.pixels(data) for data in chosen]
    height, width = images[0].shape[:2]
    scale = max(1, 96 // width)
    sheet = Image.new("RGB", (GRID * width * scale, -(-len(images) // GRID) * height * scale))
    for n, image in enumerate(images):
        tile = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (n % GRID * width * scale, n // GRID * height * scale))
    sheet.save(attempt.write("grid.png"))


def _features(attempt: Attempt, ref: StageRef) -> np.ndarray:
    return np.asarray(load_file(attempt.read(ref, "features.safetensors"))["features"])


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values))


if __name__ == "__main__":
    sys.exit(main("select", work))
