import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gradiometer.collectors.outbox import Outbox
from gradiometer.collectors.packer import MAX_BATCH_BYTES, Packer
from gradiometer.collectors.slots import Slots
from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.columns import column_arrays, scalar_arrays
from gradiometer.stats_core import selection

NAMES = ("mean_sq_norm", "variance_trace")
LAYERS = 3


class Device:
    """Stands for an array on a device: its copy to the host is begun, then read."""

    def __init__(self, values: Any, log: list[str]) -> None:
        self._values = np.asarray(values)
        self._log = log

    def copy_to_host_async(self) -> None:
        self._log.append("begun")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self._log.append("read")
        return self._values

    def __float__(self) -> float:
        self._log.append("read")
        return float(self._values)


class Bench:
    def __init__(self, names: Sequence[str] = NAMES, layers: int = LAYERS) -> None:
        self.slots = Slots(len(names), layers)
        self.outbox = Outbox()
        self.packer = Packer(self.slots, self.outbox, names, layers)
        self.shape = (len(names), layers)

    def put_rows(self, step: Any, value: float = 0.0, **scalars: Any) -> None:
        self.slots.put_rows(step, 1000 + step, scalars, np.full(self.shape, value, np.float32))

    def put(self, step: Any, examples: Any, columns: dict[str, Any], **scalars: Any) -> None:
        self.slots.put(step, 1000, scalars, examples, columns)

    def packed(self) -> list[StepBatch]:
        first = self.outbox.last + 1
        self.packer.pack()
        bodies = [self.outbox.take(number, timeout=0) for number in range(first, self.outbox.last + 1)]
        return [StepBatch.FromString(body) for body in bodies if body is not None]


def test_the_steps_that_wait_become_one_batch_of_columns() -> None:
    bench = Bench()
    for step in range(3):
        bench.put_rows(step, float(step), loss=step / 2)
    (batch,) = bench.packed()
    assert list(batch.steps) == [0, 1, 2]
    assert list(batch.unix_nanos) == [1000, 1001, 1002]
    assert set(column_arrays(batch)) == set(NAMES)
    for values in column_arrays(batch).values():
        np.testing.assert_array_equal(values, [[0.0] * 3, [1.0] * 3, [2.0] * 3])
    np.testing.assert_array_equal(scalar_arrays(batch)["loss"], [0.0, 0.5, 1.0])
    assert len(bench.slots) == 0


def test_a_column_is_in_the_place_of_its_name() -> None:
    bench = Bench()
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    bench.slots.put_rows(0, 0, {}, rows)
    (batch,) = bench.packed()
    columns = column_arrays(batch)
    np.testing.assert_array_equal(columns["mean_sq_norm"], rows[:1])
    np.testing.assert_array_equal(columns["variance_trace"], rows[1:])


def test_nan_and_infinity_are_data() -> None:
    bench = Bench()
    rows = np.array([[np.nan, np.inf, -np.inf], [0, 1, 2]], np.float32)
    bench.slots.put_rows(0, 0, {"loss": math.inf}, rows)
    (batch,) = bench.packed()
    np.testing.assert_array_equal(column_arrays(batch)["mean_sq_norm"], rows[:1])
    assert scalar_arrays(batch)["loss"] == [math.inf]


def test_arrays_on_a_device_are_all_begun_before_the_first_is_waited_for() -> None:
    log: list[str] = []
    bench = Bench()
    for step in range(2):
        bench.put(step, Device(8, log), {"mean_sq_norm": Device([1.0, 2.0, 3.0], log)}, loss=Device(0.5, log))
    assert log == []
    (batch,) = bench.packed()
    assert log[:6] == ["begun"] * 6
    assert "begun" not in log[6:]
    np.testing.assert_array_equal(column_arrays(batch)["mean_sq_norm"], [[1.0, 2.0, 3.0]] * 2)
    scalars = scalar_arrays(batch)
    np.testing.assert_array_equal(scalars["loss"], [0.5, 0.5])
    np.testing.assert_array_equal(scalars["examples"], [8.0, 8.0])


def test_a_step_that_was_not_measured_is_no_step() -> None:
    bench = Bench()
    bench.put(0, np.array(8), {"mean_sq_norm": np.ones(3)})
    bench.put(1, np.array(0), {"mean_sq_norm": np.full(3, np.nan)})
    bench.put(2, np.array(8), {"mean_sq_norm": np.ones(3)})
    (batch,) = bench.packed()
    assert list(batch.steps) == [0, 2]
    assert bench.packer.dropped == 0


def test_the_clock_says_how_many_steps_lie_between() -> None:
    bench = Bench()
    for step in (0, 10, 15):
        bench.put(step, 8, {"mean_sq_norm": np.ones(3)})
    (batch,) = bench.packed()
    np.testing.assert_array_equal(scalar_arrays(batch)["clock_steps"], [np.nan, 10.0, 5.0])


def test_a_column_that_no_step_has_does_not_travel_and_one_that_some_have_is_nan_in_the_others() -> None:
    bench = Bench()
    bench.put(0, 8, {"mean_sq_norm": np.ones(3)})
    (batch,) = bench.packed()
    assert set(batch.columns) == {"mean_sq_norm"}
    bench.put(1, 8, {"mean_sq_norm": np.ones(3)})
    bench.put(2, 8, {"variance_trace": np.ones(3)})
    (batch,) = bench.packed()
    np.testing.assert_array_equal(column_arrays(batch)["variance_trace"], [[np.nan] * 3, [1.0] * 3])


