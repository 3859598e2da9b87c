"""A run made up for tests: markers and tables as the stages write them, with invented figures."""

from __future__ import annotations

import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from rsi_jobs import dataset, evaluation, layout
from rsi_jobs.config import RunConfig
from rsi_jobs.layout import Phase, Stage, StageRef
from rsi_jobs.marker import Marker, Output
from rsi_jobs.plan import gate_ref
from rsi_jobs.runs import begin
from rsi_jobs.store import Store

EVIL = "a <script>alert('red')</script> circle & a \"blue\" square"
COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 220), "yellow": (240, 200, 40)}
RIGHT = (0.32, 0.41, 0.44, 0.36, 0.5, 0.47, 0.49, 0.52, 0.5)  # by round
Columns = dict[str, Any]


def small_config(run: str = "made-up", rounds: int = 5, **changes: Any) -> RunConfig:
    body: dict[str, Any] = {"run": run, "rounds": rounds}
    body["identity"] = {
        "seed": 7,
        "prompts": {"raw": 60, "keep": 20},
        "selection": {"keep": 16},
        "sampling": {"candidates": 4, "batch": 16},
        "evaluation": {"gate_prompts": 24, "bootstrap": 200, "test_prompts": 24},
    }
    body["operations"] = {"shards": 2}
    return RunConfig.model_validate(body | changes)


