"""gRPC: thin servicers over an ingest session, a store and the live view. No rule lives here but one table of codes.

A stream of batches is two tasks, so that a batch need not wait for the commit of the one before it: one reads, checks
and hands on to the store's writer, the other acknowledges in order what became durable. While more than
``max_queued_bytes`` wait for the disk the first does not read, and HTTP/2's flow control holds the publisher back.
"""

# ruff: noqa: N802 - the methods have the names of the protocol

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import structlog

from gradiometer import __version__
from gradiometer.protos import ingest_pb2, ingest_pb2_grpc, query_pb2, query_pb2_grpc
from gradiometer.protos.run_pb2 import Run
from gradiometer.server.ingest import Accept, Duplicate, IngestSession, Opened, unknown_run
from gradiometer.server.journal import Entry
from gradiometer.server.live import Live
from gradiometer.server.meters import Meters
from gradiometer.server.store import Store
from gradiometer.stats_core.errors import GradiometerError, StoreError

__all__ = ["STATUS", "IngestServicer", "QueryServicer"]

_log = structlog.get_logger("gradiometer.service")
Context = grpc.aio.ServicerContext[Any, Any]

STATUS: dict[str, grpc.StatusCode] = {code.name: code for code in grpc.StatusCode}
"""``GradiometerError.status`` → the code that answers it."""

_UNACKNOWLEDGED = 256


@contextlib.asynccontextmanager
async def _answering(context: Context, meters: Meters | None = None) -> AsyncIterator[None]:
    """Turn what is raised into a gRPC status; of what should never be raised the caller learns no details."""
    try:
        yield
    except GradiometerError as error:
        if meters is not None:
            meters.rejected(error.status)
        await _abort(context, STATUS.get(error.status, grpc.StatusCode.INTERNAL), str(error))
    except Exception:  # noqa: BLE001 - logged with its traceback
        _log.exception("a call failed in a way it should not have")
        await _abort(context, grpc.StatusCode.INTERNAL, "the server failed; its log says more, please report it")


async def _abort(context: Context, code: grpc.StatusCode, details: str) -> NoReturn:
    await context.abort(code, details)
    raise AssertionError("abort raises")


@dataclass(frozen=True, slots=True)
class _Pending:
    """A number to acknowledge once its future is done."""

    sequence: int
    durable: "asyncio.Future[None]"

    @property
    def is_durable(self) -> bool:
        return self.durable.done() and self.durable.exception() is None


Queue = asyncio.Queue[_Pending | None]


class IngestServicer(ingest_pb2_grpc.IngestServiceServicer):
    """Takes measurements in.

    Args:
        store: makes them durable.
        live: shows them once they are.
        meters: counts them.
        max_queued_bytes: no stream is read while more than this waits for the disk.
    """

    def __init__(self, store: Store, live: Live, meters: Meters, *, max_queued_bytes: int = 64 << 20) -> None:
        self._store = store
        self._live = live
        self._meters = meters
        self._max_queued_bytes = max_queued_bytes
        self._readers: set[asyncio.Task[None]] = set()
        self._stopping = False

    def stop(self) -> None:
        """Read no more; each stream ends once what it handed over is durable and acknowledged."""
        self._stopping = True
        for reader in self._readers:
            reader.cancel()

    async def RegisterRun(
        self, request: ingest_pb2.RegisterRunRequest, context: Context
    ) -> ingest_pb2.RegisterRunResponse:
        """Keep a run, or find it again."""
        async with _answering(context, self._meters):
            run, created = await asyncio.wrap_future(self._store.register(request.run))
            self._live.register(run)
            return ingest_pb2.RegisterRunResponse(created=created, server_version=__version__)

    async def Publish(
        self, request_iterator: AsyncIterator[ingest_pb2.PublishRequest], context: Context
    ) -> AsyncIterator[ingest_pb2.PublishResponse]:
        """Take batches, and acknowledge those that are on disk."""
        session, pending = IngestSession(), Queue(_UNACKNOWLEDGED)
        reader = asyncio.create_task(self._read(session, request_iterator, pending))
        self._readers.add(reader)
        self._meters.stream_opened()
        try:
            async with _answering(context, self._meters):
                async for durable in _acknowledgements(session, pending):
                    yield ingest_pb2.PublishResponse(durable_sequence=durable)
                await reader  # raises what ended the stream, after what was good has been acknowledged
        finally:
            self._meters.stream_closed()
            self._readers.discard(reader)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(
        self, session: IngestSession, requests: AsyncIterator[ingest_pb2.PublishRequest], pending: Queue
    ) -> None:
        """Hand on what arrives, until the publisher ends, is at fault, or the server stops."""
        run_id = collector_id = ""
        try:
            if self._stopping:
                raise _stopping()
            async for request in requests:
                match session.receive(request):
                    case Opened(run_id, collector_id):
                        known = session.welcome(self._open(run_id), self._store.durable_sequence(run_id, collector_id))
                        await pending.put(_Pending(known, _done()))
                    case Duplicate(_, known):
                        self._meters.duplicate()
                        await pending.put(_Pending(known, _done()))
                    case Accept(sequence, batch):
                        durable = self._append(Entry(run_id, collector_id, sequence, batch))
                        await pending.put(_Pending(sequence, durable))
                        if self._store.queued_bytes > self._max_queued_bytes:
                            await asyncio.wait([durable])
            session.finish()
        except asyncio.CancelledError:
            if self._stopping:
                raise _stopping() from None
            raise
        finally:
            await pending.put(None)

    def _open(self, run_id: str) -> Run:
        run = self._store.run(run_id)
        if run is None:
            raise unknown_run("Publish", run_id, self._store.run_ids())
        if self._live.view(run_id) is None:  # silent for so long that it was forgotten
            self._live.register(run)
        return run

    def _append(self, entry: Entry) -> "asyncio.Future[None]":
        """Hand a batch to the store; the future is done in the event loop's thread once it is on disk."""
        loop = asyncio.get_running_loop()
        durable: asyncio.Future[None] = loop.create_future()

        def settle(outcome: "Future[bool]") -> None:
            error = outcome.exception()
            if error is not None:
                durable.set_exception(error)
                durable.exception()  # seen: the stream that it belongs to may be gone
                return
            durable.set_result(None)
            if outcome.result():
                self._live.append(entry.run_id, entry.batch)
            else:
                self._meters.duplicate()

        self._store.append(entry).add_done_callback(lambda outcome: loop.call_soon_threadsafe(settle, outcome))
        return durable


