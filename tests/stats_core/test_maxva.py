import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core import maxva
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_sums
from tests.reference import maxva_naive


def run(grads: np.ndarray, within: np.ndarray | float = 0.0, **betas: float) -> tuple[TemporalMoments, np.ndarray]:
    state = TemporalMoments.zeros_like(grads[0])
    q = np.ones_like(grads[0])
    for step, g in enumerate(grads):
        tau2 = within[step] if isinstance(within, np.ndarray) else within
        state, q = maxva.update(state, g, tau2, **betas)
    return state, q


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.999), (0.5, 0.98), (0.5, 0.9)])
@pytest.mark.parametrize("with_examples", [False, True])
def test_the_rule_is_the_argmax_that_brute_force_finds(low: float, high: float, with_examples: bool) -> None:
    rng = np.random.default_rng(5)
    grads = rng.standard_normal((12, 25))
    within = rng.uniform(0, 2, (12, 25)) if with_examples else np.zeros((12, 25))
    state, _ = run(grads, within, beta_max=high, beta_min=low)
    want = maxva_naive(list(grads), list(within), beta_max=high, beta_min=low)
    # The grid's cells are 2.5e-5 wide in the weight: twelve steps of half a cell move u and s by less than 1e-3.
    assert np.abs(state.u - want["u"]).max() < 1e-3
    assert np.abs(state.s - want["s"]).max() < 1e-3
    assert np.abs(state.w - want["w"]).max() < 1e-3


@given(st.integers(0, 10**6))
def test_no_coefficient_gives_a_larger_variance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    s, d2, tau2 = rng.gamma(0.3, 1, (3, 50))
    w = rng.uniform(0.01, 1, 50)
    state = TemporalMoments(np.zeros(50), s, w)
    after, _ = maxva.update(state, np.sqrt(d2), tau2, beta_max=0.999, beta_min=0.5)
    beta = np.linspace(0.5, 0.999, 501)[:, None]
    q = (1 - beta) / (beta * w + 1 - beta)
    assert ((1 - q) * s + q * tau2 + q * (1 - q) * d2 <= after.s * (1 + 1e-12) + 1e-300).all()


def test_equation_six_of_the_paper_without_examples() -> None:
    ratio = np.array([1.5, 4.0, 9.0, 100.0]) ** 2
    w = np.array([0.2, 0.5, 0.9, 1.0])
    state = TemporalMoments(np.zeros(4), np.ones(4), w)
    _, q = maxva.update(state, np.sqrt(ratio), beta_max=0.999, beta_min=0.5)
    assert maxva.maxva_beta(state, q) == pytest.approx((ratio + 1) / ((1 + w) * ratio + 1 - w), rel=1e-12)
    assert maxva.deviation_ratio(state, np.sqrt(ratio)) == pytest.approx(ratio)


def test_equal_coefficients_are_a_plain_moving_average() -> None:
    grads = np.random.default_rng(0).standard_normal((40, 7))
    state, _ = run(grads, beta_max=0.9, beta_min=0.9)
    weights = 0.1 * 0.9 ** np.arange(39, -1, -1)
    mean = (weights[:, None] * grads).sum(0) / weights.sum()
    square = (weights[:, None] * grads**2).sum(0) / weights.sum()
    assert state.u == pytest.approx(mean, rel=1e-10)
    assert state.s + state.u**2 == pytest.approx(square, rel=1e-10)
    assert state.w == pytest.approx(np.full(7, weights.sum()))


def test_the_first_step_takes_the_gradient_whole() -> None:
    state, q = run(np.array([[3.0, 0.0]]), np.array([[0.25, 0.0]]), beta_max=0.98)
    assert (state.u == [3.0, 0.0]).all()
    assert (state.s == [0.25, 0.0]).all()
    assert state.w == pytest.approx([0.02, 0.02])
    assert (q == 1).all()


def test_a_largest_coefficient_of_one_still_gathers_weight() -> None:
    state, _ = run(np.array([[1.0], [-1.0], [3.0]]), beta_max=1.0)
    assert 0 < state.w[0] <= 1
    assert np.isfinite(state.s).all()


def test_dead_elements_take_the_largest_coefficient() -> None:
    state, q = run(np.zeros((5, 3)), beta_max=0.9)
    assert np.isfinite(np.stack(state)).all()
    assert maxva.maxva_beta(state, q, beta_max=0.9) == pytest.approx(np.full(3, 0.9), abs=0.05)
    assert (state.s == 0).all()


