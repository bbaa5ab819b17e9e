"""Server-sent events: one run's numbers, pushed to a page as they change.

A stream never queues numbers. It is woken by the run's batches, then says what the run looks like *now* and
which points of the chart are new; a slow reader gets fewer, larger updates. The id of an event is the last
point's step, so a reader that comes back with ``Last-Event-ID`` gets what it missed. A reader that takes
nothing for ``patience`` seconds is let go.
"""

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.types import Message, Receive, Scope, Send

from gradiometer.server.live import Live, Subscription
from gradiometer.server.page import chart, numbers
from gradiometer.server.view import RunView

__all__ = ["EventStream"]


class EventStream:
    """An ASGI response that follows one run.

    Args:
        live: where the run is.
        run_id: a run in memory.
        layer: index of the layer that the chart shows; None for the whole model.
        after: step of the last point that the reader has; None for none.
        branch: the run's branch that those points are of, see `RunView`.
        heartbeat: seconds of silence after which a comment is sent.
        pace: shortest time between updates, in seconds; large models are paced by their size.
        patience: seconds that a reader may take nothing.
    """

    def __init__(
        self,
        live: Live,
        run_id: str,
        *,
        layer: int | None = None,
        after: int | None = None,
        branch: int = 0,
        heartbeat: float = 15.0,
        pace: float = 0.25,
        patience: float = 30.0,
    ) -> None:
        self._live = live
        self._run_id = run_id
        self._layer = layer
        self._after = after
        self._branch = branch
        self._heartbeat = heartbeat
        self._pace = pace
        self._patience = patience

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Send updates until the reader or the server goes away."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        reader = asyncio.ensure_future(_gone(receive))
        async with self._live.subscribe(self._run_id, limit=1) as subscription:
            writer = asyncio.ensure_future(self._follow(subscription, send))
            try:
                await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (reader, writer):
                    task.cancel()
                ended = (await asyncio.gather(reader, writer, return_exceptions=True))[1]
        # A reader that went away or took too long is no fault of ours; anything else is, and is heard of.
        if isinstance(ended, Exception) and not isinstance(ended, OSError):  # a TimeoutError is an OSError
            raise ended

    async def _follow(self, subscription: Subscription, send: Send) -> None:
        async def say(text: str) -> None:
            await self._in_time(send({"type": "http.response.body", "body": text.encode(), "more_body": True}))

        await say("retry: 2000\n\n")
        while True:
            subscription.skip()
            view = self._live.view(self._run_id)
            if view is None:
                break
            if view.window:
                await say(await run_in_threadpool(self._update, view))
            await asyncio.sleep(max(self._pace, min(5.0, len(view.layer_names) / 1000)))
            while True:
                try:
                    await asyncio.wait_for(anext(subscription), self._heartbeat)
                    break
                except TimeoutError:
                    await say(": still here\n\n")
                except StopAsyncIteration:
                    await self._in_time(send({"type": "http.response.body", "body": b"", "more_body": False}))
                    return

    def _update(self, view: RunView) -> str:
        """One event: the numbers, and the points that the reader does not have."""
        newest = view.points[-1].step if view.points else None
        # After a job went back to a checkpoint, points that the reader has are gone: it gets all of them anew.
        known = self._after
        anew = known is None or newest is None or known > newest or view.branch != self._branch
        points = view.points if anew else [point for point in view.points if known is not None and point.step > known]
        body: dict[str, Any] = {
            **numbers(view, layer=self._layer),
            "points": chart(points, self._layer),
            "anew": anew,
            "silent_seconds": round(self._live.silent_seconds(view), 1),
        }
        self._after, self._branch = newest, view.branch
        text = json.dumps(body, allow_nan=False, separators=(",", ":"))
        return (f"id: {newest}\n" if newest is not None else "") + f"event: update\ndata: {text}\n\n"

    async def _in_time(self, sending: Awaitable[None]) -> None:
        async with asyncio.timeout(self._patience):
            await sending


async def _gone(receive: Receive) -> None:
    """Wait until the reader has closed the connection."""
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return
