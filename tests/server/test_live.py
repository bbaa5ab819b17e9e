import asyncio
import threading

import pytest

from gradiometer.server.live import Live
from tests.webserver import SECOND, make_batch, make_run


class Clock:
    now = 2_000_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_run_that_was_heard_of_last_comes_first(clock):
    live = Live(clock=clock)
    for name in ("a", "b", "c"):
        live.register(make_run(name))
    live.append("b", make_batch([0]))
    clock.now += 1
    live.append("a", make_batch([0]))
    assert [view.run.run_id for view in live.runs()][:2] == ["a", "b"]
    assert live.view("nobody") is None


def test_memory_is_bounded_and_the_longest_silent_run_goes(clock):
    live = Live(max_runs=2, clock=clock)
    for name in ("a", "b"):
        live.register(make_run(name))
        live.append(name, make_batch([0]))
        clock.now += 1
    live.append("a", make_batch([1]))
    live.register(make_run("c"))
    assert {view.run.run_id for view in live.runs()} == {"a", "c"}


def test_a_batch_of_a_run_that_is_not_kept_is_no_error():
    live = Live()
    live.append("gone", make_batch([0]))
    assert live.runs() == []


def test_a_batch_read_back_from_the_store_is_no_sign_of_life(clock):
    live = Live(clock=clock)
    live.register(make_run("a", started_unix_nanos=0))
    live.append("a", make_batch([0], nanos=[5_000_000_000]), recovered=True)
    assert live.silent_seconds(live.view("a")) == clock.now - 5
    live.append("a", make_batch([1]))
    assert live.silent_seconds(live.view("a")) == 0


def test_a_job_of_slow_steps_is_not_taken_for_a_silent_one(clock):
    live = Live(clock=clock)
    live.register(make_run("a", started_unix_nanos=0))
    live.append("a", make_batch([0, 1, 2], nanos=[0, 200 * SECOND, 400 * SECOND]))
    clock.now += 700
    assert not live.is_silent(live.view("a"), 60)
    clock.now += 200
    assert live.is_silent(live.view("a"), 60)


def test_subscribers_hear_registrations_and_batches_of_their_run():
    async def scenario() -> tuple[list, list]:
        live = Live()
        async with live.subscribe("a") as one, live.subscribe() as all_runs:
            live.register(make_run("a"))
            live.register(make_run("b"))
            live.append("b", make_batch([0]))
            live.append("a", make_batch([1]))
            live.close()
            return [item async for item in one], [item async for item in all_runs]

    one, everything = asyncio.run(scenario())
    assert [(run, type(message).__name__) for run, message in one] == [("a", "Run"), ("a", "StepBatch")]
    assert [run for run, _ in everything] == ["a", "b", "b", "a"]


def test_what_is_read_back_from_the_store_is_not_pushed():
    async def scenario() -> list:
        live = Live()
        live.register(make_run("a"))
        async with live.subscribe() as subscription:
            live.append("a", make_batch([0]), recovered=True)
            live.close()
            return [item async for item in subscription]

    assert asyncio.run(scenario()) == []


def test_a_slow_reader_misses_the_oldest_and_the_loss_is_counted():
    async def scenario() -> tuple[list[int], int]:
        live = Live()
        live.register(make_run("a"))
        async with live.subscribe("a", limit=3) as subscription:
            for step in range(10):
                live.append("a", make_batch([step]))
            live.close()
            return [batch.steps[0] async for _, batch in subscription], subscription.dropped

    assert asyncio.run(scenario()) == ([7, 8, 9], 7)


def test_a_waiting_reader_is_woken():
    async def scenario() -> int:
        live = Live()
        live.register(make_run("a"))
        async with live.subscribe("a") as subscription:
            waiting = asyncio.ensure_future(anext(subscription))
            await asyncio.sleep(0)
            live.append("a", make_batch([3]))
            _, batch = await asyncio.wait_for(waiting, 5)
            return batch.steps[0]

    assert asyncio.run(scenario()) == 3


def test_a_subscription_after_the_end_ends_at_once():
    async def scenario() -> list:
        live = Live()
        live.close()
        async with live.subscribe() as subscription:
            return [item async for item in subscription]

    assert asyncio.run(scenario()) == []


def test_views_are_read_on_other_threads_while_batches_arrive():
    live = Live()
    live.register(make_run("a", layers=50))
    stop, seen, failures = threading.Event(), [], []

    def read() -> None:
        while not stop.is_set():
            view = live.view("a")
            try:
                if view.window:
                    numbers = [step.step for step in view.window]
                    assert numbers == list(range(numbers[0], numbers[-1] + 1))
                    assert view.model("noise_scale") > 0
                    seen.append(numbers[-1])
            except BaseException as error:
                failures.append(error)
                raise

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for step in range(300):
        live.append("a", make_batch([step], layers=50))
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert seen
