"""One publisher's stream as a state machine: no sockets, no disk, no clock.

Theory of operation. A publisher numbers its batches 1, 2, 3, … and keeps each until it is acknowledged. A stream
opens with a hello; the answer says up to which number everything is on disk, and the publisher goes on from there.
The session is told what arrives (`IngestSession.receive`) and what became durable (`IngestSession.committed`), and
says what to do. It does nothing itself::

                 receive(hello)            welcome(run, durable)        finish()
    EXPECT_HELLO ──────────────► GREETED ───────────────────────► OPEN ─────────► ENDED
         │                          │                              │ ▲
         │                          │       receive(batch) ────────┘ │ committed(sequence)
         └──────── a fault ─────────┴────────── a fault ──────► FAILED

Two numbers carry the guarantee: ``durable`` (all up to it are on disk) and ``accepted`` (all up to it were handed on,
``accepted ≥ durable``). A batch is

========================  ==========================================================================
its sequence              what happens
========================  ==========================================================================
``accepted + 1``          `Accept`: it is checked, then handed on; ``accepted`` grows
``≤ accepted``            `Duplicate`: it is dropped unread, and ``durable`` is acknowledged again
``> accepted + 1``        a fault, ``FAILED_PRECONDITION``: batches would be missing
========================  ==========================================================================

An acknowledgement names ``durable`` only. What was accepted and not committed when a stream breaks is sent again by
the publisher, and is then either a duplicate or new: each batch is stored exactly once in effect. After a fault the
session takes nothing more, but still acknowledges what becomes durable.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.checks import LARGEST_STEP, check_batch, check_run, layers_differ
from gradiometer.protos.ingest_pb2 import PublishRequest
from gradiometer.protos.run_pb2 import Run
from gradiometer.stats_core.errors import OurFault, PeerFault

__all__ = ["Accept", "Duplicate", "IngestSession", "Opened", "State", "registered", "unknown_run"]


class State(Enum):
    """Where a session is; see the module's picture."""

    EXPECT_HELLO = auto()
    GREETED = auto()
    OPEN = auto()
    ENDED = auto()
    FAILED = auto()


@dataclass(frozen=True)
class Opened:
    """A hello arrived: look up the run and its durable sequence, then call `IngestSession.welcome`."""

    run_id: str
    collector_id: str


@dataclass(frozen=True)
class Accept:
    """A new batch: make it durable, then call `IngestSession.committed`."""

    sequence: int
    batch: StepBatch


@dataclass(frozen=True)
class Duplicate:
    """A known batch: drop it and acknowledge ``durable`` again."""

    sequence: int
    durable: int


_MAY = {
    ("hello", State.EXPECT_HELLO): State.GREETED,
    ("welcome", State.GREETED): State.OPEN,
    ("batch", State.OPEN): State.OPEN,
    ("finish", State.EXPECT_HELLO): State.ENDED,
    ("finish", State.GREETED): State.ENDED,
    ("finish", State.OPEN): State.ENDED,
}


