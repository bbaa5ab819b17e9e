"""The demo from start to end: server, two jobs, the screen, and a report read back from the store."""

import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from gradiometer.demo.screen import Screen, Watch
from gradiometer.demo.stage import Job, Stage, run_name
from gradiometer.server.remote import RemoteStore
from gradiometer.server.report import report
from gradiometer.server.report_text import render
from gradiometer.stats_core.errors import GradiometerError

__all__ = ["play"]


def play(data: Path, *, torch_steps: int, jax_steps: int, plain: bool, keep: bool, console: Console) -> None:
    """Play the demo.

    Args:
        data: the server's data directory.
        torch_steps: optimizer steps of the PyTorch job.
        jax_steps: optimizer steps of the JAX job.
        plain: lines for a log in place of a live picture.
        keep: leave the server up until the user ends it.
        console: where to draw.

    Raises:
        GradiometerError: if the server or a job fails; the message holds the end of its log.
    """
    jobs = [
        Job(
            "PyTorch, transformer on Python's source", run_name("demo-torch"), "gradiometer.demo.torch_gpt", torch_steps
        ),
        Job("JAX, convolutions on handwritten digits", run_name("demo-jax"), "gradiometer.demo.jax_digits", jax_steps),
    ]
    with Stage(data) as stage:
        stage.start_server()
        addresses = (
            f"live page http://{stage.http}/   metrics http://{stage.http}/metrics   gRPC {stage.grpc}   data {data}/"
        )
        watch = Watch(stage.grpc)
        for job in jobs:
            stage.start(job)
        try:
            _follow(jobs, Screen(jobs, watch, addresses), plain=plain, console=console)
        finally:
            watch.close()
        for job in jobs:
            if job.failed:
                raise GradiometerError(f"demo needs {job.module} to end well, got a failure; {stage.why(job)}")
        console.print("\n[bold]Read back from the store[/bold]\n")
        with RemoteStore(stage.grpc) as store:
            for job in jobs:
                console.print(*(render(run) for run in report(store, job.run)))
        if keep:
            console.print(f"{addresses}\nThe server stays up until you press Ctrl-C.")
            _wait(stage)
    console.print(f"Kept in {data}/. Look again:")
    console.print(
        f"  gradiometer runs --data {data}\n  gradiometer report {jobs[0].run} --data {data}", highlight=False
    )


def _follow(jobs: list[Job], screen: Screen, *, plain: bool, console: Console) -> None:
    def under_way() -> bool:
        return not all(job.ended for job in jobs) and not any(job.failed for job in jobs)

    if not plain:
        with Live(screen, console=console, refresh_per_second=4, transient=False, vertical_overflow="visible"):
            while under_way():
                time.sleep(0.1)
        return
    console.print(screen.addresses, highlight=False, soft_wrap=True)
    said: list[str] = []
    next_line = time.monotonic()
    while True:
        goes_on = under_way()
        if time.monotonic() >= next_line or not goes_on:
            lines = screen.lines()
            for line in lines:
                if line not in said:
                    console.print(line, highlight=False, soft_wrap=True)
            said, next_line = lines, next_line + 10
        if not goes_on:
            return
        time.sleep(0.1)


def _wait(stage: Stage) -> None:
    try:
        while stage.server is not None and stage.server.poll() is None:
            time.sleep(0.2)
    except KeyboardInterrupt:
        return
