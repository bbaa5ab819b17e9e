"""The demo's stage: a server and two training jobs, each in a process of its own, and what becomes of them."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from gradiometer.stats_core.errors import GradiometerError

__all__ = ["Job", "Stage", "run_name"]

_GRPC, _HTTP = "127.0.0.1:50051", "127.0.0.1:9464"
# Each on one thread: two jobs with two threads each on two cores take eight times as long.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass
class Job:
    """One training job of the demo.

    Attributes:
        title: what it is, for a person.
        run: its run id.
        module: the module that is run.
        steps: optimizer steps that it will make.
        process: the process, once started.
    """

    title: str
    run: str
    module: str
    steps: int
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def failed(self) -> bool:
        """True once it has ended badly."""
        return self.process is not None and self.process.poll() not in (None, 0)

    @property
    def ended(self) -> bool:
        """True once it has ended, well or badly."""
        return self.process is not None and self.process.poll() is not None


@dataclass
class Stage:
    """A server and the jobs that publish to it; a context manager that leaves no process behind.

    Args:
        data: the server's data directory.
        grpc: address to bind, or "" for the default one, or any free one where that is taken.
        http: the same for the live page and the metrics.
    """

    data: Path
    grpc: str = ""
    http: str = ""
    jobs: list[Job] = field(default_factory=list)
    server: "subprocess.Popen[bytes] | None" = None

    def start_server(self, *, within: float = 60.0) -> None:
        """Start the server and wait until it takes connections.

        Raises:
            GradiometerError: if it does not start; the message holds the end of its log.
        """
        self.data.mkdir(parents=True, exist_ok=True)
        if not self.grpc:
            taken = _taken(_GRPC) or _taken(_HTTP)
            self.grpc, self.http = ("127.0.0.1:0", "127.0.0.1:0") if taken else (_GRPC, _HTTP)
        log = self.log("server")
        with log.open("ab") as errors:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "gradiometer.server",
                 "--grpc", self.grpc, "--http", self.http, "--data", str(self.data)],
                stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
            )  # fmt: skip
        said: list[bytes] = []
        assert self.server.stdout is not None
        reader = threading.Thread(
            target=lambda out: said.append(out.readline()), args=(self.server.stdout,), daemon=True
        )
        reader.start()
        reader.join(within)
        if not said or not said[0].strip():
            raise GradiometerError(f"demo needs a server that starts, got none within {within:.0f} s; {_tail(log)}")
        bound = json.loads(said[0])
        self.grpc, self.http = bound["grpc"], bound["http"]

    def start(self, job: Job) -> None:
        """Start a training job that publishes to the server."""
        with self.log(job.run).open("ab") as log:
            job.process = subprocess.Popen(
                [sys.executable, "-m", job.module,
                 "--steps", str(job.steps), "--run", job.run, "--endpoint", self.grpc],
                stdout=log, stderr=log, env={**os.environ, **_ONE_THREAD}, start_new_session=True,
            )  # fmt: skip
        self.jobs.append(job)

    def log(self, name: str) -> Path:
        """Where a process of the stage writes what it has to say."""
        return self.data / f"{name}.log"

    def why(self, job: Job) -> str:
        """The end of a failed job's log."""
        return _tail(self.log(job.run))

    def stop_server(self, *, within: float = 20.0) -> None:
        """Ask the server to stop; what it acknowledged is on disk."""
        if self.server is not None:
            _end(self.server, within)
            self.server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs:
            if job.process is not None:
                _end(job.process, 5.0)
        self.stop_server()


def run_name(kind: str) -> str:
    """A run id that says what it is and is new."""
    return f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _end(process: "subprocess.Popen[bytes]", within: float) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(within)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _taken(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return True
    return False


def _tail(log: Path, lines: int = 8) -> str:
    said = log.read_text(errors="replace").strip().splitlines()[-lines:] if log.exists() else []
    return "its log says:\n" + "\n".join(said) if said else f"see {log}"
