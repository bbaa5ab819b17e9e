import math

import numpy as np
import pytest
import scipy.stats

from gradiometer.stats_core.catalog import STATISTICS
from gradiometer.stats_core.intervals import variance_ratio_interval
from gradiometer.stats_core.window import across_layers, interval, interval_across_layers, windowed


def test_a_ratio_is_that_of_the_sums_over_the_window() -> None:
    columns = {
        "variance_trace": np.array([[2.0, 1.0], [4.0, 1.0]]),
        "grad_sq_norm": np.array([[1.0, -3.0], [2.0, 1.0]]),
    }
    assert windowed("noise_scale", columns).tolist() == [2.0, -1.0]


def test_a_step_that_lacks_either_side_takes_no_part() -> None:
    columns = {
        "step_variance": np.array([[np.nan], [3.0], [np.inf]], np.float32),
        "step_variance_expected": np.array([[9.0], [2.0], [1.0]], np.float32),
    }
    assert windowed("variance_ratio", columns).tolist() == [1.5]


def test_what_no_step_has_is_nan() -> None:
    absent = np.full((3, 2), np.nan)
    columns = {"deviation_sq": absent, "temporal_variance_prior": absent, "maxva_beta": absent}
    assert np.isnan(windowed("deviation_ratio", columns)).all()
    assert np.isnan(windowed("maxva_beta", columns)).all()
    assert np.isnan(across_layers("maxva_beta", columns, np.array([1, 1])))


def test_a_denominator_of_zero_is_nan_and_no_warning() -> None:
    columns = {"variance_trace": np.array([[1.0]]), "grad_sq_norm": np.array([[0.0]])}
    assert np.isnan(windowed("noise_scale", columns)).all()


def test_the_models_ratio_adds_layers_before_dividing() -> None:
    columns = {"variance_trace": np.array([[8.0, 1.0]]), "grad_sq_norm": np.array([[1.0, 2.0]])}
    assert across_layers("noise_scale", columns, np.array([1, 1])) == 3.0


def test_means_are_weighted_by_size_sums_add_and_counts_do_not() -> None:
    sizes = np.array([30, 10])
    columns = {
        "maxva_beta": np.array([[0.5, 0.9]]),
        "batch_variance": np.array([[1.0, 2.0], [3.0, 4.0]]),
        "count": np.array([[16.0, 16.0]]),
    }
    assert across_layers("maxva_beta", columns, sizes) == pytest.approx(0.6)
    assert across_layers("batch_variance", columns, sizes) == pytest.approx(5.0)
    assert across_layers("count", columns, sizes) == 16.0


def test_float32_columns_are_summed_in_float64() -> None:
    columns = {"variance_trace": np.full((4, 1), 3e38, np.float32), "grad_sq_norm": np.full((4, 1), 1e38, np.float32)}
    assert windowed("noise_scale", columns)[0] == pytest.approx(3.0, rel=1e-6)


def test_an_unknown_statistic_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="noise_scale"):
        windowed("nois_scale", {})


def test_measured_sums_are_shown_in_the_optimizers_units_beside_its_own() -> None:
    columns = {
        "batch_variance": np.array([[4.0], [8.0]]),
        "grad_sq_norm": np.array([[2.0], [1.0]]),
        "temporal_variance": np.array([[3.0], [5.0]]),
        "deviation_sq": np.array([[1.0], [3.0]]),
    }
    scale = np.array([0.25, 0.5])
    assert windowed("batch_variance", columns, scale).tolist() == [2.5]
    assert windowed("temporal_variance", columns, scale).tolist() == [4.0]
    assert windowed("deviation_ratio_measured", columns, scale).tolist() == [4.0 / 5.0]
    assert windowed("batch_snr", columns, scale).tolist() == [3.0 / 12.0]
    assert across_layers("batch_variance", columns, np.ones(1), scale) == 2.5


def test_a_step_without_a_gradient_scale_is_taken_as_it_was_measured() -> None:
    assert windowed("batch_variance", {"batch_variance": np.array([[4.0]])}, np.array([np.nan])).tolist() == [4.0]


def test_a_product_of_columns_is_formed_step_by_step() -> None:
    columns = {
        "sq_norm_mean": np.array([[8.0], [8.0]]),
        "effective_count": np.array([[16.0], [4.0]]),
        "mean_sq_norm": np.array([[1.0], [2.0]]),
    }
    assert windowed("diversity", columns).tolist() == [16.0 / 24.0]
    assert across_layers("diversity", columns, np.ones(1)) == pytest.approx(16.0 / 24.0)