def test_scalars_that_only_some_steps_have_are_nan_in_the_others() -> None:
    bench = Bench()
    bench.put_rows(0, loss=1.0)
    bench.put_rows(1, temperature=2.0, tokens=None)
    (batch,) = bench.packed()
    scalars = scalar_arrays(batch)
    np.testing.assert_array_equal(scalars["loss"], [1.0, np.nan])
    np.testing.assert_array_equal(scalars["temperature"], [np.nan, 2.0])
    assert "tokens" not in scalars


def test_steps_that_go_back_begin_a_batch_of_their_own() -> None:
    bench = Bench()
    for step in (5, 6, 6, 3, 4):
        bench.put_rows(step, float(step))
    assert [list(batch.steps) for batch in bench.packed()] == [[5, 6], [6], [3, 4]]
    assert bench.packer.dropped == 0


def test_a_batch_stays_below_what_servers_take() -> None:
    bench = Bench(selection.columns("default"), 10_000)
    for step in range(9):
        bench.put_rows(step)
    batches = bench.packed()
    assert [step for batch in batches for step in batch.steps] == list(range(9))
    assert len(batches) > 1
    assert all(batch.ByteSize() < MAX_BATCH_BYTES + 10_000 for batch in batches)


def test_a_step_larger_than_that_travels_alone() -> None:
    bench = Bench(selection.columns("default"), 80_000)
    bench.put_rows(0)
    bench.put_rows(1)
    assert [list(batch.steps) for batch in bench.packed()] == [[0], [1]]


def test_drops_are_published_with_every_step(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.slots = Slots(2, LAYERS, count=2)
    bench.packer = Packer(bench.slots, bench.outbox, NAMES, LAYERS)
    for step in range(5):
        bench.put_rows(step)
    with caplog.at_level(logging.WARNING, "gradiometer"):
        assert len(bench.packed()) == 1
        bench.put_rows(5)
        (batch,) = bench.packed()
        bench.packed()
    np.testing.assert_array_equal(scalar_arrays(batch)["dropped_steps"], [3.0])
    (line,) = caplog.records
    assert line.message.startswith("measurements are dropped, since they come faster than they can be sent")


def test_events_travel_with_the_steps_or_alone() -> None:
    bench = Bench()
    bench.packer.event(7, 5, "note", "hello")
    (batch,) = bench.packed()
    assert (len(batch.steps), batch.events[0].step, batch.events[0].kind, batch.events[0].text) == (
        0,
        7,
        "note",
        "hello",
    )
    bench.put_rows(8)
    bench.packer.event(8, 5, "long", "x" * 10_000)
    (batch,) = bench.packed()
    assert list(batch.steps) == [8]
    assert len(batch.events[0].text) == 4096


BAD = {
    "no number": (("step", 8, {"mean_sq_norm": np.ones(3)}), "record needs step as a number from 0, got step='step'"),
    "negative": ((-1, 8, {"mean_sq_norm": np.ones(3)}), "record needs step as a number from 0, got step=-1"),
    "another shape": (
        (1, 8, {"mean_sq_norm": np.ones(4)}),
        r"record needs columns of shape \(3,\), got mean_sq_norm of shape=\(4,\); give the publisher the params",
    ),
    "no array": ((1, 8, {"mean_sq_norm": np.array(["a", "b", "c"])}), "a measurement was dropped: could not convert"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_measurement_that_can_not_be_read_is_dropped_and_said_once(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad, message = BAD[case]
    bench = Bench()
    with caplog.at_level(logging.WARNING, "gradiometer"):
        bench.put_rows(0)
        bench.put(*bad)
        bench.put(*bad)
        bench.put_rows(2)
        (batch,) = bench.packed()
        bench.packed()
    assert list(batch.steps) == [0, 2]
    assert bench.packer.dropped == 2
    assert len(caplog.records) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(caplog.text)


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({"not a name": 1.0}, "record needs scalar names of letters"),
        ({"lr": "high"}, "record needs scalars that are numbers, got lr='high'"),
        ({"lr": np.ones(2)}, "record needs scalars that are numbers"),
    ],
)
def test_a_scalar_that_can_not_travel_is_left_out_and_said_once(
    scalars: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    with caplog.at_level(logging.WARNING, "gradiometer"):
        for step in range(2):
            bench.put_rows(step, loss=0.5, **scalars)
        (batch,) = bench.packed()
        bench.packed()
    assert set(batch.scalars) == {"loss", "dropped_steps"}
    assert len(caplog.records) == 1
    assert message in caplog.text


def test_a_column_outside_the_tier_is_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    with caplog.at_level(logging.WARNING, "gradiometer"):
        for step in range(2):
            bench.put(step, 8, {"mean_sq_norm": np.ones(3), "invented": np.ones(3)})
        (batch,) = bench.packed()
        bench.packed()
    assert set(batch.columns) == {"mean_sq_norm"}
    assert "record needs columns of the catalogue's tier, got column='invented'" in caplog.text
    assert len(caplog.records) == 1


def test_after_a_refusal_everything_is_dropped_and_counted() -> None:
    bench = Bench()
    bench.packer.refuse()
    for step in range(3):
        bench.put_rows(step)
    bench.packer.event(0, 0, "note", "")
    assert bench.packed() == []
    assert (bench.packer.dropped, len(bench.slots)) == (3, 0)


def test_with_no_room_in_the_outbox_measurements_wait() -> None:
    bench = Bench()
    bench.outbox = Outbox(memory_bytes=0)
    bench.packer = Packer(bench.slots, bench.outbox, NAMES, LAYERS)
    bench.put_rows(0)
    bench.packer.pack()
    bench.put_rows(1)
    bench.packer.pack()
    assert (bench.outbox.last, len(bench.slots)) == (1, 1)
    bench.outbox.acknowledge(1)
    bench.packer.pack()
    assert (bench.outbox.last, len(bench.slots)) == (2, 0)
