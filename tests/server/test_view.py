import numpy as np
import pytest

from gradiometer.protos.columns import COLUMN_DTYPE
from gradiometer.protos.run_pb2 import Run
from gradiometer.server.steps import MeasuredStep
from gradiometer.server.view import COMPARED, Layers, RunView
from gradiometer.stats_core import catalog
from gradiometer.stats_core.window import across_layers, interval, interval_across_layers, windowed
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


def random_rows(steps: int, missing: str) -> list[dict[str, list[float]]]:
    rng = np.random.default_rng(0)
    rows = [{row.name: list(rng.uniform(0.5, 2.0, 2)) for row in catalog.WIRE} for _ in range(steps)]
    if missing == "first step":
        rows[0] |= {name: [np.nan] * 2 for name in ("step_variance", "step_variance_expected", "deviation_sq")}
    if missing == "single numbers":
        for row in rows:
            row |= {name: [np.nan, values[1]] for name, values in row.items() if rng.random() < 0.2}
    if missing == "whole columns":
        for row in rows[2:]:
            del row["batch_variance"], row["temporal_variance"]
    return rows


@pytest.mark.parametrize("temporal", ["collector", "optimizer"])
@pytest.mark.parametrize("missing", ["nothing", "first step", "single numbers", "whole columns"])
def test_every_number_is_what_the_window_forms_of_all_steps_and_layers(missing: str, temporal: str):
    rows = random_rows(6, missing)
    scalars = {row.name: [0.25 + 0.125 * at for at in range(6)] for row in catalog.SCALARS}
    run = make_run(layers=2, temporal=temporal)
    view = view_of(rows, run=run, **scalars)
    absent = [np.nan] * 2
    columns = {row.name: np.array([found.get(row.name, absent) for found in rows], np.float32) for row in catalog.WIRE}
    given = {name: np.array(values) for name, values in scalars.items()}
    for row in catalog.STATISTICS:
        if row.kind in ("histogram", "outliers"):
            continue
        scale = given["gradient_scale"] if temporal == "optimizer" and not row.travels else None
        needed = {name: columns[name] for name in row.columns if name in columns}
        layers = windowed(row.name, needed, scale, given)
        model = across_layers(row.name, needed, view.sizes, scale, given)
        np.testing.assert_allclose(view.layers(row.name), layers, rtol=1e-12, err_msg=row.name)
        np.testing.assert_allclose(view.model(row.name), model, rtol=1e-12, err_msg=row.name)
        if row.interval:
            want, whole = interval(row.name, needed), interval_across_layers(row.name, needed, view.sizes)
            np.testing.assert_allclose(view.layers_interval(row.name), want, rtol=1e-9)
            np.testing.assert_allclose(view.layers_interval(row.name, [1]), np.array(want)[:, [1]], rtol=1e-9)
            np.testing.assert_allclose(view.model_interval(row.name), whole, rtol=1e-9)


def test_what_is_made_of_the_examples_is_the_whole_models_own_scalar():
    view = view_of([{"norm_max": [1, 2]}, {"norm_max": [3, 2]}], norm_max=[2.5, 3.5])
    assert view.layers("norm_max").tolist() == [2.0, 2.0]
    assert view.model("norm_max") == 3.0
    assert np.isnan(view_of([{"norm_max": [1, 2]}]).model("norm_max"))


def test_an_interval_needs_steps_and_a_statistic_that_has_one():
    view = view_of([{"variance_trace": [8, 1], "grad_sq_norm": [1, 1]}])
    assert np.isnan(view.layers_interval("noise_scale")).all()
    assert np.isnan(view.model_interval("noise_scale")).all()
    with pytest.raises(ValueError, match="needs a statistic with an interval"):
        view.layers_interval("variance_trace")


def test_numbers_beyond_float32_are_shown():
    run = make_run(layers=2)
    steps = [MeasuredStep(0, 0, {"variance_trace": np.array([1e50, 2e50]), "grad_sq_norm": np.array([1e49, 2e50])}, {})]
    view = RunView(run, Layers.of(run), steps)
    assert view.layers("noise_scale").tolist() == pytest.approx([10.0, 1.0])
    assert view.model("variance_trace") == pytest.approx(3e50)


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
