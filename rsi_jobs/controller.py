"""The loop: `python -m rsi_jobs.controller --rounds 8`.

Level-triggered: every turn reads the markers and the live jobs and does what the pure function `plan` says.
Nothing is kept in memory that could not be lost; kill it at any instant and start it again.
"""

from __future__ import annotations

import sys
import time

from rsi_jobs import layout, marker, plan, runs
from rsi_jobs.config import RunConfig
from rsi_jobs.errors import Cancelled, RsiError
from rsi_jobs.lease import Lease
from rsi_jobs.plan import Decide, Fail, Finish, Launch
from rsi_jobs.runners import Runner
from rsi_jobs.store import Store
from rsi_jobs.tracking import Tracker
from rsi_jobs.view import View

TURN = 1.0  # seconds between two turns when nothing happens


class StageFailed(RsiError):
    """A stage that cannot be done; its exit code becomes the controller's."""

    def __init__(self, job: plan.Job, where: str) -> None:
        super().__init__(f"{job.ref} failed: {job.reason}; its log: {where}")
        self.exit_code = job.exit_code if 64 <= job.exit_code <= 78 else 1


def control(
    store: Store, config: RunConfig, runner: Runner, tracker: Tracker, view: View, lease: Lease
) -> Finish:
    """Drive a run to its end.

    Raises:
        StageFailed: a stage failed for good.
        Cancelled: the run was cancelled.
    """
    reader = marker.MarkerReader(store, config.run)
    while True:
        lease.renew()
        markers, jobs = reader.read(), runner.jobs()
        if runs.is_cancelled(store, config.run):
            raise Cancelled(f"run {config.run} was cancelled; `rsi resume {config.run}` continues it")
        actions = plan.plan(config, markers, jobs)
        for action in actions:
            match action:
                case Launch(ref, shards):
                    runner.launch(ref, shards)
                case Decide():
                    commit_decision(store, config, action, markers)
                case Fail(job):
                    where = f"rsi logs {config.run} --round {job.ref.round} --stage {job.ref.stage}"
                    raise StageFailed(job, where)
                case Finish():
                    view.update(config, markers, jobs, runner.progress())
                    tracker.finish(config, markers, action)
                    return action
        view.update(config, markers, jobs, runner.progress())
        tracker.sync(config, markers)
        if not any(isinstance(action, Decide) for action in actions):
            runner.wait(TURN)


def commit_decision(store: Store, config: RunConfig, action: Decide, markers: marker.Markers) -> None:
    """Write the gate's decision as a marker; whoever decides first from the same facts says the same."""
    now = time.time()
    evidence = sorted(
        (ref.folder, m.content()) for (ref, _), m in markers.items() if ref.round == action.ref.round
    )
    body = marker.Marker(
        stage=action.ref.folder,
        shard=0,
        attempt="controller",
        inputs=marker.digest([config.identity_digest(), evidence]),
        started=now,
        seconds=0.0,
        decision=action.verdict,
        reason=action.reason,
        metrics={"accepted": float(action.verdict == "accept")},
    )
    store.put_new(layout.marker_key(config.run, action.ref, 0), body.dumps())


if __name__ == "__main__":
    from rsi_jobs.cli import controller_main

    sys.exit(controller_main())
