"""Keeps an outbox connected to a server: one connection at a time, made anew for as long as the job lives."""

import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gradiometer.collectors.endpoint import Credentials, Endpoint
from gradiometer.collectors.outbox import Outbox
from gradiometer.collectors.quiet_grpc import grpc
from gradiometer.collectors.replay import replay
from gradiometer.collectors.stream import DATA_FAULTS, ENVIRONMENT_FAULTS, Metadata, Stream, open_channel, status
from gradiometer.protos.ingest_pb2_grpc import IngestServiceStub
from gradiometer.protos.run_pb2 import Run

__all__ = ["Backoff", "Sender"]

_log = logging.getLogger("gradiometer")

_POLL = 0.05  # seconds
_SILENCE = 5.0  # seconds that batches wait for an answer before it is said that none comes
_GRACE = 0.3  # seconds that a thread is given to see that it is to end


class Backoff:
    """How long to wait before the next attempt: 0.1 s, doubling up to 10 s, each shortened at random by up to half.

    Args:
        draw: gives numbers between 0 and 1.

    Example:
        >>> backoff = Backoff(draw=lambda: 0.0)
        >>> [backoff.next() for _ in range(9)]
        [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    """

    def __init__(self, draw: Callable[[], float] = random.random, shortest: float = 0.1, longest: float = 10.0) -> None:
        self._draw = draw
        self._shortest = shortest
        self.longest = longest
        self._failures = 0

    def next(self) -> float:
        """Seconds to wait now."""
        wait = min(self.longest, self._shortest * 2.0 ** min(self._failures, 30))
        self._failures += 1
        return wait * (1.0 - 0.5 * self._draw())

    def reset(self) -> None:
        """Begin again: something went well."""
        self._failures = 0


