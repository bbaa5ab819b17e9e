import json

import numpy as np

from gradiometer.protos.columns import column_arrays, pack_batch, scalar_arrays
from gradiometer.server.history import RunHistory
from gradiometer.server.page import COLUMNS, SHOWN, catalogue, chart, facts, numbers, rounded
from gradiometer.server.view import COMPARED
from gradiometer.stats_core import catalog, selection
from tests.webserver import make_batch, make_run


def view_with(*batches, layers=3, **run):
    history = RunHistory(make_run(layers=layers, **run))
    for batch in batches:
        history.append(batch)
    return history.view()


def test_numbers_that_do_not_exist_are_null_and_zero_is_zero():
    assert rounded([float("nan"), float("inf"), -float("inf"), 0.0]) == [None, None, None, 0.0]


def test_numbers_keep_five_digits():
    assert rounded([1.23456789e-30, 123456.789, -0.00012]) == [1.2346e-30, 123460.0, -0.00012]


def test_whatever_arrives_the_answer_is_json():
    wild = [[np.nan, np.inf, -np.inf]]
    columns = {name: np.array(wild) for name in selection.columns("default")}
    batch = pack_batch([0], [0], 3, columns, {"loss": np.array([np.nan]), "mine": np.array([np.inf])})
    view = view_with(batch)
    text = json.dumps({**facts(view.run), **numbers(view), "points": chart(view.points)}, allow_nan=False)
    assert json.loads(text)["model"]["batch_variance"] is None


def test_gradients_of_extreme_scale_are_shown_and_what_float32_does_not_hold_is_no_point_of_the_chart():
    for exponent, in_chart in ((40.0, True), (150.0, False), (-60.0, True)):
        batch = make_batch(range(6), unit_exponent=exponent)
        found = numbers(view_with(batch), layer=1)
        plain = numbers(view_with(make_batch(range(6))), layer=1)
        for name in ("noise_scale", "variance_ratio", "significant_share"):
            assert found["table"][name] == plain["table"][name]
        want = np.array(plain["table"]["batch_variance"]) * 2.0 ** (2 * exponent)
        assert np.allclose(found["table"]["batch_variance"], want, rtol=1e-4, atol=0)
        assert (found["point"]["batch_variance"] != [None]) == in_chart
        json.dumps(found, allow_nan=False)


def test_a_run_without_steps_has_facts_and_no_numbers():
    found = numbers(view_with())
    assert found["step"] is None
    assert found["point"] is None
    assert set(found["model"].values()) == {None}


def test_the_numbers_are_those_of_the_view():
    view = view_with(make_batch([0, 1, 2]))
    found = numbers(view)
    assert set(found["model"]) == set(found["table"]) == {*COMPARED, *SHOWN}
    assert found["table"]["noise_scale"] == rounded(view.layers("noise_scale"))
    assert found["scalars"]["loss"] == {"value": 2.5, "step": 2}
    assert found["coverage"]["uncovered"] == [
        {"parameter": "rnn.weight_hh", "num_params": 5, "reason": "LSTM has no per-example sampler"}
    ]


def test_a_noise_scale_below_zero_keeps_its_sign_for_the_page_to_tell():
    batch = pack_batch([0], [0], 1, {"variance_trace": np.array([[1.0]]), "grad_sq_norm": np.array([[-2.0]])}, {})
    assert numbers(view_with(batch, layers=1))["table"]["noise_scale"] == [-0.5]


def test_the_chosen_layers_intervals_and_norms_are_told():
    view = view_with(make_batch(range(6)))
    model, layer = numbers(view)["chosen"], numbers(view, layer=2)["chosen"]
    assert set(model["intervals"]) == {"variance_ratio", "batch_snr", "noise_scale"}
    assert model["intervals"]["noise_scale"] == rounded(view.model_interval("noise_scale"))
    assert layer["intervals"]["batch_snr"] == rounded([end[2] for end in view.layers_interval("batch_snr")])
    assert model["norm_max"] == 0.75
    assert layer["norm_max"] == rounded(view.layers("norm_max"))[2]


def test_too_few_steps_have_no_interval():
    found = numbers(view_with(make_batch([0, 1])))
    assert found["chosen"]["intervals"] == {}
    assert found["unresolved"] == {"model": False, "layers": []}


def test_a_noise_scale_without_an_upper_end_is_told_to_be_unresolved():
    signal = np.array([[1.0, value] for value in (0.1, -0.1, 0.2, 0.1, -0.2, 0.1)])
    batch = pack_batch(range(6), [0] * 6, 2, {"variance_trace": np.ones((6, 2)), "grad_sq_norm": signal}, {})
    found = numbers(view_with(batch, layers=2), layer=1)
    assert found["unresolved"] == {"model": False, "layers": [1]}
    low, high = found["chosen"]["intervals"]["noise_scale"]
    assert low > 0
    assert high is None


def test_the_chart_shows_the_model_or_one_layer():
    view = view_with(make_batch([0, 1]))
    model, layer = chart(view.points), chart(view.points, 1)
    assert model["step"] == layer["step"] == [0, 1]
    assert model["batch_variance"][-1] == rounded([view.compared_model("batch_variance")])[0]
    assert layer["batch_variance"][-1] == rounded([view.compared_layers("batch_variance")[1]])[0]


def test_a_model_of_many_layers_shows_the_first_thousand_and_says_so():
    view = view_with(make_batch([0], layers=1500), layers=1500)
    assert len(numbers(view)["table"]["batch_variance"]) == len(facts(view.run)["layers"]["name"]) == 1000
    assert facts(view.run)["num_layers"] == 1500


def test_the_page_explains_in_the_catalogues_words():
    told = catalogue()["statistics"]
    assert set(told) == {row.name for row in catalog.STATISTICS}
    assert told["variance_ratio"]["help"] == catalog.statistic("variance_ratio").help


def test_the_columns_behind_the_page_are_enough_to_form_it():
    batch = make_batch([0, 1])
    arrays = column_arrays(batch)
    few = pack_batch([0, 1], batch.unix_nanos, 3, {name: arrays[name] for name in COLUMNS}, scalar_arrays(batch))
    assert numbers(view_with(few)) == numbers(view_with(batch))
