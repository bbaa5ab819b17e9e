import numpy as np
import pytest

from gradiometer.protos.columns import COLUMN_DTYPE
from gradiometer.protos.run_pb2 import Run
from gradiometer.server.view import COMPARED, Layers, MeasuredStep, RunView
from tests.webserver import SECOND, make_run


def view_of(rows: list[dict[str, list[float]]], *, run: Run | None = None, **scalars: list[float]) -> RunView:
    run = run or make_run(layers=2)
    steps = [
        MeasuredStep(
            number,
            number * SECOND,
            {name: np.array(values, COLUMN_DTYPE) for name, values in row.items()},
            {name: values[number] for name, values in scalars.items()},
        )
        for number, row in enumerate(rows)
    ]
    return RunView(run, Layers.of(run), steps)


def test_a_ratio_is_formed_of_sums_over_the_window_and_never_of_one_step():
    view = view_of(
        [{"variance_trace": [8, 1], "grad_sq_norm": [-1, 1]}, {"variance_trace": [4, 1], "grad_sq_norm": [4, 1]}]
    )
    assert view.layers("noise_scale").tolist() == [4.0, 1.0]


def test_the_model_adds_over_layers_before_it_divides():
    view = view_of([{"variance_trace": [8, 1], "grad_sq_norm": [1, 2]}])
    assert view.model("noise_scale") == 3.0


def test_a_sum_of_the_model_is_the_sum_of_the_layers_means():
    view = view_of([{"variance_trace": [8, 1]}, {"variance_trace": [4, 3]}])
    assert view.model("variance_trace") == 8.0


def test_a_mean_over_elements_is_weighted_by_the_layers_sizes():
    view = view_of([{"maxva_beta": [0.9, 0.6]}])  # of 10 and 20 parameters
    assert view.model("maxva_beta") == pytest.approx(0.7)


def test_what_no_step_has_is_nan():
    view = view_of([{"variance_trace": [8, 1]}])
    assert np.isnan(view.layers("temporal_variance")).all()
    assert np.isnan(view.model("variance_ratio"))


def test_a_run_without_steps_has_no_numbers():
    run = make_run(layers=2)
    view = RunView(run, Layers.of(run), [])
    assert view.last_step is None
    assert view.point() is None
    assert view.scalar("loss") is None
    assert np.isnan(view.layers("noise_scale")).all()
    assert np.isnan(view.model("deviation_ratio_measured"))
    assert np.isnan(view.examples_per_second())


def test_infinity_and_nan_leave_their_step_out_of_the_window():
    view = view_of([{"variance_trace": [8, 1]}, {"variance_trace": [np.inf, np.nan]}])
    assert view.layers("variance_trace").tolist() == [8.0, 1.0]


ROW = {
    "batch_variance": [2.0, 4.0],
    "step_variance": [4.0, 4.0],
    "step_variance_expected": [2.0, 4.0],
    "temporal_variance": [8.0, 8.0],
    "deviation_sq": [1.0, 1.0],
}


def test_measured_variances_are_shown_in_the_units_of_the_optimizers_own_state():
    view = view_of([ROW], run=make_run(layers=2, temporal="optimizer"), gradient_scale=[0.25])
    assert view.compared_layers("batch_variance").tolist() == [0.5, 1.0]
    assert view.compared_model("step_variance") == 2.0
    assert view.compared_layers("temporal_variance").tolist() == [8.0, 8.0]
    assert view.layers("deviation_ratio_measured").tolist() == [2.0, 1.0]


def test_rho_and_the_exported_variances_stay_unclipped():
    view = view_of([ROW, ROW], run=make_run(layers=2, temporal="optimizer"), gradient_scale=[0.25, 1.0])
    assert view.layers("variance_ratio").tolist() == [2.0, 1.0]
    assert view.layers("batch_variance").tolist() == [2.0, 4.0]


def test_state_of_the_collectors_own_needs_no_scale():
    view = view_of([ROW], run=make_run(layers=2, temporal="collector"), gradient_scale=[0.25])
    assert view.compared_layers("batch_variance").tolist() == [2.0, 4.0]


def test_a_step_without_a_scale_is_taken_as_it_is():
    view = view_of([ROW, ROW], run=make_run(layers=2, temporal="optimizer"), gradient_scale=[0.5, np.nan])
    assert view.compared_layers("batch_variance").tolist() == [1.5, 3.0]


def test_the_charts_point_holds_the_three_variances_of_model_and_layers():
    point = view_of([ROW]).point()
    assert point is not None
    assert point.step == 0
    assert dict(zip(COMPARED, point.model, strict=True)) == {
        "batch_variance": 6.0,
        "step_variance": 8.0,
        "temporal_variance": 16.0,
    }
    assert point.layers.tolist() == [[2.0, 4.0], [4.0, 4.0], [8.0, 8.0]]


def test_a_scalar_is_the_latest_finite_one_and_says_of_which_step_it_is():
    view = view_of([{}, {}, {}], loss=[3.0, 2.0, float("nan")])
    assert view.scalar("loss") == (2.0, 1)


def test_the_rate_counts_steps_that_were_not_measured():
    run = make_run(layers=2)
    steps = [
        MeasuredStep(n, at * SECOND, {"count": np.array([16.0, 16.0])}, {}) for n, at in [(0, 0), (10, 2), (20, 4)]
    ]
    assert RunView(run, Layers.of(run), steps).examples_per_second() == 80.0
