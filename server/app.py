"""The server as a process: store, gRPC and HTTP, from the first log line to the last acknowledgement."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import structlog
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gradiometer.protos import ingest_pb2, ingest_pb2_grpc, query_pb2, query_pb2_grpc
from gradiometer.server.exporter import ExportSettings, register_exporter
from gradiometer.server.live import Live
from gradiometer.server.meters import Meters
from gradiometer.server.service import IngestServicer, QueryServicer
from gradiometer.server.settings import Address, Settings
from gradiometer.server.store import EmbeddedStore
from gradiometer.server.web import LOOPBACK_HOSTS, create_web
from gradiometer.stats_core.errors import StoreError

__all__ = ["Bound", "run", "serve"]

_log = structlog.get_logger("gradiometer.server")
_REPLAYED_ROWS = 500_000
_SERVICES = (
    ingest_pb2.DESCRIPTOR.services_by_name["IngestService"].full_name,
    query_pb2.DESCRIPTOR.services_by_name["QueryService"].full_name,
)


@dataclass(frozen=True)
class Bound:
    """Where a server listens, with the ports that it got.

    Attributes:
        grpc: HOST:PORT for training jobs and queries.
        http: HOST:PORT for the live page and ``/metrics``.
    """

    grpc: str
    http: str


def run(settings: Settings, *, ready: Callable[[Bound], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, logging to standard error.

    Args:
        settings: see `Settings`.
        ready: called once connections are taken.

    Raises:
        ValueError: if an address is refused or taken.
        StoreError: if the data directory can't be used.
    """
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    asyncio.run(serve(settings, ready=ready))


async def serve(
    settings: Settings, *, ready: Callable[[Bound], None] | None = None, stop: asyncio.Event | None = None
) -> None:
    """Serve until told to stop; then nothing acknowledged is lost and nothing waiting is left unsaid.

    Args:
        settings: see `Settings`.
        ready: called once connections are taken.
        stop: ends the server when set; where none is given, SIGTERM and SIGINT do.

    Raises:
        ValueError: if an address is refused or taken.
        StoreError: if the data directory can't be used.
    """
    for warning in settings.check_reach():
        _log.warning(warning)
    stop = stop or _stop_on_signals()
    meters, live = Meters(), Live(settings.window_steps)
    with _listening(Address.parse(settings.http)) as listener:
        store = await asyncio.to_thread(EmbeddedStore, settings, meters)
        try:
            await _replay(store, live, settings)
            shown = ExportSettings(all_layers=settings.export_all_layers, max_series=settings.export_max_series)
            register_exporter(live, meters.registry, shown)
            hosts = ("*",) if settings.allow_remote else LOOPBACK_HOSTS
            web = _Web(create_web(live, store, meters.registry, allowed_hosts=hosts), settings.stop_seconds)
            ingest = IngestServicer(store, live, meters, max_queued_bytes=settings.max_queued_bytes)
            server, checks = _grpc_server(settings, ingest, QueryServicer(store, live))
            bound = Bound(_bind(server, Address.parse(settings.grpc)), _name(settings.http, listener))
            await server.start()
            for name in _SERVICES:
                await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
            serving = asyncio.create_task(web.serve(sockets=[listener]))
            await web.is_up.wait()
            _log.info("serving", grpc=bound.grpc, http=f"http://{bound.http}", data=str(settings.data))
            if ready is not None:
                ready(bound)
            await stop.wait()
            _log.info("stopping")
            await checks.enter_graceful_shutdown()
            ingest.stop()
            live.close()
            web.should_exit = True
            await server.stop(settings.stop_seconds)
            await serving
        finally:
            await asyncio.to_thread(store.close)
    _log.info("stopped")


class _Web(uvicorn.Server):
    """uvicorn without its signal handlers: the process has its own."""

    def __init__(self, app: object, stop_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(stop_seconds)),
            )
        )
        self.is_up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


async def _replay(store: EmbeddedStore, live: Live, settings: Settings) -> None:
    """Show the last steps of the recent runs again, so that a restart does not empty the page."""
    statuses = await asyncio.to_thread(store.list_runs)
    statuses.sort(key=lambda status: status.last_unix_nanos, reverse=True)
    for status in reversed(statuses[: settings.replay_runs]):
        spec = status.run
        limit = max(1, min(settings.replay_steps, _REPLAYED_ROWS // len(spec.layers)))
        live.register(spec)
        try:
            for batch in await asyncio.to_thread(lambda: list(store.read(spec.run_id, limit=limit))):  # noqa: B023
                live.append(spec.run_id, batch, recovered=True)
        except StoreError as error:
            _log.error("a run can't be shown", run=spec.run_id, error=str(error))
            continue
        _log.info("recovered", run=spec.run_id, steps=status.stored_steps, last_step=status.last_step)


def _grpc_server(
    settings: Settings, ingest: IngestServicer, query: QueryServicer
) -> tuple[grpc.aio.Server, "health.aio.HealthServicer"]:
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),  # else a second server takes the same port without an error
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # publishers ping every 20 to 30 s
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ]
    )
    ingest_pb2_grpc.add_IngestServiceServicer_to_server(ingest, server)
    query_pb2_grpc.add_QueryServiceServicer_to_server(query, server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server, checks


def _bind(server: grpc.aio.Server, address: Address) -> str:
    try:
        port = server.add_insecure_port(str(address))
    except RuntimeError:
        raise _taken("grpc", address) from None
    return str(Address(address.host, port))


@contextlib.contextmanager
def _listening(address: Address) -> Iterator[socket.socket]:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError:
        raise _taken("http", address) from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(where)
            listener.listen(128)
        except OSError:
            raise _taken("http", address) from None
        yield listener


def _name(text: str, listener: socket.socket) -> str:
    return str(Address(Address.parse(text).host, listener.getsockname()[1]))


def _taken(name: str, address: Address) -> ValueError:
    return ValueError(
        f"serve needs an address of this machine whose port is free, got {name}={str(address)!r}; "
        f"stop the server that has it, or choose another with --{name}"
    )


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
