"""The demo's two real jobs train while their server is killed and started again: nothing acknowledged is lost."""

import time
from pathlib import Path

import numpy as np

from gradiometer.demo.stage import Job, Stage
from gradiometer.server.remote import RemoteStore
from gradiometer.server.report import report
from gradiometer.server.store import open_readonly
from tests.server_process import eventually


def stored(stage: Stage, run: str) -> int:
    with RemoteStore(stage.grpc) as store:
        return next((s.stored_steps for s in store.list_runs() if s.run.run_id == run), 0)


def test_killing_the_server_during_the_demo_loses_nothing_and_stores_nothing_twice(tmp_path: Path) -> None:
    jobs = [
        Job("torch", "crash-torch", "gradiometer.demo.torch_gpt", 60),
        Job("jax", "crash-jax", "gradiometer.demo.jax_digits", 300),
    ]
    with Stage(tmp_path / "data", "127.0.0.1:0", "127.0.0.1:0") as stage:
        stage.start_server()
        for job in jobs:
            stage.start(job)
        seen = dict.fromkeys((job.run for job in jobs), 0)
        for kill in range(1, 4):
            eventually(lambda seen=seen: any(stored(stage, job.run) > seen[job.run] for job in jobs), within=90)
            before = {job.run: stored(stage, job.run) for job in jobs}
            assert stage.server is not None
            stage.server.kill()
            stage.server.wait()
            assert stage.server.stdout is not None
            stage.server.stdout.close()
            stage.server = None
            time.sleep(0.3 * kill)  # training goes on without a server
            stage.start_server()
            for run, count in before.items():
                assert stored(stage, run) >= count, "a restart lost what had been shown as durable"
            seen = before
        eventually(lambda: all(job.ended for job in jobs), within=150)
        for job in jobs:
            assert not job.failed, stage.why(job)
        eventually(lambda: all(stored(stage, job.run) == job.steps for job in jobs), within=30)
    with open_readonly(tmp_path / "data") as store:
        for job in jobs:
            (run,) = report(store, job.run)
            assert run.steps.tolist() == list(range(job.steps))
            assert np.isfinite(run.columns["batch_variance"]).all()
            assert np.nanmax(run.scalars.get("dropped_steps", np.zeros(1)), initial=0) == 0
            assert stored_rows(tmp_path / "data", job.run) == job.steps * len(run.status.run.layers)


def stored_rows(data: Path, run: str) -> int:
    """Rows of the table of layers on disk and in the journal, before any reader drops doubles."""
    with open_readonly(data) as store:
        return store.raw_rows(run)