def test_a_scalar_of_the_step_is_a_factor_like_another() -> None:
    columns = {"variance_trace": np.array([[4.0, 6.0], [8.0, 2.0]])}
    scalars = {"learning_rate": np.array([0.5, 0.25]), "loss": np.array([1.0, 3.0])}
    assert windowed("cabs_batch", columns, scalars=scalars).tolist() == [1.0, 0.875]
    assert across_layers("cabs_batch", columns, np.ones(2), scalars=scalars) == pytest.approx(7.5 / 4)
    assert np.isnan(windowed("cabs_batch", columns)).all()  # nobody logged a loss


def test_the_whole_models_examples_are_not_those_of_its_layers_added_up() -> None:
    columns = {"norm_max": np.array([[3.0, 4.0], [3.0, 4.0]])}
    assert across_layers("norm_max", columns, np.ones(2), scalars={"norm_max": np.array([5.0, 7.0])}) == 6.0
    assert np.isnan(across_layers("norm_max", columns, np.ones(2)))


def test_a_ratio_may_have_the_models_own_number_over_a_sum_of_layers() -> None:
    columns = {"parallel_variance": np.array([[1.0, 1.0]]), "mean_sq_norm": np.array([[4.0, 6.0]])}
    found = across_layers("inner_product_test", columns, np.ones(2), scalars={"parallel_variance": np.array([5.0])})
    assert found == 0.5
    assert windowed("inner_product_test", columns).tolist() == [0.25, 1 / 6]


def test_a_layer_that_was_not_measured_leaves_numerator_and_denominator_of_the_model() -> None:
    columns = {
        "variance_trace": np.array([[8.0, 1.0], [8.0, np.nan]]),
        "grad_sq_norm": np.array([[1.0, 2.0], [1.0, 2.0]]),
    }
    assert across_layers("noise_scale", columns, np.ones(2)) == 17.0 / 4.0


def test_means_in_a_formula_are_weighted_by_size() -> None:
    columns = {"inverse_root": np.array([[1.0, 3.0]]), "inverse_root_sq": np.array([[1.0, 9.0]])}
    sizes = np.array([30.0, 10.0])
    x = np.repeat([1.0, 3.0], [30, 10])
    assert across_layers("inverse_root_spread", columns, sizes) == pytest.approx(x.std() / x.mean())


def test_measured_norms_go_with_the_root_of_the_gradient_scale() -> None:
    columns = {"norm_max": np.array([[6.0]]), "gsnr_sum": np.array([[4.0]])}
    assert windowed("norm_max", columns, np.array([0.25])).tolist() == [3.0]
    assert windowed("gsnr_sum", columns, np.array([0.25])).tolist() == [4.0]


def test_the_whole_models_norms_go_with_the_gradient_scale_as_each_layers_do() -> None:
    columns = {"norm_max": np.array([[6.0], [6.0]]), "parallel_variance": np.array([[8.0], [8.0]])}
    scalars = {name: values[:, 0] for name, values in columns.items()}  # a model of one layer
    scale = np.array([0.25, np.nan])
    for name, expected in (("norm_max", 4.5), ("parallel_variance", 5.0)):
        assert windowed(name, columns, scale).tolist() == [expected]
        assert across_layers(name, columns, np.ones(1), scale, scalars) == expected


