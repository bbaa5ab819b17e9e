import numpy as np
import pytest
import torch
from hypothesis import given

from gradiometer.stats_core.moments import Moments, variance
from gradiometer.stats_core.noise import noise_sums
from tests.reference import loop_layer
from tests.strategies import gradient_batches


@given(gradient_batches())
def test_the_sums_agree_with_the_float64_loop(grads: np.ndarray) -> None:
    got, want = noise_sums(Moments.from_per_example(grads)), loop_layer([list(grads)])
    size = want["sq_norm_mean"]
    for name, value in got._asdict().items():
        assert value == pytest.approx(want[name], rel=1e-9, abs=1e-10 * size), name


@given(gradient_batches())
def test_trace_is_the_sum_of_the_elements_variance(grads: np.ndarray) -> None:
    moments = Moments.from_per_example(grads)
    assert noise_sums(moments).variance_trace == pytest.approx(variance(moments).sum(), rel=1e-9)


@given(gradient_batches())
def test_equal_weights_are_no_weights(grads: np.ndarray) -> None:
    plain = noise_sums(Moments.from_per_example(grads))
    weighted = noise_sums(Moments.from_per_example(grads, np.full(len(grads), 3.0)))
    for a, b in zip(plain, weighted, strict=True):
        assert b == pytest.approx(a, rel=1e-9, abs=1e-9 * plain.sq_norm_mean)


def test_the_plain_pair_is_unbiased() -> None:
    # g ~ N(G, I) in 16 elements, |G|^2 = 4, B = 8, 4,000 batches. sd of |G|^2-hat is about
    # sqrt(4*4/8 + 2*16/(8*7)) = 1.60, of the mean .0254; of the trace sqrt(2*16/7)/63.2 = .0338. Bound 4 sd: 6e-5 each.
    rng = np.random.default_rng(7)
    direction = np.zeros(16)
    direction[0] = 2.0
    found = [noise_sums(Moments.from_per_example(rng.standard_normal((8, 16)) + direction)) for _ in range(4000)]
    assert abs(np.mean([f.grad_sq_norm for f in found]) - 4.0) < 0.102
    assert abs(np.mean([f.variance_trace for f in found]) - 16.0) < 0.136
    assert abs(np.mean([f.batch_variance for f in found]) - 2.0) < 0.017


def test_the_weighted_pair_is_unbiased_where_the_examples_covariances_differ() -> None:
    # Token means: weight ~ T_i, Cov g_i = S/T_i. Truth: |G|^2 = .1 and Var(mean) = sum w^2 * trS/T.
    rng = np.random.default_rng(8)
    lengths = np.array([1, 2, 4, 8, 16, 32, 64, 128] * 2, float)
    goal = np.zeros(16)
    goal[0] = np.sqrt(0.1)
    found = []
    for _ in range(6000):
        grads = rng.standard_normal((16, 16)) / 4 / np.sqrt(lengths)[:, None] + goal
        found.append(noise_sums(Moments.from_per_example(grads, lengths)))
    share = lengths / lengths.sum()
    truth = float((share**2 / lengths).sum())
    signal = np.array([f.grad_sq_norm for f in found])
    spread = np.array([f.batch_variance for f in found])
    # z-bounds of 4 from the draws themselves: false alarm 6e-5 each.
    assert abs(signal.mean() - 0.1) < 4 * signal.std() / np.sqrt(len(found))
    assert abs(spread.mean() - truth) < 4 * spread.std() / np.sqrt(len(found))


def test_one_example_has_a_norm_but_no_variance() -> None:
    sums = noise_sums(Moments.from_per_example(np.array([[3.0, 4.0]])))
    assert sums.mean_sq_norm == 25.0
    assert np.isnan([sums.variance_trace, sums.batch_variance, sums.grad_sq_norm]).all()


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1.0, 1e9, 1e18])
def test_sums_of_torch_float32_survive_extreme_scales(scale: float) -> None:
    grads = (np.random.default_rng(0).standard_normal((6, 2000)) * scale).astype(np.float32)
    got, want = noise_sums(Moments.from_per_example(torch.as_tensor(grads))), loop_layer([list(grads)])
    for name in ("mean_sq_norm", "variance_trace", "batch_variance"):
        assert float(getattr(got, name)) == pytest.approx(want[name], rel=1e-5), name
