import numpy as np
import pytest

from gradiometer.server.steps import MeasuredStep, Steps

NAN = float("nan")


def window(*rows: dict[str, list[float]], **scalars: list[float]) -> Steps:
    return Steps(
        [
            MeasuredStep(
                at,
                0,
                {name: np.array(values, np.float32) for name, values in row.items()},
                {name: values[at] for name, values in scalars.items()},
            )
            for at, row in enumerate(rows)
        ],
        num_layers=2,
    )


def test_a_column_is_nan_where_a_step_lacks_it() -> None:
    steps = window({"a": [1, 2]}, {"b": [3, 4]})
    np.testing.assert_array_equal(steps.column("a"), [[1, 2], [NAN, NAN]])
    np.testing.assert_array_equal(steps.column("c"), np.full((2, 2), NAN))
    assert [steps.has(name) for name in "abc"] == [True, True, False]


def test_no_step_is_one_without_numbers() -> None:
    steps = window()
    np.testing.assert_array_equal(steps.column("a"), [[NAN, NAN]])
    np.testing.assert_array_equal(steps.scalar("loss"), [NAN])
    assert steps.mean_and_model(["a"]) is None


def test_a_scalar_is_one_number_a_step() -> None:
    np.testing.assert_array_equal(window({}, {}, loss=[0.5, NAN]).scalar("loss"), [0.5, NAN])


def test_whole_steps_are_one_with_their_mean_and_the_model_is_one_more_layer() -> None:
    steps = window({"a": [NAN, NAN], "b": [NAN, np.inf]}, {"a": [1, 2], "b": [8, 6]}, {"a": [3, 6], "b": [0, 0]})
    mean = steps.mean(["a", "b"])
    assert {name: values.tolist() for name, values in mean.items()} == {"a": [[2, 4]], "b": [[4, 3]]}
    with_model = steps.mean_and_model(["a", "b"])
    assert with_model is not None
    assert {name: values.tolist() for name, values in with_model.items()} == {"a": [[2, 4, 6]], "b": [[4, 3, 7]]}
    columns = steps.columns_and_model(["a", "b"], [1])
    assert columns is not None
    np.testing.assert_array_equal(columns["a"], [[NAN, NAN], [2, 3], [6, 9]])
    np.testing.assert_array_equal(columns["b"], [[np.inf, NAN], [6, 14], [0, 0]])


@pytest.mark.parametrize(
    "rows",
    [
        ({"a": [1, NAN], "b": [1, 1]}, {"a": [1, 1], "b": [1, 1]}),
        ({"a": [1, np.inf], "b": [1, 1]}, {"a": [1, 1], "b": [1, 1]}),
        ({"a": [1, 1]}, {"a": [1, 1], "b": [1, 1]}),
        ({"a": [1, 1]}, {"b": [1, 1]}),
        ({"a": [NAN, NAN], "b": [NAN, NAN]},),
    ],
    ids=["a layer is missing", "a layer is infinite", "in other steps", "in no common step", "in none"],
)
def test_where_a_step_is_not_whole_the_window_stays_as_it_is(rows: tuple[dict[str, list[float]], ...]) -> None:
    steps = window(*rows)
    found = steps.mean(["a", "b"])
    for name in "ab":
        np.testing.assert_array_equal(found[name], steps.column(name))
    assert steps.mean_and_model(["a", "b"]) is None
    assert steps.columns_and_model(["a", "b"], [0]) is None


def test_numbers_beyond_float32_are_kept() -> None:
    steps = Steps([MeasuredStep(0, 0, {"a": np.array([1e60, 2e60])}, {})], num_layers=2)
    assert steps.mean(["a"])["a"].tolist() == [[1e60, 2e60]]
    with_model = steps.mean_and_model(["a"])
    assert with_model is not None
    assert with_model["a"].tolist() == [[1e60, 2e60, 3e60]]
