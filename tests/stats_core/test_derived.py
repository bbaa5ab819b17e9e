"""Each derived statistic against its definition, on gradients whose population values are known."""

import numpy as np
import pytest

from gradiometer.stats_core.window import windowed


def column(value: float) -> np.ndarray:
    return np.full((3, 1), value)


def value(name: str, **columns: float) -> float:
    return float(windowed(name, {key: column(number) for key, number in columns.items()})[0])


def test_the_norm_test_is_noise_over_norm() -> None:
    assert value("norm_test", batch_variance=4.0, mean_sq_norm=16.0) == 0.5
    assert np.isnan(value("norm_test", batch_variance=4.0, mean_sq_norm=0.0))


def test_the_two_parts_of_the_noise_make_the_norm_test() -> None:
    sums = {"batch_variance": 5.0, "parallel_variance": 1.0, "mean_sq_norm": 10.0}
    parallel = value("inner_product_test", parallel_variance=1.0, mean_sq_norm=10.0)
    across = value("orthogonality_test", **sums)
    assert parallel + across == pytest.approx(value("norm_test", batch_variance=5.0, mean_sq_norm=10.0) ** 2)


def test_the_doubling_gain_goes_from_one_without_noise_to_two_without_signal() -> None:
    assert value("doubling_gain", batch_variance=0.0, grad_sq_norm=3.0) == 1.0
    assert value("doubling_gain", batch_variance=3.0, grad_sq_norm=0.0) == 2.0
    assert value("doubling_gain", batch_variance=3.0, grad_sq_norm=-1.0) == 2.0
    assert value("doubling_gain", batch_variance=2.0, grad_sq_norm=1.0) == 1.5


def test_identical_and_orthogonal_examples_are_the_ends_of_diversity() -> None:
    same = {"sq_norm_mean": 9.0, "mean_sq_norm": 9.0, "effective_count": 16.0}
    assert value("diversity", **same) == pytest.approx(1 / 16)
    orthogonal = {"sq_norm_mean": 1.0, "mean_sq_norm": 1 / 16, "effective_count": 16.0}
    assert value("diversity", **orthogonal) == pytest.approx(1.0)


def test_coherence_and_noise_scale_say_the_same() -> None:
    # B_simple = 1/α − 1, with m₂ = |G|² + tr Σ.
    alpha = value("coherence", grad_sq_norm=2.0, sq_norm_mean=10.0)
    assert value("noise_scale", variance_trace=8.0, grad_sq_norm=2.0) == pytest.approx(1 / alpha - 1)


def test_the_cosine_of_steps_is_that_of_equally_long_gradients() -> None:
    a, b = np.array([3.0, 4.0]), np.array([5.0, 0.0])
    found = value("consecutive_cosine", consecutive_dot=float(a @ b), step_variance=0.5 * float((a - b) @ (a - b)))
    assert found == pytest.approx(float(a @ b) / 25)


def test_the_spread_of_inverse_roots_is_the_coefficient_of_variation() -> None:
    x = np.array([1.0, 2.0, 6.0])
    found = value("inverse_root_spread", inverse_root=float(x.mean()), inverse_root_sq=float((x**2).mean()))
    assert found == pytest.approx(float(x.std() / x.mean()))


@pytest.mark.parametrize("exact", [1 / 3, 0.1, 0.7, 12345.6])
def test_elements_that_are_all_alike_have_no_spread_whatever_rounding_says(exact: float) -> None:
    x = np.float32(exact)
    below, above = (float(np.nextafter(x * x, np.float32(end))) for end in (0, np.inf))
    assert value("inverse_root_spread", inverse_root=float(x), inverse_root_sq=below) == 0.0
    assert value("inverse_root_spread", inverse_root=float(x), inverse_root_sq=above) < 1e-3
    assert np.isnan(value("inverse_root_spread", inverse_root=0.0, inverse_root_sq=0.0))


def test_what_a_sign_keeps_of_no_signal_is_not_a_number() -> None:
    sums = {"sign_signal": 2.0, "sign_noise": 100.0, "active_elements": 50.0}
    assert value("sign_snr_kept", gsnr_sum=2.0, **sums) == pytest.approx(0.5)
    assert np.isnan(value("sign_snr_kept", gsnr_sum=-2.0, **sums))
