"""The server's own metrics: names that promtool takes, in a registry of their own."""

import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

from gradiometer.server.meters import Meters


def test_what_happened_is_counted_and_exposed() -> None:
    meters = Meters()
    meters.watch(queued_bytes=lambda: 5, backlog=lambda: (70, 7))
    meters.committed(0.003, batches=2, rows=20)
    meters.commit_failed()
    meters.duplicate()
    meters.rejected("NOT_FOUND")
    meters.stream_opened()
    meters.stream_opened()
    meters.stream_closed()
    meters.rolled()
    meters.roll_failed()
    text = prometheus_client.generate_latest(meters.registry).decode()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }
    assert samples == {
        ("gradiometer_ingest_batches_total",): 2,
        ("gradiometer_ingest_rows_total",): 20,
        ("gradiometer_ingest_duplicates_total",): 1,
        ("gradiometer_ingest_rejected_total", "not_found"): 1,
        ("gradiometer_ingest_commit_failures_total",): 1,
        ("gradiometer_ingest_commit_seconds_count",): 1,
        ("gradiometer_ingest_commit_seconds_sum",): 0.003,
        ("gradiometer_ingest_streams",): 1,
        ("gradiometer_ingest_queue_bytes",): 5,
        ("gradiometer_journal_backlog_bytes",): 70,
        ("gradiometer_journal_backlog_batches",): 7,
        ("gradiometer_store_rolls_total",): 1,
        ("gradiometer_store_roll_failures_total",): 1,
    }


def test_nothing_is_registered_globally() -> None:
    Meters()
    Meters()
    names = {family.name for family in prometheus_client.REGISTRY.collect()}
    assert not {name for name in names if name.startswith("gradiometer_")}
