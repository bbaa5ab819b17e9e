"""The server's HTTP side: the live page, its JSON and its event stream, and Prometheus's ``/metrics``.

Closed by default: only requests for a loopback host name are answered (no web page elsewhere can read a run
through a visitor's browser), nothing is loaded from anywhere else, and there is no inline script or style.
"""

import importlib.resources
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.query_pb2 import RunStatus
from gradiometer.protos.run_pb2 import Run
from gradiometer.server.history import RunHistory
from gradiometer.server.live import Live
from gradiometer.server.page import COLUMNS, catalogue, chart, facts, numbers
from gradiometer.server.sse import EventStream
from gradiometer.server.view import RunView
from gradiometer.stats_core.errors import GradiometerError

__all__ = ["LOOPBACK_HOSTS", "RunStore", "create_web"]

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_LIVE_SECONDS = 60.0
_MOST_STREAMS = 64
_REPLAYED_ROWS = 500_000  # rows of one step and layer, read back to show a run that is not in memory
_FRESH = {"cache-control": "no-store"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class RunStore(Protocol):
    """What the page needs of the store."""

    def list_runs(self) -> list[RunStatus]:
        """All runs, newest first."""
        ...

    def read(self, run_id: str, *, columns: Sequence[str] = (), limit: int | None = None) -> Iterable[StepBatch]:
        """The last steps of a run, in ascending order; some columns, or all."""
        ...


def create_web(
    live: Live,
    store: RunStore,
    registry: CollectorRegistry,
    *,
    allowed_hosts: Sequence[str] = LOOPBACK_HOSTS,
) -> Starlette:
    """The application that serves the page, its data and the metrics.

    Args:
        live: runs in memory. Close it before the server shuts down: the event streams then end.
        store: runs that are not in memory any more; called on worker threads.
        registry: what ``/metrics`` exports.
        allowed_hosts: names that a request may ask for, without port; ``"*"`` for any.
    """
    pages = _Pages(live, store, registry)
    folder = Path(str(importlib.resources.files("gradiometer.dashboards"))) / "live"
    return Starlette(
        routes=[
            Route("/", _File(folder / "index.html")),
            Route("/favicon.ico", _File(folder / "favicon.svg")),
            Route("/healthz", _healthy),
            Route("/metrics", pages.metrics),
            Route("/api/catalogue", pages.catalogue),
            Route("/api/runs", pages.runs),
            Route("/api/runs/{run}", pages.run),
            Route("/api/runs/{run}/events", pages.events),
            Mount("/static", _Static(directory=folder)),
        ],
        middleware=[Middleware(_Guard, allowed_hosts=allowed_hosts), Middleware(GZipMiddleware, minimum_size=4096)],
        exception_handlers={HTTPException: _refused, GradiometerError: _failed},
    )


class _Pages:
    """The endpoints that answer from the live runs and the store."""

    def __init__(self, live: Live, store: RunStore, registry: CollectorRegistry) -> None:
        self._live = live
        self._store = store
        self._registry = registry
        self._catalogue = catalogue()
        self._streams = 0

    def metrics(self, request: Request) -> Response:
        """The exposition that the scraper asked for."""
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoder(self._registry), headers={"content-type": content_type})

    async def catalogue(self, _: Request) -> Response:
        """Names, units and explanations of every statistic."""
        return JSONResponse(self._catalogue, headers=_FRESH)

    def runs(self, _: Request) -> Response:
        """All runs, in memory or stored: those that are training first, then the newest."""
        found = {status.run.run_id: self._listed(status) for status in self._store.list_runs()}
        for view in self._live.runs():
            entry = found.setdefault(view.run.run_id, _entry(view.run))
            entry["live"] = bool(view.window) and not self._live.is_silent(view, _LIVE_SECONDS)
            if view.window:
                entry["last_step"] = view.last_step
                entry["last_unix_ms"] = view.window[-1].unix_nanos // 1_000_000
        listed = sorted(found.values(), key=lambda entry: (not entry["live"], -entry["started_unix_ms"]))
        return JSONResponse({"runs": listed}, headers=_FRESH)

    def run(self, request: Request) -> Response:
        """Everything about one run: facts, numbers, and the chart's history."""
        view, source = self._find(request.path_params["run"])
        layer = _layer(view, request)
        body = {
            **facts(view.run),
            **numbers(view, layer=layer),
            "source": source,
            "silent_seconds": round(self._live.silent_seconds(view), 1),
            "points": chart(view.points, layer),
        }
        return JSONResponse(body, headers=_FRESH)

    async def events(self, request: Request) -> Response | ASGIApp:
        """The numbers of one run as they change."""
        run_id = request.path_params["run"]
        view = self._live.view(run_id)
        if view is None:
            await run_in_threadpool(self._find, run_id)
            return Response(status_code=204)  # a stored run does not change: tells the browser not to come back
        if self._streams >= _MOST_STREAMS:
            raise HTTPException(503, f"the event stream needs fewer than {_MOST_STREAMS} readers; close other pages")
        last = request.headers.get("last-event-id", request.query_params.get("after", ""))
        stream = EventStream(
            self._live,
            run_id,
            layer=_layer(view, request),
            after=int(last) if last.isdecimal() else None,
            branch=view.branch,
        )

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            self._streams += 1
            try:
                await stream(scope, receive, send)
            finally:
                self._streams -= 1

        return counted

    def _find(self, run_id: str) -> tuple[RunView, str]:
        """The run from memory, or its last steps replayed from the store."""
        view = self._live.view(run_id)
        if view is not None and view.window:
            return view, "memory"
        for status in self._store.list_runs():
            if status.run.run_id == run_id:
                history = RunHistory(status.run, self._live.window_steps)
                most = max(self._live.window_steps, _REPLAYED_ROWS // len(status.run.layers))
                for batch in self._store.read(run_id, columns=COLUMNS, limit=most):
                    history.append(batch)
                history.seen = status.last_unix_nanos / 1e9
                return history.view(), "store"
        if view is not None:
            return view, "memory"
        raise HTTPException(404, f"the page needs a run of this server, got run={run_id!r}; /api/runs lists them")

    @staticmethod
    def _listed(status: RunStatus) -> dict[str, Any]:
        entry = _entry(status.run)
        if status.stored_steps:
            entry["last_step"] = status.last_step
            entry["last_unix_ms"] = status.last_unix_nanos // 1_000_000
        return entry


def _entry(run: Run) -> dict[str, Any]:
    return {
        "run": run.run_id,
        "framework": run.world.framework,
        "optimizer": run.optimizer,
        "started_unix_ms": run.started_unix_nanos // 1_000_000,
        "num_layers": len(run.layers),
        "last_step": None,
        "last_unix_ms": None,
        "live": False,
    }


def _layer(view: RunView, request: Request) -> int | None:
    """Index of the layer that the request asks for; None for the whole model."""
    name = request.query_params.get("layer", "")
    if not name:
        return None
    if name not in view.layer_names:
        raise HTTPException(404, f"the page needs a layer of the run, got layer={name!r}; /api/runs/RUN lists them")
    return view.layer_names.index(name)


async def _healthy(_: Request) -> Response:
    return JSONResponse({"status": "ok"}, headers=_FRESH)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=_FRESH)