def jackknifed(top: np.ndarray, bottom: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval of sum(top)/sum(bottom) over steps, written out."""
    steps = len(top)
    left = [np.delete(top, k).sum() / np.delete(bottom, k).sum() for k in range(steps)]
    width = scipy.stats.t.ppf((1 + level) / 2, steps - 1) * np.std(left) * math.sqrt(steps - 1)
    return top.sum() / bottom.sum() - width, top.sum() / bottom.sum() + width


def noisy_columns(layers: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    trace = rng.chisquare(30, (16, layers))
    return {
        "variance_trace": trace,
        "batch_variance": trace / 8,
        "grad_sq_norm": rng.standard_normal((16, layers)) + 4,
        "step_variance": rng.chisquare(30, (16, layers)) / 8,
        "step_variance_expected": trace / 8,
    }


def test_an_interval_of_a_ratio_is_the_jackknife_over_steps() -> None:
    columns = noisy_columns()
    for name, bottom in (("example_snr", "variance_trace"), ("batch_snr", "batch_variance")):
        found = interval(name, columns)
        for layer in range(2):
            want = jackknifed(columns["grad_sq_norm"][:, layer], columns[bottom][:, layer])
            assert (found.low[layer], found.high[layer]) == pytest.approx(want, rel=1e-12)
        assert (found.low < windowed(name, columns)).all()
        assert (windowed(name, columns) < found.high).all()


def test_the_noise_scales_interval_is_that_of_the_snr_turned_over() -> None:
    columns = noisy_columns()
    snr, scale = interval("example_snr", columns, level=0.9), interval("noise_scale", columns, level=0.9)
    assert scale.low == pytest.approx(1 / snr.high)
    assert scale.high == pytest.approx(1 / snr.low)
    assert scale.is_resolved.all()


def test_a_noise_scale_without_signal_is_not_resolved_and_has_no_upper_end() -> None:
    columns = noisy_columns()
    columns["grad_sq_norm"][:, 0] -= columns["grad_sq_norm"][:, 0].mean()
    columns["grad_sq_norm"][:, 1] -= 100
    found = interval("noise_scale", columns)
    assert not found.is_resolved.any()
    assert (found.high == np.inf).all()
    assert 0 < found.low[0] < np.inf
    assert found.low[1] == np.inf


def test_the_variance_ratios_interval_is_its_own() -> None:
    columns = noisy_columns()
    found = interval("variance_ratio", columns, level=0.8)
    want = variance_ratio_interval(columns["step_variance"], columns["step_variance_expected"], 0.8)
    np.testing.assert_array_equal(np.array(found), np.array(want))
    assert (found.low < windowed("variance_ratio", columns)).all()
    assert (windowed("variance_ratio", columns) < found.high).all()


def test_the_models_interval_adds_layers_before_dividing() -> None:
    columns = noisy_columns()
    signal, trace = (columns[name].sum(axis=1) for name in ("grad_sq_norm", "variance_trace"))
    found = interval_across_layers("example_snr", columns, np.ones(2))
    assert isinstance(found.low, float)
    assert (found.low, found.high) == pytest.approx(jackknifed(signal, trace), rel=1e-12)
    scale = interval_across_layers("noise_scale", columns, np.ones(2))
    assert (scale.low, scale.high) == pytest.approx((1 / found.high, 1 / found.low), rel=1e-12)
    assert scale.is_resolved


def test_the_models_interval_takes_a_step_without_one_layer_from_the_others() -> None:
    columns = noisy_columns()
    columns["grad_sq_norm"][5, 1] = np.nan
    signal, trace = columns["grad_sq_norm"].copy(), columns["variance_trace"].copy()
    signal[5, 1] = trace[5, 1] = 0
    found = interval_across_layers("example_snr", columns, np.ones(2))
    assert (found.low, found.high) == pytest.approx(jackknifed(signal.sum(axis=1), trace.sum(axis=1)), rel=1e-12)
    by_layer = interval("example_snr", columns)
    there = np.arange(16) != 5
    want = jackknifed(columns["grad_sq_norm"][there, 1], columns["variance_trace"][there, 1])
    assert (by_layer.low[1], by_layer.high[1]) == pytest.approx(want, rel=1e-12)


def test_a_window_of_three_steps_has_no_interval() -> None:
    columns = {name: values[:3] for name, values in noisy_columns().items()}
    for name in ("noise_scale", "batch_snr", "example_snr", "variance_ratio"):
        assert np.isnan(np.array(interval(name, columns))).all()
        assert np.isnan(np.array(interval_across_layers(name, columns, np.ones(2)))).all()


def test_measured_ratios_have_the_same_interval_in_the_optimizers_units() -> None:
    columns = noisy_columns()
    plain, scaled = interval("noise_scale", columns), interval("noise_scale", columns, np.linspace(0.1, 2, 16))
    assert np.array(scaled) == pytest.approx(np.array(plain), rel=1e-12)


def test_each_statistic_that_says_so_has_an_interval_and_no_other() -> None:
    columns = noisy_columns()
    for row in STATISTICS:
        if row.interval:
            assert np.isfinite(interval(row.name, columns).low).all()
    for name in ("coherence", "variance_trace"):
        with pytest.raises(
            ValueError, match=f"needs a statistic with an interval, one of .*noise_scale.*got name='{name}'"
        ):
            interval(name, columns)
        with pytest.raises(ValueError, match="show it without one"):
            interval_across_layers(name, columns, np.ones(2))
