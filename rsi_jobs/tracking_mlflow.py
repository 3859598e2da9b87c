"""Brings MLflow to what an entry says: looks first, adds what is missing, and may be cut off anywhere.

MLflow draws its own ids, so every run, model and registered model carries the tag `rsi.key`, by which it is
found again. What was logged is read from MLflow itself and kept only as long as no request fails.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rsi_jobs.errors import NotFoundError
from rsi_jobs.store import Store
from rsi_jobs.tracking_entries import Files, Point, RoundEntry, RunEntry, Status, identity_key, key_of

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, LoggedModel, Run
    from mlflow.tracking import MlflowClient

KEY = "rsi.key"  # what a thing is; never two with one key
RUN = "rsi.run"  # the run it belongs to: one search finds all
FROM = "rsi.from_model"  # the logged model a round began from
PARENT = "mlflow.parentRunId"
BEST = "best"  # the alias of the best round in the Model Registry
BATCH = 100  # params or tags a request; MLflow's limit
TIMEOUT = "10"  # seconds; retries are ours, so that an outage is noticed at once


def connect(uri: str) -> MlflowClient:
    """A client. Importing MLflow takes seconds, and so does making a new database: call it off the loop."""
    defaults = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": TIMEOUT,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def artifact_folder(uri: str) -> str | None:
    """Where a SQLite database's artifacts lie: beside it. A server decides for itself."""
    if not uri.startswith("sqlite:///"):
        return None
    return str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts")


@dataclass
class _Known:
    """A run as MLflow has it."""

    id: str
    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    datasets: set[str] = field(default_factory=set)
    models_out: set[str] = field(default_factory=set)


@dataclass
class _Model:
    """A logged model as MLflow has it."""

    id: str
    files: str  # the address of its folder among MLflow's artifacts
    ready: bool


