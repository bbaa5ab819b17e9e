"""What the demo shows while the jobs train: progress, and each job's layers with three variances side by side."""

import threading
from collections import deque
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from gradiometer.demo.stage import Job
from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.query_pb2 import RunStatus
from gradiometer.protos.run_pb2 import Run
from gradiometer.server.remote import RemoteStore
from gradiometer.server.report import RunReport
from gradiometer.server.report_text import layer_table, noise_scale_text, number
from gradiometer.stats_core.errors import GradiometerError

__all__ = ["Screen", "Watch"]

_WINDOW = 32


class Watch:
    """Follows a server's runs in a thread of its own and keeps each one's last steps.

    Args:
        endpoint: the server's gRPC address.
    """

    def __init__(self, endpoint: str) -> None:
        self._store = RemoteStore(endpoint)
        self._runs: dict[str, Run] = {}
        self._batches: dict[str, deque[StepBatch]] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="demo-watch", daemon=True)
        self._thread.start()

    def report(self, run: str) -> RunReport | None:
        """The run's last steps, or None before the first."""
        with self._lock:
            spec, batches = self._runs.get(run), list(self._batches.get(run, ()))
        if spec is None or not batches:
            return None
        return RunReport.from_batches(RunStatus(run=spec), batches).last(_WINDOW)

    def close(self) -> None:
        """Stop following."""
        self._store.close()
        self._thread.join(5)

    def _follow(self) -> None:
        try:
            for run_id, message in self._store.subscribe():
                if isinstance(message, Run):
                    with self._lock:
                        self._runs[run_id] = message
                elif message.steps:
                    if run_id not in self._runs:  # registered before we listened
                        known = {status.run.run_id: status.run for status in self._store.list_runs()}
                        with self._lock:
                            self._runs.update(known)
                    with self._lock:
                        self._batches.setdefault(run_id, deque(maxlen=_WINDOW)).append(message)
        except (GradiometerError, ValueError):
            return  # the server is gone, or the channel was closed under a call: the screen keeps what it has


class Screen:
    """The demo's picture, drawn anew whenever it is asked for."""

    def __init__(self, jobs: Sequence[Job], watch: Watch, addresses: str) -> None:
        self._watch, self.addresses = watch, addresses
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self._tasks: list[tuple[Job, TaskID]] = [
            (job, self._progress.add_task(job.title, total=job.steps, loss="starting")) for job in jobs
        ]

    def __rich__(self) -> RenderableType:
        """Progress bars, then a table a job."""
        tables: list[RenderableType] = []
        for job, task in self._tasks:
            run = self._watch.report(job.run)
            if run is None:
                continue
            self._progress.update(task, completed=int(run.steps[-1]) + 1, loss=f"loss {number(_last_loss(run))}")
            tables += [
                Text(f"\n{job.title}, step {run.steps[-1]}", style="bold"),
                Text(f"variance of the batch gradient three ways, over the last {len(run.steps)} steps", style="dim"),
                layer_table(run, most=9),
            ]
        return Group(Text(self.addresses, style="dim"), Text(), self._progress, *tables)

    def lines(self) -> list[str]:
        """One line a job, for a log."""
        said = []
        for job, _ in self._tasks:
            run = self._watch.report(job.run)
            if run is None:
                said.append(f"{job.title}: {'ended' if job.ended else 'starting'}")
                continue
            shown = {
                "across examples": "batch_variance", "step to step": "step_variance", "MaxVA's s": "temporal_variance",
                "ρ": "variance_ratio", "SNR": "batch_snr",
            }  # fmt: skip
            numbers = "  ".join(f"{label} {number(run.model(name))}" for label, name in shown.items())
            said.append(
                f"{job.title}: step {run.steps[-1] + 1}/{job.steps}  loss {number(_last_loss(run))}  {numbers}  "
                f"noise scale {noise_scale_text(run.model('noise_scale'), run.model_interval('noise_scale').high)}"
            )
        return said


def _last_loss(run: RunReport) -> float:
    loss = run.scalars.get("loss")
    return float("nan") if loss is None else float(loss[-1])