class Sender:
    """Keeps an outbox connected to a server.

    Args:
        endpoint: where it is.
        credentials: what it may ask for.
        run: registered on every connection.
        outbox: what to send.
        spools: folder whose left-over spools are replayed; None for none.
        backoff: how long to wait between attempts.
        silence: seconds that batches wait for an acknowledgement before it is said that the server gives no answer.
        on_refused: called once the server has refused the run for good.

    Attributes:
        state: for display: "connecting", "connected", "no answer", "no room", "no server", "refused: …" or "closed".
    """

    def __init__(
        self,
        endpoint: Endpoint,
        credentials: Credentials,
        run: Run,
        outbox: Outbox,
        *,
        spools: Path | None = None,
        backoff: Backoff | None = None,
        silence: float = _SILENCE,
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        self._endpoint = endpoint
        self._credentials = credentials
        self._run = run
        self._outbox = outbox
        self._spools = spools
        self._backoff = backoff or Backoff()
        self._silence = silence
        self._on_refused = on_refused
        self._metadata: Metadata = (("authorization", f"Bearer {credentials.token}"),) if credentials.token else ()
        self._finishing = threading.Event()
        self._stopped = False
        self._told_away = False
        self._channel: grpc.Channel | None = None
        self._replay: threading.Thread | None = None
        self._thread = threading.Thread(target=self._work, name="gradiometer-sender", daemon=True)
        self.state = "connecting"

    @property
    def is_refused(self) -> bool:
        """True where the server will not take this run, whatever is tried."""
        return self.state.startswith("refused")

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread.start()

    def finish(self, timeout: float) -> None:
        """Send what is left, if that can be done within the timeout; then stop."""
        self._finishing.set()
        self._outbox.finish()
        self._thread.join(timeout)
        self._stopped = True
        channel = self._channel
        if channel is not None:
            channel.close()  # ends whatever is waited for
        self._outbox.wake()
        self._thread.join(_GRACE)
        self.state = self.state if self.is_refused else "closed"

    def _work(self) -> None:
        if self._credentials.token and not self._credentials.authority and not self._endpoint.is_loopback:
            _log.warning("GRADIOMETER_TOKEN goes to %s unencrypted; set GRADIOMETER_CA to use TLS", self._endpoint)
        while not self._stopped:
            last_attempt = self._finishing.is_set()
            began = time.monotonic()
            fatal = False
            try:
                self._attempt()
            except grpc.RpcError as error:
                fatal = self._judge(error)
            except Exception:  # noqa: BLE001 - nothing of this thread may reach the user's job
                if not self._stopped:
                    _log.exception("publishing failed in a way it should not have; it is tried again")
            if self._stopped or (self._outbox.finished and self._outbox.is_empty):
                return
            self._outbox.set_away(away=True)
            if fatal or last_attempt:
                return
            if time.monotonic() - began > self._backoff.longest:
                self._backoff.reset()  # that connection was a good one
            self._finishing.wait(self._backoff.next())

    def _attempt(self) -> None:
        """One connection, for as long as it lasts."""
        with open_channel(self._endpoint, self._credentials) as channel:
            self._channel = channel
            stub = IngestServiceStub(channel)
            stream = Stream(stub, self._run, self._outbox, self._metadata)
            ended = threading.Event()
            watch = threading.Thread(target=self._watch, args=(stream, ended), name="gradiometer-watch", daemon=True)
            watch.start()
            try:
                stream.converse(lambda: self._welcomed(stub))
                self._finish_replay()
                self.state = "connecting"
            finally:
                ended.set()
                watch.join()
                self._channel = None
                if stream.progressed:
                    self._stored_again()
                    self._backoff.reset()

    def _welcomed(self, stub: IngestServiceStub) -> None:
        self._outbox.set_away(away=False)
        if self.state != "no room" or self._outbox.is_empty:
            self.state = "connected"
        if self._told_away:
            self._told_away = False
            waiting = self._outbox.last - self._outbox.acknowledged
            _log.warning("connected to the server at %s; batches waiting: %d", self._endpoint, waiting)
        if self._spools is not None and (self._replay is None or not self._replay.is_alive()):
            arguments = (stub, self._spools, self._metadata)
            self._replay = threading.Thread(target=replay, args=arguments, name="gradiometer-replay", daemon=True)
            self._replay.start()

    def _watch(self, stream: Stream, ended: threading.Event) -> None:
        """While a connection lasts, see whether the server acknowledges what it is sent (it may be stopped, say)."""
        tick, waited, acknowledged = min(self._silence / 4, 1.0), 0.0, self._outbox.acknowledged
        while not ended.wait(tick):
            if stream.progressed:
                self._stored_again()
            if self._outbox.is_empty or self._outbox.acknowledged != acknowledged:
                acknowledged, waited = self._outbox.acknowledged, 0.0
                if self.state == "no answer":
                    self.state = "connected"
                    _log.warning("the server at %s answers again", self._endpoint)
                continue
            waited += tick  # not by the clock: this process may have been stopped itself
            if self.state == "connected" and waited >= self._silence:
                self.state = "no answer"
                _log.warning(
                    "the server at %s gives no answer (batches waiting: %d, for %.3g s); measurements wait in %s; "
                    "see whether its process is stopped or its disk hangs",
                    self._endpoint,
                    self._outbox.last - self._outbox.acknowledged,
                    self._silence,
                    self._spools or "memory",
                )

    def _stored_again(self) -> None:
        if self.state == "no room":
            self.state = "connected"
            _log.warning("the server at %s stores measurements again", self._endpoint)

    def _finish_replay(self) -> None:
        """Let left-over spools be sent while this connection is there and there is time."""
        while self._replay is not None and self._replay.is_alive() and self._finishing.is_set() and not self._stopped:
            self._replay.join(_POLL)

    def _judge(self, error: grpc.RpcError) -> bool:
        """True where trying again is of no use. One line an outage; one that ends at the first attempt has none."""
        code, details = status(error)
        if code in DATA_FAULTS or code in ENVIRONMENT_FAULTS:
            self.state = f"refused: {details}"
            self._on_refused()
            _log.error(
                "the server at %s refuses run %s (%s: %s); nothing more of it is published%s",
                self._endpoint,
                self._run.run_id,
                code.name,
                details,
                f"; {ENVIRONMENT_FAULTS[code]}" if code in ENVIRONMENT_FAULTS else "",
            )
            return True
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            if self.state != "no room" and not self._stopped:
                self.state = "no room"
                _log.warning(
                    "the server at %s takes nothing for now (%s: %s); measurements wait in %s and are sent again "
                    "until it does",
                    self._endpoint,
                    code.name,
                    details,
                    self._spools or "memory",
                )
        elif self.state == "connected":
            self.state = "connecting"
        elif self.state == "no answer":
            self._told_away = True  # the same outage
        elif not self._told_away and not self._stopped:
            self._told_away = True
            self.state = "no server"
            trouble = f"no server at {self._endpoint}"
            if "refused" not in details:
                trouble = f"the server at {self._endpoint} does not answer ({code.name}: {details})"
            _log.warning(
                "%s; measurements are spooled in %s and sent when one appears; start one with `gradiometer serve`",
                trouble,
                self._spools,
            )
        return False
