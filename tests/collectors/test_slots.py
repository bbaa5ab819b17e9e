import sys
import threading

import numpy as np
import pytest

from gradiometer.collectors.slots import Slots
from gradiometer.stats_core.examples import Outliers
from gradiometer.stats_core.histogram import sketch_rows


def rows(value: float, columns: int = 2, layers: int = 3) -> np.ndarray:
    return np.full((columns, layers), value, np.float32)


def test_what_goes_in_comes_out_in_order() -> None:
    slots = Slots(2, 3, count=4)
    for step in range(4):
        slots.put_rows(step, step * 10, {"loss": step}, rows(step))
    for step in range(4):
        found = slots.take()
        assert found is not None
        assert (found.step, found.unix_nanos, found.scalars) == (step, step * 10, {"loss": step})
        np.testing.assert_array_equal(slots.rows(found), rows(step))
        slots.release(found)
    assert slots.take() is None


def test_rows_are_copied_so_that_their_memory_may_be_used_again() -> None:
    slots = Slots(2, 3)
    given = rows(1.0)
    slots.put_rows(0, 0, {}, given)
    given[:] = 7.0
    found = slots.take()
    assert found is not None
    np.testing.assert_array_equal(slots.rows(found), rows(1.0))


def test_what_does_not_fit_into_rows_travels_beside_them_as_it_is() -> None:
    slots = Slots(2, 3)
    sketches = {"example_norm": sketch_rows(np.ones((3, 4), np.float32))}
    found, ids = Outliers(np.array([1]), np.array([4.0])), ["a", "b"]
    slots.put_rows(0, 0, {}, rows(0), sketches, found, ids)
    slots.put(1, 0, {}, 8, {}, sketches, found, ids)
    slots.put(2, 0, {}, 8, {})
    taken = [slots.take() for _ in range(3)]
    for one in taken[:2]:
        assert one is not None
        assert one.sketches is sketches
        assert one.outliers is found
        assert one.ids is ids
    assert taken[2] is not None
    assert (taken[2].sketches, taken[2].outliers, taken[2].ids) == (None, None, None)


def test_without_a_free_slot_a_step_is_dropped_and_counted() -> None:
    slots = Slots(2, 3, count=2)
    for step in range(5):
        slots.put_rows(step, 0, {}, rows(step))
    assert (len(slots), slots.dropped) == (2, 3)
    first = slots.take()
    assert first is not None
    slots.release(first)
    slots.put(5, 0, {}, 8, {})
    slots.put(6, 0, {}, 8, {})
    assert slots.dropped == 4
    left = [slots.take(), slots.take()]
    assert [m.step for m in left if m] == [1, 5]
    assert [m.dropped for m in left if m] == [0, 3]


def test_what_is_put_back_is_the_next_again() -> None:
    slots = Slots(1, 1)
    for step in range(3):
        slots.put(step, 0, {}, 1, {})
    first, second = slots.take(), slots.take()
    assert first is not None
    assert second is not None
    slots.put_back(second)
    assert [m.step for m in (slots.take(), slots.take()) if m] == [1, 2]


def test_pressure_is_told_when_more_than_half_is_taken() -> None:
    slots = Slots(1, 1, count=4)
    slots.put(0, 0, {}, 1, {})
    slots.put(1, 0, {}, 1, {})
    assert not slots.pressure.is_set()
    slots.put(2, 0, {}, 1, {})
    assert slots.pressure.is_set()


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((3, 2), np.float32),
        np.zeros((2, 3), np.float64),
        np.zeros((3, 2), np.float32).T,
        np.zeros((2, 4), np.float32),
        np.zeros(6, np.float32),
    ],
    ids=["transposed", "float64", "not contiguous", "too many layers", "flat"],
)
def test_rows_of_another_form_are_refused_and_take_no_slot(wrong: np.ndarray) -> None:
    slots = Slots(2, 3, count=1)
    with pytest.raises(
        TypeError, match=r"record_rows needs rows of float32, C-contiguous, of shape \(2, 3\), got shape"
    ):
        slots.put_rows(0, 0, {}, wrong)
    slots.put_rows(0, 0, {}, rows(1.0))
    assert (len(slots), slots.dropped) == (1, 0)


def test_the_number_of_slots_is_bounded_by_memory() -> None:
    assert Slots(15, 1).count == 4096
    assert Slots(15, 1000).count == (16 << 20) // 60_000
    assert Slots(15, 100_000).count == 16
    assert Slots(15, 1000, beside=1 << 20).count == 16
    assert Slots(1, 1, beside=(1 << 20) - 4).count == 16
    assert Slots(1, 1, beside=(1 << 18) - 4).count == 64


def test_many_producers_lose_nothing_but_what_is_counted() -> None:
    slots = Slots(1, 64, count=8)
    producers, each = 4, 500
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:

        def produce(number: int) -> None:
            for step in range(each):
                slots.put_rows(step, number, {}, np.full((1, 64), step, np.float32))

        threads = [threading.Thread(target=produce, args=(number,)) for number in range(producers)]
        for thread in threads:
            thread.start()
        seen: dict[int, list[int]] = {number: [] for number in range(producers)}
        while any(thread.is_alive() for thread in threads) or len(slots):
            found = slots.take()
            if found is not None:
                assert (slots.rows(found) == found.step).all()
                seen[found.unix_nanos].append(found.step)
                slots.release(found)
    finally:
        sys.setswitchinterval(interval)
    assert sum(map(len, seen.values())) + slots.dropped == producers * each
    assert all(steps == sorted(set(steps)) for steps in seen.values())
