"""The server's own metrics: how the ingest, the journal and the roller are doing."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["Meters"]

_COMMIT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Meters:
    """Counters and gauges in one registry, never the global one.

    Args:
        registry: where they are exposed; a fresh one where none is given.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry(auto_describe=True)
        self._batches = self._counter("ingest_batches", "Batches made durable")
        self._rows = self._counter("ingest_rows", "Rows (a layer at a step) made durable")
        self._duplicates = self._counter("ingest_duplicates", "Batches dropped because they were durable already")
        self._rejected = Counter(
            "gradiometer_ingest_rejected", "Streams and registrations refused", ("reason",), registry=self.registry
        )
        self._commit_failures = self._counter("ingest_commit_failures", "Transactions that the disk failed")
        self._commit_seconds = Histogram(
            "gradiometer_ingest_commit_seconds",
            "Time of one transaction of the journal, with its fsync",
            buckets=_COMMIT_BUCKETS,
            registry=self.registry,
        )
        self._streams = Gauge("gradiometer_ingest_streams", "Open streams of publishers", registry=self.registry)
        self._rolls = self._counter("store_rolls", "Times that a run's journal was rolled into segments")
        self._roll_failures = self._counter("store_roll_failures", "Times that rolling failed; it is tried again")

    def watch(self, *, queued_bytes: Callable[[], float], backlog: Callable[[], tuple[int, int]]) -> None:
        """Expose what is read at scrape time.

        Args:
            queued_bytes: bytes that wait to be committed.
            backlog: bytes and batches in the journal that are in no segment yet.
        """
        self._gauge("ingest_queue_bytes", "Bytes that wait to be committed", queued_bytes)
        self._gauge("journal_backlog_bytes", "Bytes in the journal and not in a segment", lambda: backlog()[0])
        self._gauge("journal_backlog_batches", "Batches in the journal and not in a segment", lambda: backlog()[1])

    def committed(self, seconds: float, batches: int, rows: int) -> None:
        """Count one transaction."""
        self._commit_seconds.observe(seconds)
        self._batches.inc(batches)
        self._rows.inc(rows)

    def commit_failed(self) -> None:
        """Count a transaction that the disk failed."""
        self._commit_failures.inc()

    def duplicate(self) -> None:
        """Count a batch that was durable already."""
        self._duplicates.inc()

    def rejected(self, status: str) -> None:
        """Count a refusal, by the name of its gRPC status."""
        self._rejected.labels(status.lower()).inc()

    def stream_opened(self) -> None:
        """Count a stream in."""
        self._streams.inc()

    def stream_closed(self) -> None:
        """Count a stream out."""
        self._streams.dec()

    def rolled(self) -> None:
        """Count a roll."""
        self._rolls.inc()

    def roll_failed(self) -> None:
        """Count a roll that failed."""
        self._roll_failures.inc()

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"gradiometer_{name}", text, registry=self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(f"gradiometer_{name}", text, registry=self.registry).set_function(read)