class QueryServicer(query_pb2_grpc.QueryServiceServicer):
    """Answers questions about what is stored, and shows what arrives.

    Args:
        store: what is stored; asked on worker threads.
        live: what arrives.
    """

    def __init__(self, store: Store, live: Live) -> None:
        self._store = store
        self._live = live

    async def ListRuns(self, request: query_pb2.ListRunsRequest, context: Context) -> query_pb2.ListRunsResponse:
        """The runs, newest first."""
        async with _answering(context):
            runs = await asyncio.to_thread(self._store.list_runs)
            return query_pb2.ListRunsResponse(runs=runs[: request.limit or None])

    async def QueryRange(
        self, request: query_pb2.QueryRangeRequest, context: Context
    ) -> AsyncIterator[query_pb2.QueryRangeResponse]:
        """A range of steps, in parts."""
        async with _answering(context):
            parts = await asyncio.to_thread(
                self._store.read,
                request.run_id,
                first_step=request.first_step,
                last_step=request.last_step or None,
                layers=request.layers,
                columns=request.columns,
                limit=request.limit or None,
            )
            # One part at a time: a reader that is slow or gone costs no more than one.
            while (batch := await asyncio.to_thread(next, parts, None)) is not None:
                yield query_pb2.QueryRangeResponse(batch=batch)

    async def Subscribe(
        self, request: query_pb2.SubscribeRequest, context: Context
    ) -> AsyncIterator[query_pb2.SubscribeResponse]:
        """Runs and batches as they become durable, until the reader leaves or the server stops."""
        async with _answering(context):
            if request.run_id and self._store.run(request.run_id) is None:
                raise unknown_run("Subscribe", request.run_id, self._store.run_ids())
            async with self._live.subscribe(request.run_id or None) as messages:
                await context.send_initial_metadata(())  # from here on nothing is missed
                async for run_id, message in messages:
                    if isinstance(message, Run):
                        yield query_pb2.SubscribeResponse(run_id=run_id, run=message)
                    else:
                        yield query_pb2.SubscribeResponse(run_id=run_id, batch=message)


async def _acknowledgements(session: IngestSession, pending: Queue) -> AsyncIterator[int]:
    """Numbers to acknowledge, in order; one for all that are durable already."""
    item = await pending.get()
    while item is not None:
        await item.durable
        known = session.committed(item.sequence)
        if pending.empty():
            yield known
            item = await pending.get()
            continue
        item = pending.get_nowait()
        if item is None or not item.is_durable:
            yield known


def _done() -> "asyncio.Future[None]":
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


def _stopping() -> StoreError:
    return StoreError("Publish needs a server that goes on, got one that is stopping; try again", status="UNAVAILABLE")
