import numpy as np
import pytest

from gradiometer.protos.batch_pb2 import Event
from gradiometer.protos.run_pb2 import Coverage
from gradiometer.server.history import RunHistory
from tests.webserver import SECOND, make_batch, make_run


def history_of(*batches, window=4, layers=3, **options) -> RunHistory:
    history = RunHistory(make_run(layers=layers), window, **options)
    for batch in batches:
        history.append(batch)
    return history


def steps(history: RunHistory) -> list[int]:
    return [step.step for step in history.view().window]


def test_the_window_holds_the_last_steps():
    assert steps(history_of(make_batch([0, 1, 2]), make_batch([3, 4, 5]))) == [2, 3, 4, 5]


def test_a_step_that_arrives_again_replaces_what_was_there():
    history = history_of(make_batch([0, 1]), make_batch([1], loss=9.0))
    assert steps(history) == [0, 1]
    assert history.view().scalar("loss") == (9.0, 1)
    assert history.view().received == 2


def test_a_job_that_goes_back_to_a_checkpoint_drops_what_was_ahead():
    history = history_of(make_batch([0, 1, 2, 3]), make_batch([1], nanos=[100 * SECOND], loss=9.0))
    view = history.view()
    assert steps(history) == [0, 1]
    assert view.scalar("loss") == (9.0, 1)
    assert [point.step for point in view.points] == [0, 1]
    assert view.branch == 1


def test_a_late_batch_goes_to_its_place_and_drops_nothing():
    history = history_of(make_batch([5]), make_batch([7]), make_batch([6]), make_batch([4]))
    assert steps(history) == [4, 5, 6, 7]
    assert history.view().branch == 0


def test_a_late_batch_older_than_the_window_is_passed_over():
    assert steps(history_of(make_batch([5, 6, 7, 8]), make_batch([1]))) == [5, 6, 7, 8]


def test_a_view_does_not_change_when_more_arrives():
    history = history_of(make_batch([0]))
    before = history.view()
    assert history.view() is before
    history.append(make_batch([1]))
    assert before.last_step == 0
    assert history.view().last_step == 1


def test_the_window_keeps_rows_and_not_whole_messages():
    batch = make_batch(list(range(100)))
    row = history_of(batch).view().window[0].columns["batch_variance"]
    assert row.base is None


def test_the_history_thins_itself_out_and_keeps_the_whole_run():
    history = history_of(*(make_batch([step], layers=1000) for step in range(400)), layers=1000, history_bytes=1 << 20)
    points = [point.step for point in history.view().points]
    assert 40 <= len(points) <= 87  # 1 MiB holds 87 points of 3 float32 each for 1,000 layers
    assert points[0] == 0
    assert points[-1] >= 390
    assert set(np.diff(points)) == {8}


def test_a_point_is_a_mean_over_the_window_that_ends_there():
    history = history_of(make_batch([0]), make_batch([1]), make_batch([2]), window=2)
    last, window = history.view().points[-1], history.view().window
    expected = np.mean([step.columns["batch_variance"] for step in window], axis=0)
    np.testing.assert_allclose(last.layers[0], expected, rtol=1e-6)


def test_a_changed_coverage_and_events_are_shown():
    batch = make_batch([0])
    batch.coverage.CopyFrom(Coverage(num_params=10, num_params_measured=5))
    batch.events.append(Event(step=0, kind="collector-off", text="a hook raised"))
    view = history_of(batch).view()
    assert view.run.coverage.num_params_measured == 5
    assert [event.kind for event in view.events] == ["collector-off"]


def test_a_later_registration_changes_the_facts_and_keeps_the_numbers():
    history = history_of(make_batch([0]))
    history.register(make_run(optimizer="AVGrad"))
    assert history.view().run.optimizer == "AVGrad"
    assert history.view().last_step == 0


def test_a_window_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1, got window_steps=0; 32 is the default"):
        RunHistory(make_run(), 0)