async def _failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, GradiometerError)
    status = {"NOT_FOUND": 404, "INVALID_ARGUMENT": 400}.get(error.status, 500)
    return JSONResponse({"error": str(error)}, status_code=status, headers=_FRESH)


class _File:
    """One file at an address of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await FileResponse(self._path, headers={"cache-control": "no-cache"})(scope, receive, send)


class _Static(StaticFiles):
    """The page's files: asked for again each time, and answered "not modified"; a versioned name is kept for good."""

    def file_response(self, full_path: Any, *args: Any, **options: Any) -> Response:
        response = super().file_response(full_path, *args, **options)
        versioned = Path(full_path).name.startswith("uplot-")
        response.headers["cache-control"] = "public, max-age=31536000, immutable" if versioned else "no-cache"
        return response


class _Guard:
    """Refuses requests for other hosts, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str]) -> None:
        self._app = app
        self._allowed = frozenset(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        asked = Headers(scope=scope).get("host", "")
        host = asked.rsplit(":", 1)[0] if not asked.endswith("]") else asked
        if "*" in self._allowed or host.lower() in self._allowed:
            await self._app(scope, receive, guarded)
            return
        refusal = JSONResponse(
            {"error": f"the server needs a request for a host in {sorted(self._allowed)}, got host={host!r}; "
             "use one of them, or start the server with --allow-remote"},
            status_code=421,
        )  # fmt: skip
        await refusal(scope, receive, guarded)
