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
from gradiometer.protos.columns import COLUMN_DTYPE, column_arrays, scalar_arrays
from gradiometer.protos.distributions import pack_histograms
from gradiometer.stats_core import selection
from gradiometer.stats_core.examples import Outliers, outliers
from gradiometer.stats_core.histogram import Sketch, sketch_rows

NAMES = ("mean_sq_norm", "variance_trace")
LAYERS = 3


class Device:
    """Stands for an array on a device: its copy to the host is begun, then read."""

    def __init__(self, values: Any, log: list[str]) -> None:
        self._values = np.asarray(values)
        self._log = log

    def __len__(self) -> int:
        return len(self._values)

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

    def put_beside(
        self, step: Any, *, ids: Any = None, found: Any = None, scalars: Any = None, **sketches: Any
    ) -> None:
        rows = np.zeros(self.shape, np.float32)
        self.slots.put_rows(step, 1000 + step, scalars or {}, rows, sketches, found, ids)

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


# -- distributions, single examples, units -----------------------------------------------------------------------------


def sketch(layers: int = LAYERS, values: int = 40) -> Sketch:
    return sketch_rows(np.exp(np.random.default_rng(0).standard_normal((layers, values))).astype(np.float32))


def test_sketches_and_examples_belong_to_their_step() -> None:
    bench = Bench()
    bench.put_rows(0)
    bench.put_beside(3, example_norm=sketch(), found=outliers(np.array([1.0, 4.0]), 2), ids=["a", "b"])
    bench.put_beside(5, element_t_sq=sketch())
    (batch,) = bench.packed()
    assert list(batch.steps) == [0, 3, 5]
    assert [(one.step_index, one.layer, one.statistic) for one in batch.histograms] == [
        *((1, layer, "example_norm") for layer in range(3)),
        *((2, layer, "element_t_sq") for layer in range(3)),
    ]
    assert [(one.step_index, one.layer, one.place, one.example_id, one.sq_norm) for one in batch.examples] == [
        (1, -1, 0, "b", 4.0),
        (1, -1, 1, "a", 1.0),
    ]


def test_sketches_on_a_device_are_begun_with_the_rest() -> None:
    log: list[str] = []
    bench = Bench()
    arrays = Sketch(*(Device(part, log) for part in sketch()))
    found = Outliers(Device([0], log), Device([4.0], log))
    bench.slots.put(0, 1000, {}, 8, {"mean_sq_norm": np.ones(3)}, {"example_norm": arrays}, found)
    (batch,) = bench.packed()
    assert log[:5] == ["begun"] * 5
    assert "begun" not in log[5:]
    assert len(batch.histograms) == 3
    assert len(batch.examples) == 1