class FakeRun:
    """Writes the stages of a run one by one."""

    def __init__(self, store: Store, config: RunConfig, judge: bool = True) -> None:
        self.judge = judge  # whether the world has an exact judge
        self.store, self.config = store, begin(store, config)
        self.rng = np.random.default_rng(3)
        self.now = 1_700_000_000.0
        n = config.identity.evaluation.gate_prompts
        names = list(COLOURS)
        self.prompts = [
            f"a large {names[i % 4]} square above a small {names[i // 4 % 4]} one, {i}" for i in range(n)
        ]
        self.prompts[0] = EVIL

    def commit(
        self,
        ref: StageRef,
        tables: dict[str, Columns],
        shard: int = 0,
        *,
        reason: str = "",
        seconds: float = 2.0,
        metrics: dict[str, float] | None = None,
        **figures: float,
    ) -> None:
        """One shard's marker and tables; `reason` makes it a rejected one."""
        outputs = []
        for name, columns in tables.items():
            key = layout.attempt_key(self.config.run, ref, shard, f"a{shard}", name)
            with tempfile.NamedTemporaryFile() as file:
                dataset.write(Path(file.name), dataset.table(columns))
                data = Path(file.name).read_bytes()
            self.store.put(key, data)
            outputs.append(Output(name=name, key=key, size=len(data), sha256=sha256(data).hexdigest()))
        body = Marker(
            stage=ref.folder, shard=shard, attempt=f"a{shard}", inputs="", outputs=tuple(outputs),
            shards=self.config.operations.shards if ref.stage in ("sample", "score") else 1,
            metrics={**(metrics or {}), **figures}, outcome="rejected" if reason else "ok", reason=reason,
            started=self.now, seconds=seconds, breakdown={"compute": seconds * 0.7, "load": seconds * 0.1},
            versions={"python": "3.11.7", "torch": "2.9.0"}, hardware={"machine": "x86_64", "threads": 2},
        )  # fmt: skip
        self.now += seconds
        assert self.store.put_new(layout.marker_key(self.config.run, ref, shard), body.dumps())

    def image(self, prompt: int, round_: int) -> np.ndarray:
        image = np.full((32, 32, 3), 245, np.uint8)
        y, x = self.rng.integers(2, 14, 2) if prompt % 3 else (4, 4)
        image[y : y + 16, x : x + 14] = list(COLOURS.values())[prompt % 4]
        image[20:27, 3 + round_ : 12 + round_] = list(COLOURS.values())[prompt // 4 % 4]
        return image

    def rows(self, prompts: list[str], candidates: int, round_: int) -> tuple[Columns, list[np.ndarray]]:
        ids = np.repeat(np.arange(len(prompts)), candidates)
        columns = {
            "prompt_id": ids,
            "candidate": np.tile(np.arange(candidates), len(prompts)),
            "prompt": [prompts[i] for i in ids],
            "category": ["pair"] * len(ids),
            "seed": np.arange(len(ids)),
            "flat": np.zeros(len(ids), bool),
        }
        return columns, [self.image(int(i), round_) for i in ids]

    def scores(self, n: int, right: float) -> Columns:
        is_right = self.rng.random(n) < right
        extra = (~is_right & (self.rng.random(n) < 0.3)).astype(np.int64)
        columns: Columns = {
            name: (is_right + self.rng.normal(0, 1, n)).astype(np.float32)
            for name in ("dual", "fused", "heldout")
        }
        if not self.judge:
            return columns
        return columns | {
            "judge.right": is_right.astype(np.float64), "judge.extra": extra.astype(np.float64),
            "judge.malformed": (self.rng.random(n) < 0.05).astype(np.float64),
        }  # fmt: skip

    def evaluation(self, round_: int, attempt_no: int = 0, phase: Phase = "eval") -> None:
        """sample, score and select of an evaluation phase."""
        candidates = self.config.identity.evaluation.candidates if phase == "eval" else 1
        columns, images = self.rows(self.prompts, candidates, round_)
        n = len(images)
        for shard, part in enumerate((slice(0, n // 2), slice(n // 2, n))):
            rows = {name: values[part] for name, values in columns.items()}
            rows["image"] = dataset.images_column(images[part], [""] * len(images[part]))
            self.commit(StageRef(round_, phase, attempt_no, "sample"), {"candidates.parquet": rows}, shard,
                        images=n / 2)  # fmt: skip
            self.commit(StageRef(round_, phase, attempt_no, "score"), {}, shard, seconds=0.5, images=n / 2)
        scores = self.scores(n, RIGHT[round_])
        new, base = (
            evaluation.Phase(
                columns["prompt_id"],
                columns["candidate"],
                found | {"distance": found["dual"] ** 2},
                self.rng.normal(0.3, 0.02, len(self.prompts)),
            )
            for found in (scores, self.scores(n, RIGHT[0]))
        )
        other = base if round_ else None
        metrics = evaluation.summarise(new, base=other, reference=other, n=200)
        named = {name: columns[name] for name in ("prompt_id", "candidate", "prompt", "category")}
        ref = StageRef(round_, phase, attempt_no, "select")
        self.commit(ref, {"images.parquet": named | scores}, seconds=1.0, metrics=metrics)

    def training(self, round_: int, rejected: str = "") -> None:
        """prompts to finetune of a round; `rejected` is finetune's reason."""

        def ref(stage: Stage) -> StageRef:
            return StageRef(round_, "train", 0, stage)

        prompts = self.constructed(round_)
        self.commit(ref("prompts"), {"prompts.parquet": prompts}, seconds=0.4, raw=60.0, kept=20.0)
        texts = [t for t, kept in zip(prompts["prompt"], prompts["kept"], strict=True) if kept]
        columns, _ = self.rows(texts, 4, round_)
        n = len(columns["prompt_id"])
        for shard in (0, 1):
            self.commit(ref("sample"), {}, shard, seconds=3.0, images=n / 2)
            self.commit(ref("score"), {}, shard, seconds=0.6, images=n / 2)
        scores = self.scores(n, RIGHT[round_ - 1])
        picked = columns["candidate"] == 0
        weight = np.clip(self.rng.exponential(1, n), 0.05, 3)
        chosen = columns | scores | {
            "score": self.rng.random(n), "margin": self.rng.random(n), "picked": picked, "selected": picked,
            "weight": np.where(picked, weight, 0), "distance": self.rng.random(n), "reason": [""] * n,
        }  # fmt: skip
        figures = {
            f"judge.{name}.{part}": 0.3
            for name in ("right", "extra", "malformed")
            for part in ("candidates", "selected", "weighted")
            if self.judge
        } | {"candidates": float(n), "selected": float(picked.sum()), "ess": 12.5}
        self.commit(ref("select"), {"selection.parquet": chosen}, seconds=0.8, metrics=figures)
        steps = np.arange(40)
        loss = 0.2 + 0.1 * np.exp(-steps / 15) + self.rng.normal(0, 0.01, 40)
        table = {"step": steps, "loss": loss} | {f"q{q}": loss * q for q in (1, 2, 3, 4)}
        self.commit(ref("finetune"), {} if rejected else {"loss.parquet": table}, reason=rejected,
                    seconds=12.0, steps=40.0, loss=float(loss[-10:].mean()))  # fmt: skip

    def constructed(self, round_: int) -> Columns:
        """60 prompts, 20 of them kept, and what dropped the others."""
        reasons = ["", "", "vague", "overloaded", "near duplicate", "markup"] * 10
        kept = np.array([not reason for reason in reasons])
        texts = [f"a {reason or 'red'} thing number {i} of {round_}" for i, reason in enumerate(reasons)]
        return {
            "prompt_id": np.where(kept, np.cumsum(kept) - 1, -1),
            "prompt": [EVIL if r == "markup" else t for r, t in zip(reasons, texts, strict=True)],
            "category": ["pair"] * len(reasons),
            "kept": kept,
            "reason": reasons,
            "detail": ["<b>why</b>" if reason else "" for reason in reasons],
        }

    def decide(self, round_: int, attempt_no: int, verdict: Any, reason: str) -> None:
        ref = gate_ref(round_, attempt_no)
        body = Marker(
            stage=ref.folder, shard=0, attempt="controller", inputs="", started=self.now, seconds=0.0,
            decision=verdict, reason=reason,
        )  # fmt: skip
        self.store.put_new(layout.marker_key(self.config.run, ref, 0), body.dumps())

    def round(self, number: int, *verdicts: str) -> None:
        """A whole round: one verdict, or `half` and a second one."""
        self.training(number)
        for attempt_no, verdict in enumerate(verdicts):
            if attempt_no:
                self.commit(StageRef(number, "train", 1, "finetune"), {}, seconds=0.3, share=0.5)
            self.evaluation(number, attempt_no)
            why = "no worse than the best round" if verdict == "accept" else "the held-out score fell"
            self.decide(number, attempt_no, verdict, why)


def whole_run(store: Store, config: RunConfig | None = None) -> FakeRun:
    """Base, accepted, accepted at half step, rolled back, rejected half way, accepted."""
    run = FakeRun(store, config or small_config())
    run.evaluation(0)
    run.round(1, "accept")
    run.round(2, "half", "accept")
    run.round(3, "half", "rollback")
    run.training(4, "the loss is not finite at step 12")
    run.decide(4, 0, "rollback", "finetune was rejected: the loss is not finite at step 12")
    run.round(5, "accept")
    return run
