"""A real server in a process of its own, for tests: free ports, a directory of its own, and SIGKILL on request."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class RunningServer:
    """A server process and where it listens."""

    process: "subprocess.Popen[str]"
    grpc: str
    http: str
    data: Path

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


def start_server(data: Path, *, grpc: str = "127.0.0.1:0", http: str = "127.0.0.1:0") -> RunningServer:
    """Start a server and wait until it takes connections."""
    data.parent.mkdir(parents=True, exist_ok=True)
    with (data.parent / f"{data.name}.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gradiometer.server", "--grpc", grpc, "--http", http, "--data", str(data)],
            stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT / "src",
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (data.parent / f"{data.name}.log").read_text()
    bound = json.loads(line)
    return RunningServer(process, bound["grpc"], bound["http"], data)


@contextlib.contextmanager
def running_server(data: Path) -> Iterator[RunningServer]:
    """A server for the length of a block."""
    server = start_server(data)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def eventually(what: Callable[[], bool], *, within: float = 30.0) -> None:
    """Wait until something holds, by asking again; fail when it does not within the time."""
    end = time.monotonic() + within
    while not what():
        assert time.monotonic() < end, f"did not happen within {within} s"
        time.sleep(0.02)