class IngestSession:
    """One stream of one collector.

    Attributes:
        state: see the module's picture.
        durable: all batches up to this sequence number are on disk.
        accepted: all batches up to this one were handed on.
    """

    def __init__(self) -> None:
        self.state = State.EXPECT_HELLO
        self.durable = 0
        self.accepted = 0
        self._num_layers = 0

    def receive(self, request: PublishRequest) -> Opened | Accept | Duplicate:
        """What to do about a request.

        Raises:
            PeerFault: if the publisher may not send it; the session has failed then.
        """
        kind = request.WhichOneof("message") or "nothing"
        after = _MAY.get((kind, self.state))
        if after is None:
            raise self._fault(
                f"Publish needs {self._expected()}, got message={kind}; open the stream with a hello, then send batches"
            )
        self.state = after
        if kind == "hello":
            return self._hello(request.hello.run_id, request.hello.collector_id)
        return self._batch(request.batch.sequence, request.batch.batch)

    def welcome(self, run: Run, durable: int) -> int:
        """Answer a hello with the number to acknowledge.

        Args:
            run: the run that the hello named.
            durable: its collector's durable sequence, 0 for none.

        Raises:
            OurFault: if no hello is waiting.
        """
        self._step("welcome")
        self._num_layers = len(run.layers)
        self.durable = self.accepted = durable
        return durable

    def committed(self, sequence: int) -> int:
        """Note that all batches up to a number are on disk; returns the number to acknowledge.

        Raises:
            OurFault: if that batch was never accepted.
        """
        if sequence > self.accepted:
            raise OurFault(f"IngestSession needs sequence <= {self.accepted}, got sequence={sequence}; report this")
        self.durable = max(self.durable, sequence)
        return self.durable

    def finish(self) -> None:
        """Note that the publisher has nothing more to say."""
        if self.state is not State.FAILED:
            self._step("finish")

    def _hello(self, run_id: str, collector_id: str) -> Opened:
        if not 0 < len(collector_id) <= 128:
            raise self._fault(
                f"Publish needs collector_id of 1 to 128 characters, got collector_id={collector_id[:140]!r}; "
                "give each process one of its own"
            )
        return Opened(run_id, collector_id)

    def _batch(self, sequence: int, batch: StepBatch) -> Accept | Duplicate:
        if not 0 < sequence <= LARGEST_STEP:
            raise self._fault(f"Publish needs sequence from 1, got sequence={sequence}; count batches 1, 2, 3, …")
        if sequence <= self.accepted:
            return Duplicate(sequence, self.durable)
        if sequence > self.accepted + 1:
            raise self._fault(
                f"Publish needs sequence={self.accepted + 1} next, got sequence={sequence}; "
                "open a new stream and go on from its durable_sequence",
                status="FAILED_PRECONDITION",
            )
        try:
            check_batch(batch, self._num_layers)
        except PeerFault:
            self.state = State.FAILED
            raise
        self.accepted = sequence
        return Accept(sequence, batch)

    def _expected(self) -> str:
        return {
            State.EXPECT_HELLO: "a hello first",
            State.GREETED: "the answer to its hello first",
            State.OPEN: "batches after the hello",
        }.get(self.state, "a stream that is open")

    def _step(self, event: str) -> None:
        after = _MAY.get((event, self.state))
        if after is None:
            raise OurFault(f"IngestSession needs a state for {event}, got state={self.state.name}; report this")
        self.state = after

    def _fault(self, message: str, status: str = "INVALID_ARGUMENT") -> PeerFault:
        self.state = State.FAILED
        return PeerFault(message, status=status)


def registered(known: Run | None, offered: Run, now: int) -> Run:
    """The run to keep when one is registered: new, or found again with its facts brought up to date.

    Args:
        known: the run of that id as stored, or None.
        offered: the run as offered now.
        now: nanoseconds since 1970, for a run that does not say when it started.

    Raises:
        PeerFault: if it can't be stored, or was registered with other layers or another unit before.
    """
    check_run(offered)
    run = Run()
    run.CopyFrom(offered)
    if known is None:
        run.started_unix_nanos = offered.started_unix_nanos or now
        return run
    difference = layers_differ(known, offered)
    if difference is None and known.unit != offered.unit:
        difference = f"unit {known.unit!r} registered, {offered.unit!r} offered"
    if difference is not None:
        raise PeerFault(
            f"RegisterRun needs the layers of run {offered.run_id!r} as first registered, got others: {difference}; "
            "choose another name for the run",
            status="ALREADY_EXISTS",
        )
    run.started_unix_nanos = known.started_unix_nanos
    if known.HasField("coverage") and not offered.HasField("coverage"):
        run.coverage.CopyFrom(known.coverage)
    return run


def unknown_run(who: str, run_id: str, known: Iterable[str]) -> PeerFault:
    """The fault of naming a run that is not there; the message lists the nearest names."""
    near = difflib.get_close_matches(run_id, list(known), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`gradiometer runs` lists them"
    return PeerFault(f"{who} needs a registered run, got run_id={run_id[:140]!r}; {hint}", status="NOT_FOUND")