def test_histograms_count_towards_the_size_of_a_batch() -> None:
    bench = Bench(layers=2000)
    one = sketch(2000)
    size = sum(message.ByteSize() for message in pack_histograms("example_norm", one, 0))
    for step in range(20):
        bench.put_beside(step, example_norm=one)
    batches = bench.packed()
    assert [step for batch in batches for step in batch.steps] == list(range(20))
    assert all(len(batch.histograms) == 2000 * len(batch.steps) for batch in batches)
    assert all(batch.ByteSize() < MAX_BATCH_BYTES + 10_000 for batch in batches)
    assert len(batches) == math.ceil(20 / (MAX_BATCH_BYTES // (size + 5 * 2000 + 2 * 2000 * 4)))
    assert bench.packer.dropped == 0


def test_of_a_step_that_is_too_large_distributions_are_left_out_and_not_the_step(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = sketch(values=3), sketch(values=300)
    room = sum(message.ByteSize() + 5 for message in pack_histograms("element_t_sq", small, 1))
    monkeypatch.setattr("gradiometer.collectors.packer.MAX_STEP_BYTES", 2 * LAYERS * 4 + room)
    bench = Bench()
    with caplog.at_level(logging.WARNING, "gradiometer"):
        for step in range(2):
            bench.put_beside(step, example_norm=large, element_t_sq=small)
        (batch,) = bench.packed()
        bench.packed()
    assert list(batch.steps) == [0, 1]
    assert [one.statistic for one in batch.histograms] == ["element_t_sq"] * 6
    assert bench.packer.dropped == 0
    (line,) = caplog.records
    assert "got more with the histograms of 'example_norm' for layers=3; measure fewer layers" in line.message


@pytest.mark.parametrize(
    ("sketches", "message"),
    [
        ({"no_such": sketch()}, "got sketch='no_such' for layers=3"),
        ({"noise_scale": sketch()}, r"record needs sketches of ('example_norm', "),
        ({"example_norm": sketch(4)}, "for 3 layers, got sketch='example_norm' for layers=4"),
        ({"example_norm": "what"}, "histograms were left out"),
        ({"example_norm": Sketch(np.array(["a"] * 3), np.ones((3, 2)), np.ones(3))}, "could not convert"),
    ],
    ids=["unknown", "no histogram", "another shape", "no sketch", "no numbers"],
)
def test_a_sketch_that_can_not_travel_is_left_out_and_said_once(
    sketches: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    with caplog.at_level(logging.WARNING, "gradiometer"):
        for step in range(2):
            bench.put_beside(step, element_t_sq=sketch(), **sketches)
        (batch,) = bench.packed()
        bench.packed()
    assert list(batch.steps) == [0, 1]
    assert [one.statistic for one in batch.histograms] == ["element_t_sq"] * 6
    assert bench.packer.dropped == 0
    assert len(caplog.records) == 1
    assert message in caplog.text


class Hostile:
    def __getitem__(self, row: int) -> object:
        raise RuntimeError("not today")


@pytest.mark.parametrize("ids", [["a"], Hostile(), 7], ids=["too few", "raising", "no sequence"])
def test_ids_that_can_not_be_read_give_way_to_rows_and_are_said_once(
    ids: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    with caplog.at_level(logging.WARNING, "gradiometer"):
        for step in range(2):
            bench.put_beside(step, found=outliers(np.array([1.0, 4.0]), 2), ids=ids)
        (batch,) = bench.packed()
        bench.packed()
    assert [one.example_id for one in batch.examples] == ["1", "0"] * 2
    assert len(caplog.records) == 1
    assert "ids of examples were left out, their rows stand for them" in caplog.text


def test_examples_that_are_none_are_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    with caplog.at_level(logging.WARNING, "gradiometer"):
        bench.put_beside(0, found=Outliers(np.array(["x"]), np.array([1.0])))
        (batch,) = bench.packed()
        bench.packed()
    assert list(batch.steps) == [0]
    assert not batch.examples
    assert "examples that stand out were left out: invalid literal" in caplog.text


def test_in_another_unit_columns_travel_as_they_are_and_all_else_in_true_values() -> None:
    bench = Bench()
    squares = np.array([1.0, 2.0, 3.0])
    scalars = {"unit_exponent": np.array(60), "norm_max": 3.0, "parallel_variance": 5.0, "grad_norm": 7.0, "loss": 0.5}
    sketches = {"example_norm": sketch(), "element_t_sq": sketch()}
    bench.slots.put(4, 0, scalars, 8, {"mean_sq_norm": squares}, sketches, outliers(squares, 1))
    bench.put_rows(5, norm_max=3.0)
    (batch,) = bench.packed()
    found = scalar_arrays(batch)
    np.testing.assert_array_equal(found["unit_exponent"], [60.0, np.nan])
    np.testing.assert_array_equal(found["norm_max"], [3.0 * 2.0**60, 3.0])
    np.testing.assert_array_equal(found["parallel_variance"], [5.0 * 2.0**120, np.nan])
    np.testing.assert_array_equal(found["grad_norm"], [7.0, np.nan])
    assert np.frombuffer(batch.columns["mean_sq_norm"], COLUMN_DTYPE)[:3].tolist() == squares.tolist()
    np.testing.assert_array_equal(column_arrays(batch)["mean_sq_norm"][0], squares * 2.0**120)
    assert batch.examples[0].sq_norm == 3.0 * 2.0**120
    plain = {one.statistic: one for one in pack_histograms("example_norm", sketch(), 0)}
    assert batch.histograms[2].statistic == "example_norm"
    shifted = [index - 8 * 60 for index in batch.histograms[2].positive_index]
    assert shifted == list(plain["example_norm"].positive_index)
    assert batch.histograms[3] == pack_histograms("element_t_sq", sketch(), 0)[0]


def test_the_plain_unit_is_not_sent() -> None:
    bench = Bench()
    bench.put_rows(0, unit_exponent=0.0)
    bench.put_rows(1, unit_exponent=math.nan)
    (batch,) = bench.packed()
    assert set(batch.scalars) == {"dropped_steps"}


def test_a_measurement_that_can_not_be_read_leaves_nothing_to_the_next() -> None:
    bench = Bench()
    bench.put(0, 8, {"mean_sq_norm": np.ones(3), "variance_trace": np.ones(4)})
    bench.put(1, 8, {"variance_trace": np.ones(3)})
    bench.put(2, 8, {"mean_sq_norm": np.ones(3)})
    (batch,) = bench.packed()
    np.testing.assert_array_equal(column_arrays(batch)["mean_sq_norm"], [[np.nan] * 3, [1.0] * 3])