class Writer:
    """Writes one run's entries; throw it away after any error, the next one looks again."""

    def __init__(self, client: MlflowClient, uri: str, store: Store) -> None:
        self.client, self.uri, self.store = client, uri, store
        self._key = ""
        self._experiment = ""
        self._runs: dict[str, _Known] = {}
        self._models: dict[str, _Model] = {}
        self._versions: dict[int, str] = {}
        self._name = ""
        self._best = ""

    def write(self, entry: RunEntry) -> None:
        """Make MLflow show `entry`. Raises whatever MLflow or the store raises; call again later."""
        if not self._key:
            self._look(entry)
        parent = self._run(self._key, entry.run, entry.started, {"rsi.kind": "run"})
        if entry.status == "RUNNING":
            self._set_status(parent, "RUNNING", None)
        self._log(parent, params=entry.params)
        for each in entry.rounds:
            self._round(entry, parent, each)
        if entry.best:
            self._register(entry)
        self._log(parent, tags=entry.tags)
        self._set_status(parent, entry.status, entry.ended)

    def _look(self, entry: RunEntry) -> None:
        """Find what an earlier controller, or this one before an outage, has logged."""
        key = f"{entry.run}/{_id(self.store, entry.run)}"
        self._experiment = self._open_experiment(entry.experiment)
        where = f"tags.`{RUN}` = '{key}'"
        runs: dict[str, list[Run]] = {}
        token: str | None = None
        while True:
            page = self.client.search_runs([self._experiment], where, page_token=token)
            for run in page:
                runs.setdefault(run.data.tags[KEY], []).append(run)
            token = page.token
            if not token:
                break
        models: dict[str, list[LoggedModel]] = {}
        while True:
            found = self.client.search_logged_models([self._experiment], where, page_token=token)
            for model in found:
                models.setdefault(model.tags[KEY], []).append(model)
            token = found.token
            if not token:
                break
        # A request that was given up may still have been carried out, after it was made anew: an empty twin.
        for name, twins in runs.items():
            twins.sort(key=lambda run: (-len(run.data.metrics), run.info.run_id))
            for run in twins[1:]:
                self.client.delete_run(run.info.run_id)
            self._runs[name] = _known(twins[0])
        for name, copies in models.items():
            copies.sort(key=lambda model: (-len(model.metrics or ()), model.model_id))
            for model in copies[1:]:
                self.client.delete_logged_model(model.model_id)
            self._models[name] = _logged(copies[0])
        self._key = key

    def _open_experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            return str(self.client.create_experiment(name, artifact_location=artifact_folder(self.uri)))
        return str(found.experiment_id)

    def _run(self, key: str, name: str, started: int, tags: Mapping[str, str]) -> _Known:
        known = self._runs.get(key)
        if known is None:
            all_tags = {KEY: key, RUN: self._key, "mlflow.source.name": "rsi-jobs", **tags}
            run = self.client.create_run(self._experiment, started or None, all_tags, name)
            known = self._runs[key] = _known(run)
        return known

    def _set_status(self, run: _Known, status: Status, ended: int | None) -> None:
        if run.status == status:
            return
        if status == "RUNNING":
            self.client.update_run(run.id, status=status)
        else:
            self.client.set_terminated(run.id, status, ended)
        run.status = status

    def _log(
        self,
        run: _Known,
        points: Iterable[Point] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        model: str | None = None,
    ) -> None:
        """Log what `run` does not have yet. Params are immutable: the first value stays."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(p.name, p.value, p.time, p.step, model_id=model) for p in points]
        new_params = [(k, v) for k, v in (params or {}).items() if k not in run.params]
        new_tags = [(k, v) for k, v in (tags or {}).items() if run.tags.get(k, "") != v]
        if metrics:
            self.client.log_batch(run.id, metrics=metrics, synchronous=True)
        for some in _batches(new_params):
            self.client.log_batch(run.id, params=[Param(k, v) for k, v in some], synchronous=True)
        for some in _batches(new_tags):
            self.client.log_batch(run.id, tags=[RunTag(k, v) for k, v in some], synchronous=True)
        run.metrics |= {p.name: p.value for p in points}
        run.params |= dict(new_params)
        run.tags |= dict(new_tags)

    def _round(self, entry: RunEntry, parent: _Known, each: RoundEntry) -> None:
        key = key_of(self._key, each.round)
        tags = {"rsi.kind": "round", "rsi.round": str(each.round), PARENT: parent.id}
        run = self._run(key, f"{entry.run}-r{each.round:03d}", each.started, tags)
        model = None
        if each.checkpoint is not None:
            model = self._model(entry, each, run, each.checkpoint)
        # All points of a round have its step, so the round's own run tells which of them are logged; the
        # run above it gets them first, so that what the round has is never missing there.
        for points, carrier in ((each.points, None), (each.results, model)):
            new = [point for point in points if run.metrics.get(point.name) != point.value]
            if new:
                self._log(parent, new)
                self._log(run, new, model=carrier)
        self._log(run, params=each.params, tags=each.tags)
        self._link(entry, each, run, model)
        if each.grid is not None and run.tags.get("rsi.grid") != each.grid.sha256:
            self._grid(parent, run, each)
        open_status: Status = "FINISHED" if each.ended is not None else entry.status
        self._set_status(run, open_status, each.ended or entry.ended)

    def _model(self, entry: RunEntry, each: RoundEntry, run: _Known, files: Files) -> str:
        """The round's checkpoint as a LoggedModel; its files stay in the store."""
        key = key_of(self._key, each.round)
        model = self._models.get(key)
        if model is None:
            made = self.client.create_logged_model(
                self._experiment,
                name=f"{entry.run}-r{each.round:03d}",
                source_run_id=run.id,
                tags={
                    KEY: key,
                    RUN: self._key,
                    "rsi.uri": files.uri,
                    "rsi.digest": files.digest,
                    "rsi.decision": each.tags["rsi.decision"],
                    "mlflow.model.isExternal": "true",
                },
                params=dict(files.params),
                model_type="diffusion",
            )
            model = self._models[key] = _logged(made)
        if not model.ready:
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "MLmodel").write_text(_mlmodel(model.id, run.id, files))
                self.client.log_model_artifacts(model.id, folder)
            self.client.finalize_logged_model(model.id, "READY")
            model.ready = True
        return model.id

    def _link(self, entry: RunEntry, each: RoundEntry, run: _Known, model: str | None) -> None:
        """What the round read and made: its dataset, the checkpoint it began from, its own."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        if each.dataset is not None and each.dataset.digest not in run.datasets:
            name = f"{entry.run}-r{each.round:03d}"
            self.client.log_inputs(run.id, datasets=[_dataset_input(name, each.dataset)])
            run.datasets.add(each.dataset.digest)
        start = None if each.start_from is None else self._models.get(key_of(self._key, each.start_from))
        # A search tells a run's datasets and its outputs, but not the models it read.
        if start is not None and run.tags.get(FROM) != start.id:
            self.client.log_inputs(run.id, models=[LoggedModelInput(start.id)])
            self._log(run, tags={FROM: start.id})
        if model is not None and model not in run.models_out:
            self.client.log_outputs(run.id, [LoggedModelOutput(model, each.round)])
            run.models_out.add(model)

    def _grid(self, parent: _Known, run: _Known, each: RoundEntry) -> None:
        assert each.grid is not None
        try:
            data = self.store.get(each.grid.key)
        except NotFoundError:  # pruned
            return
        if hashlib.sha256(data).hexdigest() != each.grid.sha256:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"round_{each.round:03d}.png")
            path.write_bytes(data)
            self.client.log_artifact(parent.id, str(path), "grid")
            self.client.log_artifact(run.id, str(path), "grid")
        self._log(run, tags={"rsi.grid": each.grid.sha256})

    def _register(self, entry: RunEntry) -> None:
        """The best round as a version in the Model Registry, with the alias `best` on it."""
        model = self._models.get(key_of(self._key, entry.best))
        if model is None:
            return
        name = self._registered(entry)
        version = self._versions.get(entry.best)
        if version is None:
            files = next(r.checkpoint for r in entry.rounds if r.round == entry.best)
            made = self.client.create_model_version(
                name,
                model.files,  # models:/ID would be looked up in MLflow's global tracking address
                run_id=self._runs[key_of(self._key, entry.best)].id,
                tags={KEY: key_of(self._key, entry.best), "rsi.uri": files.uri if files else ""},
                description=f"Round {entry.best} of run {entry.run}.",
                await_creation_for=0,
                model_id=model.id,
            )
            version = self._versions[entry.best] = str(made.version)
        if self._best != version:
            self.client.set_registered_model_alias(name, BEST, version)
            self._best = version

    def _registered(self, entry: RunEntry) -> str:
        """The registered model of this run: named as the run is, or with its id where that is taken."""
        from mlflow.exceptions import MlflowException

        if self._name:
            return self._name
        for name in (entry.run, self._key.replace("/", "-")):
            try:
                found = self.client.get_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                about = f"Checkpoints of run {entry.run}; the alias `{BEST}` is on the best one."
                found = self.client.create_registered_model(name, {KEY: self._key}, about)
            if found.tags.get(KEY) == self._key:
                break
        versions = sorted(self.client.search_model_versions(f"name='{name}'"), key=lambda v: int(v.version))
        for version in versions:
            number = int(version.tags[KEY].rpartition("/r")[2])
            if number in self._versions:
                self.client.delete_model_version(name, str(version.version))
            else:
                self._versions[number] = str(version.version)
        self._best = str(found.aliases.get(BEST, ""))
        self._name = name
        return name


def _id(store: Store, run: str) -> str:
    """The id this run goes by in MLflow: drawn once, kept in the store.

    So a run whose store is moved or mounted elsewhere is still itself, and one that was deleted and begun
    again under the same name is another.
    """
    key = identity_key(run)
    mine = uuid.uuid4().hex[:12]
    if store.put_new(key, json.dumps({"id": mine}).encode()):
        return mine
    return str(json.loads(store.get(key))["id"])


def _known(run: Run) -> _Known:
    inputs, outputs = run.inputs, run.outputs
    return _Known(
        id=run.info.run_id,
        status=run.info.status,
        metrics=dict(run.data.metrics),
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        datasets={d.dataset.digest for d in inputs.dataset_inputs} if inputs else set(),
        models_out={m.model_id for m in outputs.model_outputs} if outputs else set(),
    )


def _logged(model: LoggedModel) -> _Model:
    return _Model(model.model_id, model.artifact_location, str(model.status) == "READY")


def _dataset_input(name: str, files: Files) -> DatasetInput:
    """A dataset by address and digest; nothing of it is read."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = "s3" if files.uri.startswith("s3://") else "local"
    source, profile = json.dumps({"uri": files.uri}), json.dumps(dict(files.params))
    dataset = Dataset(name, files.digest, kind, source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _mlmodel(model: str, run: str, files: Files) -> str:
    """What MLflow wants to find among a model's artifacts: that its files are elsewhere, and where."""
    about = {"mlflow.model.isExternal": True, "uri": files.uri, "digest": files.digest}
    # JSON is YAML.
    return json.dumps(
        {"model_id": model, "model_uuid": model, "run_id": run, "flavors": {}, "metadata": about}
    )


def _batches(items: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
