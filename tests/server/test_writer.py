"""The writer thread: groups of batches to a transaction, in order, and no way for one fault to stop it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gradiometer.server.journal import Journal
from gradiometer.server.meters import Meters
from gradiometer.server.writer import Writer
from gradiometer.stats_core.errors import OurFault, PeerFault, StoreError
from tests.server.batches import entry, make_batch, make_run


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.db")
    journal.register(make_run())
    yield journal
    journal.close()


@pytest.fixture
def meters() -> Meters:
    return Meters()


@pytest.fixture
def writer(journal: Journal, meters: Meters) -> Iterator[Writer]:
    writer = Writer(journal, meters)
    yield writer
    writer.close()


def value(meters: Meters, name: str) -> float:
    return meters.registry.get_sample_value(f"gradiometer_{name}") or 0.0


def hold(writer: Writer) -> threading.Event:
    """Keep the writer busy until the event is set, as a slow disk would."""
    release, busy = threading.Event(), threading.Event()

    def wait(_: Journal) -> None:
        busy.set()
        release.wait(30)

    writer.call(wait)
    assert busy.wait(30)
    return release


def test_what_waits_while_a_transaction_is_synced_shares_the_next_one(writer: Writer, meters: Meters) -> None:
    release = hold(writer)
    futures = [
        writer.append(entry(sequence, make_batch(sequence), collector_id=collector))
        for sequence in range(1, 26)
        for collector in "abcd"
    ]
    assert writer.queued_bytes > 100 * 30
    release.set()
    assert all(future.result(30) for future in futures)
    assert value(meters, "ingest_commit_seconds_count") == 1, "100 batches of 4 streams in one transaction"
    assert value(meters, "ingest_batches_total") == 100
    assert value(meters, "ingest_rows_total") == 200
    assert writer.queued_bytes == 0


def test_a_batch_known_already_is_answered_false(writer: Writer, meters: Meters) -> None:
    assert writer.append(entry(1, make_batch(1))).result(30) is True
    assert writer.append(entry(1, make_batch(1))).result(30) is False
    assert value(meters, "ingest_batches_total") == 1


def test_a_failed_transaction_fails_all_its_batches_and_the_writer_goes_on(
    writer: Writer, journal: Journal, meters: Meters
) -> None:
    writer.call(lambda j: j._db.execute("PRAGMA query_only = ON")).result(30)
    release = hold(writer)
    futures = [writer.append(entry(sequence, make_batch(sequence))) for sequence in (1, 2)]
    release.set()
    for future in futures:
        with pytest.raises(StoreError, match="publishers will try again"):
            future.result(30)
    assert value(meters, "ingest_commit_failures_total") == 1
    writer.call(lambda j: j._db.execute("PRAGMA query_only = OFF")).result(30)
    assert writer.append(entry(1, make_batch(1))).result(30) is True


def test_a_spell_of_failures_is_one_line_and_its_end_another(writer: Writer) -> None:
    with capture_logs() as lines:
        for sequence in (1, 2):
            writer.call(lambda j: j._db.execute("PRAGMA query_only = ON")).result(30)
            for _ in range(3):
                with pytest.raises(StoreError):
                    writer.append(entry(sequence, make_batch(sequence))).result(30)
            writer.call(lambda j: j._db.execute("PRAGMA query_only = OFF")).result(30)
            with pytest.raises(OurFault):  # it lay behind a failed one: nothing was written
                writer.append(entry(sequence + 1, make_batch(1))).result(30)
            for _ in range(2):
                writer.append(entry(sequence, make_batch(sequence))).result(30)
    assert [(line["log_level"], line["event"]) for line in lines] == 2 * [
        ("error", "batches can't be stored"),
        ("info", "batches are stored again"),
    ]
    assert lines[0]["reason"] == "attempt to write a readonly database"
    assert "see the disk, publishers will try again" in lines[0]["why"]
    assert lines[1]["failed_commits"] == 3


def test_batches_behind_a_failed_one_do_not_overtake_it(writer: Writer, journal: Journal) -> None:
    writer.call(lambda j: j._db.execute("PRAGMA query_only = ON")).result(30)
    failed = writer.append(entry(1, make_batch(1)))
    with pytest.raises(StoreError):
        failed.result(30)
    writer.call(lambda j: j._db.execute("PRAGMA query_only = OFF")).result(30)
    behind = writer.append(entry(2, make_batch(2)))
    with pytest.raises(Exception, match="needs sequence=1 next, got sequence=2"):
        behind.result(30)
    assert journal.durable_sequence("mnist", "c") == 0


def test_a_call_is_made_in_order_with_the_batches(writer: Writer, journal: Journal) -> None:
    release = hold(writer)
    first = writer.append(entry(1, make_batch(1)))
    seen = writer.call(lambda j: j.durable_sequence("mnist", "c"))
    second = writer.append(entry(2, make_batch(2)))
    release.set()
    assert (first.result(30), seen.result(30), second.result(30)) == (True, 1, True)


def test_a_call_that_raises_or_was_given_up_does_not_stop_the_writer(writer: Writer) -> None:
    release = hold(writer)
    other = make_run(layers=("conv",))
    refused = writer.call(lambda j: j.register(other))
    given_up = writer.call(lambda j: j.register(make_run("never")))
    assert given_up.cancel()
    release.set()
    with pytest.raises(PeerFault, match="as first registered"):
        refused.result(30)
    assert writer.call(lambda j: sorted(j.runs)).result(30) == ["mnist"]


def test_closing_commits_what_is_queued_and_refuses_what_comes_later(journal: Journal, meters: Meters) -> None:
    writer = Writer(journal, meters)
    release = hold(writer)
    queued = writer.append(entry(1, make_batch(1)))
    threading.Timer(0.01, release.set).start()
    writer.close()
    assert queued.result(0) is True
    for late in (writer.append(entry(2, make_batch(2))), writer.call(lambda j: j.runs)):
        with pytest.raises(StoreError, match="got a server that is stopping"):
            late.result(0)
    writer.close()
