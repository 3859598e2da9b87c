"""Markers as a run leaves them, and what MLflow shows of them, so that two databases can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from rsi_jobs import layout
from rsi_jobs.config import Identity, RunConfig, Sampling
from rsi_jobs.layout import StageRef
from rsi_jobs.marker import Marker, Markers, Output
from rsi_jobs.plan import JUDGE, TRAIN, gate_ref
from rsi_jobs.store import Store

PNG = b"\x89PNG\r\n\x1a\n"
BEGUN = 1_700_000_000.0  # unix seconds


def config(run: str = "shapes", rounds: int = 8, shards: int = 1, seed: int = 0) -> RunConfig:
    made = RunConfig(run=run, rounds=rounds, identity=Identity(seed=seed, sampling=Sampling(steps=4)))
    return made.model_copy(update={"operations": made.operations.model_copy(update={"shards": shards})})


class Past:
    """A run's markers, stage by stage; each stage takes ten seconds. `files`: write its outputs, too."""

    def __init__(self, store: Store, of: RunConfig, *, files: bool = True) -> None:
        self.store, self.config, self.files = store, of, files
        self.markers: Markers = {}
        self.clock = BEGUN

    def add(
        self,
        ref: StageRef,
        metrics: dict[str, float | None] | None = None,
        *,
        shard: int = 0,
        outputs: Sequence[str] = (),
        **more: Any,
    ) -> Marker:
        made = []
        for name in outputs:
            key = layout.attempt_key(self.config.run, ref, shard, "a1", name)
            data = PNG + f"{ref} {name}".encode()
            if self.files:
                self.store.put(key, data)
            made.append(Output(name=name, key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
        marker = Marker(
            stage=ref.folder,
            shard=shard,
            attempt="a1",
            inputs="0",
            outputs=tuple(made),
            metrics=metrics or {},
            started=self.clock,
            seconds=10.0,
            **{"hardware": {"gpu": "H100"}, **more},
        )
        self.clock += 10
        self.markers = {**self.markers, (ref, shard): marker}
        return marker

    def judge(self, round_: int, heldout: float, attempt_no: int = 0, phase: layout.Phase = "eval") -> None:
        for stage in JUDGE[:-1]:
            self.add(StageRef(round_, phase, attempt_no, stage), {"images": 512.0})
        metrics = {"heldout": heldout, "heldout.low": heldout - 0.1, "heldout.high": heldout + 0.1}
        judged = {**metrics, "diversity": None, "judge.right": 0.5}
        self.add(StageRef(round_, phase, attempt_no, "select"), judged, outputs=["grid.png"])

    def train(self, round_: int, attempt_no: int = 0, upto: layout.Stage = "finetune") -> None:
        stages = TRAIN[: TRAIN.index(upto) + 1] if attempt_no == 0 else ("finetune",)
        facts: dict[str, tuple[dict[str, float | None], list[str]]] = {
            "prompts": ({"raw": 600.0, "kept": 200.0}, ["prompts.jsonl"]),
            "sample": ({"images": 1600.0, "flat": 3.0}, ["images.parquet"]),
            "score": ({"images": 1600.0, "heldout": 0.2}, ["scores.parquet"]),
            "select": ({"selected": 160.0, "ess": 120.5}, ["dataset/part-00000.parquet"]),
            "finetune": (
                {"loss": 0.1 / round_, "lr": 1e-4},
                ["checkpoint/unet/w.bin", "checkpoint/index.json"],
            ),
        }
        for stage in stages:
            metrics, outputs = facts[stage]
            self.add(StageRef(round_, "train", attempt_no, stage), metrics, outputs=outputs)

    def gate(self, round_: int, decision: str, attempt_no: int = 0, reason: str = "as told") -> None:
        accepted = {"accepted": float(decision == "accept")}
        ref = gate_ref(round_, attempt_no)
        self.add(ref, accepted, decision=decision, reason=reason, hardware={})

    def round(self, round_: int, heldout: float, decision: str = "accept") -> Past:
        self.train(round_)
        self.judge(round_, heldout)
        self.gate(round_, decision)
        return self

    def base(self, heldout: float = 0.0) -> Past:
        self.judge(0, heldout)
        return self


def shown(client: Any) -> dict[str, Any]:
    """Everything MLflow has of a run, without the ids it draws, the times it takes and artifact addresses."""
    found = client.get_experiment_by_name("shapes:base")
    if found is None:
        return {}
    runs = client.search_runs([found.experiment_id])
    names = {run.info.run_id: run.info.run_name for run in runs}
    models = list(client.search_logged_models([found.experiment_id]))
    names |= {model.model_id: model.name for model in models}
    return {
        "runs": sorted((_run(client, run, names) for run in runs), key=lambda each: each["name"]),
        "models": sorted((_model(model, names) for model in models), key=lambda each: each["name"]),
        "registered": [
            {
                "name": each.name,
                "best": str(each.aliases.get("best", "")),
                "versions": sorted(
                    (int(v.version), names[v.run_id], v.tags["rsi.uri"])
                    for v in client.search_model_versions(f"name='{each.name}'")
                ),
            }
            for each in client.search_registered_models()
        ],
    }


def _run(client: Any, run: Any, names: dict[str, str]) -> dict[str, Any]:
    history = {
        key: sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
    }
    tags = {key: names.get(value, value) for key, value in run.data.tags.items()}
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "times": (run.info.start_time, run.info.end_time),
        "history": history,
        "params": run.data.params,
        "tags": {k: v for k, v in tags.items() if k not in ("rsi.key", "rsi.run", "rsi.uri")},
        "datasets": [(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs],
        "models_in": [names[m.model_id] for m in client.get_run(run.info.run_id).inputs.model_inputs],
        "models_out": [(names[m.model_id], m.step) for m in run.outputs.model_outputs],
        "artifacts": sorted(f.path for f in client.list_artifacts(run.info.run_id, "grid")),
    }


def _model(model: Any, names: dict[str, str]) -> dict[str, Any]:
    return {
        "name": model.name,
        "status": str(model.status),
        "type": model.model_type,
        "from": names[model.source_run_id],
        "params": model.params,
        "metrics": sorted((m.key, m.step, m.timestamp, m.value) for m in model.metrics),
    }