@given(st.integers(0, 10**6), st.integers(-18, 18))
def test_the_rule_does_not_know_the_unit_of_the_gradient(seed: int, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    grads, within = rng.standard_normal((6, 4)), rng.uniform(0, 1, (6, 4))
    c = 2.0 ** (3 * exponent)
    plain, q = run(grads, within)
    scaled, same_q = run(grads * c, within * c * c)
    assert same_q == pytest.approx(q, rel=1e-12)
    assert scaled.u == pytest.approx(plain.u * c, rel=1e-12)
    assert scaled.s == pytest.approx(plain.s * c * c, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_float32_follows_float64_at_extreme_scales(scale: float) -> None:
    grads = np.random.default_rng(1).standard_normal((200, 50)) * scale
    wide, _ = run(grads)
    state = TemporalMoments.zeros_like(torch.zeros(50))
    for g in grads.astype(np.float32):
        state, _ = maxva.update(state, torch.as_tensor(g))
    assert state.s.numpy() / scale**2 == pytest.approx(wide.s / scale**2, rel=2e-3)
    assert (state.s.numpy() >= 0).all()
    assert (state.w.numpy() <= 1).all()


def test_numpy_torch_and_jitted_jax_agree() -> None:
    grads = np.random.default_rng(2).standard_normal((30, 6)).astype(np.float32)
    torch_state = TemporalMoments.zeros_like(torch.zeros(6))
    jax_state = TemporalMoments.zeros_like(jnp.zeros(6))
    step = jax.jit(lambda state, g: maxva.update(state, g, 0.1)[0])
    for g in grads:
        torch_state, _ = maxva.update(torch_state, torch.as_tensor(g), 0.1)
        jax_state = step(jax_state, g)
    numpy_state, _ = run(grads, np.full_like(grads, 0.1))
    for a, b, c in zip(numpy_state, torch_state, jax_state, strict=True):
        assert b.numpy() == pytest.approx(a, rel=1e-5)
        assert np.asarray(c) == pytest.approx(a, rel=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(("beta_max", "inflation"), [(0.98, 2.83), (0.999, 5.74)])
def test_stationary_inflation_on_normal_noise_is_the_published_one(beta_max: float, inflation: float) -> None:
    # Stationary E[v]/E[g^2] of the paper's rule on N(0, 1), reference figures +-3 %.
    rng = np.random.default_rng(0)
    state = TemporalMoments.zeros_like(np.zeros(2000))
    kept = []
    for step in range(8000):
        state, _ = maxva.update(state, rng.standard_normal(2000), beta_max=beta_max)
        if step >= 5000 and step % 10 == 0:
            kept.append((state.s + state.u**2).mean())
    assert np.mean(kept) == pytest.approx(inflation, rel=0.03)


def test_within_variance_sums_to_the_unbiased_variance_of_the_weighted_mean() -> None:
    rng = np.random.default_rng(3)
    moments = Moments.from_per_example(rng.standard_normal((9, 40)) + 1, rng.uniform(1, 4, 9))
    want = noise_sums(moments).batch_variance
    assert maxva.within_variance(moments).sum() == pytest.approx(want, rel=1e-12)


def test_within_variance_of_one_example_is_zero() -> None:
    assert (maxva.within_variance(Moments.from_per_example(np.ones((1, 3)))) == 0).all()


def test_within_variance_keeps_a_nan_in_its_element() -> None:
    grads = np.array([[1.0, np.nan], [3.0, 1.0], [5.0, 2.0]])
    found = maxva.within_variance(Moments.from_per_example(grads))
    assert found[0] == pytest.approx(8 / 6)
    assert np.isnan(found[1])


def test_within_variance_refuses_another_word() -> None:
    with pytest.raises(ValueError, match=r"within in \('mean', 'full'\), got within='sum'"):
        maxva.within_variance(Moments.from_per_example(np.ones((2, 1))), "sum")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_the_gradient_scale_survives_extreme_scales(scale: float) -> None:
    mean = torch.full((1000,), scale)
    assert float(maxva.gradient_scale([mean * 0.5, mean * 0.5], [mean, mean])) == pytest.approx(0.25, rel=1e-6)


def test_the_gradient_scale_is_one_where_there_is_nothing_to_compare() -> None:
    zero, poison = np.zeros(3), np.array([np.nan, 1.0, 1.0])
    assert float(maxva.gradient_scale([zero], [zero])) == 1.0
    assert float(maxva.gradient_scale([poison], [zero + 1])) == 1.0
    assert float(maxva.gradient_scale([zero + 1], [poison])) == 1.0


def test_the_gradient_scale_needs_pairs() -> None:
    with pytest.raises(ValueError, match="got grads=1, means=0"):
        maxva.gradient_scale([np.ones(1)], [])
