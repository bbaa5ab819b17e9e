import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core import maxva
from gradiometer.stats_core.adam import AdamStep, adam_step, adam_sums, maxva_step, nadam_mix, nesterov_mix
from gradiometer.stats_core.elements import element_sums
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_sums
from tests.reference import loop_moments
from tests.strategies import gradient_batches

RATES = {"lr": 0.01, "b1": 0.9, "b2": 0.99, "eps": 1e-8}
NAMES = (
    "preconditioned_variance",
    "preconditioned_grad_sq_norm",
    "inverse_root",
    "inverse_root_sq",
    "inverse_root_change",
    "step_size",
    "momentum_disagreements",
)


def loop_steps(grads: np.ndarray, dialect: str = "adam", eps: float = 1e-3) -> Iterator[tuple[float, ...]]:
    """One element, one step at a time, as the optimizers' papers and manuals write them: what `AdamStep` holds."""
    b1, b2, lr = RATES["b1"], RATES["b2"], RATES["lr"]
    m = v = largest = 0.0
    product, divisor = 1.0, math.nan
    for t, g in enumerate(grads, 1):
        before = (m if t > 1 else math.nan, divisor)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        if dialect == "amsgrad-torch":
            largest = max(largest, v)
            divisor = math.sqrt(largest / (1 - b2**t)) + eps
        elif dialect == "amsgrad-optax":
            largest = max(largest, v_hat)
            divisor = math.sqrt(largest) + eps
        elif dialect == "radam-torch":
            divisor = (math.sqrt(v) + eps) / math.sqrt(1 - b2**t)
        elif dialect == "eps_root":
            divisor = math.sqrt(v_hat + 1e-4) + eps
        else:
            divisor = math.sqrt(v_hat) + eps
        if dialect == "nadam-torch":
            mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (s * 0.004)) for s in (t, t + 1))
            product *= mu
            m_hat = mu_next * m / (1 - product * mu_next) + (1 - mu) * g / (1 - product)
        elif dialect == "nadam-optax":
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        change = lr * m_hat / divisor
        if dialect.startswith("radam"):
            end = 2 / (1 - b2) - 1
            rho = end - 2 * t * b2**t / (1 - b2**t)
            adapts = rho > 5 if dialect == "radam-torch" else rho >= 5
            square = (rho - 4) * (rho - 2) * end / ((end - 4) * (end - 2) * rho)
            change = change * math.sqrt(square) if adapts else lr * m_hat
        yield *before, divisor, change


def run(grads: np.ndarray, dialect: str = "adam", eps: float = 1e-3, **more: object) -> Iterator[AdamStep]:
    """`adam_step` on the raw state that an optimizer keeps."""
    b1, b2 = RATES["b1"], RATES["b2"]
    m, v, largest, product = (np.zeros_like(grads[0]) for _ in range(4))
    product = 1.0
    for step, g in enumerate(grads):
        options: dict[str, object] = {
            "amsgrad-torch": {"largest": largest},
            "amsgrad-optax": {"largest": largest, "largest_of": "corrected"},
            "radam-torch": {"eps_on": "raw", "threshold": 5.0},
            "radam-optax": {"threshold": 5.0, "inclusive": True},
            "nadam-torch": {"mix": nadam_mix(step, b1, 0.004, product)},
            "nadam-optax": {"mix": nesterov_mix(step, b1)},
            "eps_root": {"eps_root": 1e-4},
        }.get(dialect, {})
        yield adam_step(m, v, step, g, **{**RATES, "eps": eps}, **options, **more)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        largest = np.maximum(largest, v if dialect == "amsgrad-torch" else v / (1 - b2 ** (step + 1)))
        product *= b1 * (1 - 0.5 * 0.96 ** ((step + 1) * 0.004))


DIALECTS = (
    "adam",
    "eps_root",
    "amsgrad-torch",
    "amsgrad-optax",
    "radam-torch",
    "radam-optax",
    "nadam-torch",
    "nadam-optax",
)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_s_step_agrees_with_the_float64_loop(dialect: str) -> None:
    grads = np.random.default_rng(0).standard_normal((12, 3)) * np.array([1.0, 1e-3, 30.0])
    for element in range(3):
        for got, want in zip(run(grads, dialect), loop_steps(grads[:, element], dialect), strict=True):
            # 1 - .99^t loses two digits in the loop.
            assert [float(a[element]) for a in got] == pytest.approx(list(want), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_divisor_before_a_step_is_the_divisor_after_the_step_before_it(dialect: str) -> None:
    steps = list(run(np.random.default_rng(1).standard_normal((10, 4)), dialect))
    assert np.isnan(steps[0].divisor).all()
    assert np.isnan(steps[0].momentum).all()
    for before, now in itertools.pairwise(steps):
        assert now.divisor == pytest.approx(before.divisor_after, rel=1e-13)


def test_a_constant_gradient_has_a_known_divisor_and_step() -> None:
    g = np.array([2.0, -0.5])
    for step, one in enumerate(run(np.tile(g, (9, 1)), eps=0.5)):
        if step:
            assert one.divisor == pytest.approx(np.abs(g) + 0.5)
            assert (np.sign(one.momentum) == np.sign(g)).all()
        assert one.divisor_after == pytest.approx(np.abs(g) + 0.5)
        assert one.step == pytest.approx(0.01 * g / (np.abs(g) + 0.5))


@given(st.integers(0, 10**6), st.integers(-18, 18), st.sampled_from(DIALECTS[:1] + DIALECTS[2:4] + DIALECTS[6:]))
def test_scaling_gradients_and_eps_scales_the_divisors_and_leaves_the_step(seed: int, power: int, dialect: str) -> None:
    grads, scale = np.random.default_rng(seed).standard_normal((7, 4)), 2.0**power
    for one, scaled in zip(run(grads, dialect), run(grads * scale, dialect, eps=1e-3 * scale), strict=True):
        assert scaled.divisor == pytest.approx(one.divisor * scale, rel=1e-12, nan_ok=True)
        assert scaled.divisor_after == pytest.approx(one.divisor_after * scale, rel=1e-12)
        assert scaled.step == pytest.approx(one.step, rel=1e-11)


@pytest.mark.parametrize("eps_mode", ["outside", "paper"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_maxva_s_step_agrees_with_the_float64_loop(eps_mode: str, amsgrad: bool) -> None:
    grads = np.random.default_rng(3).standard_normal((8, 5))
    u, s, w, m, largest = (np.zeros(5) for _ in range(5))
    for t, g in enumerate(grads, 1):
        got = maxva_step(
            m, TemporalMoments(u, s, w), t - 1, g, 0.1, lr=0.1, b1=0.9, eps=1e-2, eps_mode=eps_mode,
            largest=largest if amsgrad else None, beta_max=0.9, beta_min=0.5,
        )  # fmt: skip
        before = (
            m,
            largest
            if amsgrad
            else np.sqrt(s + u * u) + (1e-2 if eps_mode == "outside" or t == 1 else 1e-2 / np.sqrt(w)),
        )
        after, _ = maxva.update(TemporalMoments(u, s, w), g, 0.1, beta_max=0.9, beta_min=0.5)
        u, s, w = after
        m = 0.9 * m + 0.1 * g
        divisor = np.sqrt(s + u * u) + (1e-2 if eps_mode == "outside" else 1e-2 / np.sqrt(w))
        largest = np.maximum(largest, divisor)
        divisor = largest if amsgrad else divisor
        assert got.divisor_after == pytest.approx(divisor, rel=1e-13)
        assert got.step == pytest.approx(0.1 * m / (1 - 0.9**t) / divisor, rel=1e-12)
        if t == 1:
            assert np.isnan(got.divisor).all()
            assert np.isnan(got.momentum).all()
        else:
            assert got.momentum == pytest.approx(before[0])
            assert got.divisor == pytest.approx(before[1], rel=1e-13)


def loop_sums(adam: AdamStep, grads: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> dict[str, float]:
    """The columns, from one element at a time."""
    moments = loop_moments(grads, weights)
    raw = moments.weights
    share = raw / raw.sum()
    s2 = float((share**2).sum())
    spread = moments.m2 / raw.sum()
    in_all = float((share**2 * moments.sq_norms).sum() - s2 * float((moments.mean**2).sum())) / (1 - s2)
    factor = in_all / float(spread.sum())  # the variance of the mean over that of the examples; s2/(1-s2) if equal
    found = dict.fromkeys(NAMES, 0.0)
    elements = moments.mean.size
    for j in np.ndindex(moments.mean.shape):
        p, after, of_mean = float(adam.divisor[j]), float(adam.divisor_after[j]), float(spread[j]) * factor
        found["preconditioned_variance"] += (float(spread[j]) + of_mean) / p**2
        found["preconditioned_grad_sq_norm"] += (float(moments.mean[j]) ** 2 - of_mean) / p**2
        found["inverse_root"] += 1 / after / elements
        found["inverse_root_sq"] += 1 / after**2 / elements
        found["inverse_root_change"] += abs(1 / after - 1 / p) / elements
        found["step_size"] += abs(float(adam.step[j])) / elements
        if moments.m2[j] > raw.sum() * (4 * np.finfo(np.float64).eps * moments.mean[j]) ** 2:  # more than rounding
            found["momentum_disagreements"] += abs(np.sign(adam.momentum[j]) - np.sign(moments.mean[j])) / 2
    return found


def drawn_step(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> AdamStep:
    rng = np.random.default_rng(seed)
    return AdamStep(
        rng.standard_normal(shape) * scale,
        rng.uniform(0.5, 4, shape) * scale,
        rng.uniform(0.5, 4, shape) * scale,
        rng.standard_normal(shape),
    )


@given(gradient_batches(), st.booleans())
def test_the_sums_agree_with_the_float64_loop(grads: np.ndarray, weighted: bool) -> None:
    scale = float(np.abs(grads).max())
    adam = drawn_step(grads.shape[1:], len(grads), scale)
    weights = np.random.default_rng(1).uniform(0.5, 3, len(grads)) if weighted else None
    moments = Moments.from_per_example(grads, weights)
    got, want = adam_sums(adam, moments), loop_sums(adam, list(grads), weights)
    assert tuple(got) == NAMES
    # Under a mean of 100 deviations the weighted loop subtracts numbers 1e4 to 1e5 times their difference.
    size = want["preconditioned_variance"] + abs(want["preconditioned_grad_sq_norm"])
    for name, value in want.items():
        slack = 1e-9 * size if name.startswith("preconditioned") else 0.0
        assert float(got[name]) == pytest.approx(value, rel=1e-9, abs=slack), name


@given(gradient_batches(), st.booleans())
def test_where_the_divisor_is_one_the_sums_are_the_plain_ones(grads: np.ndarray, weighted: bool) -> None:
    weights = np.random.default_rng(2).uniform(0.5, 3, len(grads)) if weighted else None
    moments = Moments.from_per_example(grads, weights)
    ones = np.ones_like(moments.mean)
    got, plain = adam_sums(AdamStep(ones, ones, ones, ones), moments), noise_sums(moments)
    slack = 1e-10 * float(plain.sq_norm_mean)
    assert got["preconditioned_variance"] == pytest.approx(plain.variance_trace, rel=1e-9, abs=slack)
    assert got["preconditioned_grad_sq_norm"] == pytest.approx(plain.grad_sq_norm, rel=1e-9, abs=slack)


@given(gradient_batches(), st.randoms(use_true_random=False))
def test_the_order_of_examples_and_the_split_into_shards_do_not_matter(grads: np.ndarray, random: object) -> None:
    order = list(range(len(grads)))
    random.shuffle(order)
    cut = random.randint(1, len(grads) - 1)
    adam = drawn_step(grads.shape[1:], scale=float(np.abs(grads).max()))
    shards = Moments.from_per_example(grads[order][:cut]).merge(Moments.from_per_example(grads[order][cut:]))
    want, got = adam_sums(adam, Moments.from_per_example(grads)), adam_sums(adam, shards)
    size = float(want["preconditioned_variance"]) + abs(float(want["preconditioned_grad_sq_norm"]))
    for name in NAMES:
        assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-9, abs=1e-11 * size), name


@given(gradient_batches(), st.integers(-12, 12))
def test_scaling_gradients_and_state_alike_leaves_adam_s_geometry_alone(grads: np.ndarray, power: int) -> None:
    factor, adam = 2.0**power, drawn_step(grads.shape[1:], scale=float(np.abs(grads).max()))
    scaled = AdamStep(adam.momentum * factor, adam.divisor * factor, adam.divisor_after * factor, adam.step)
    want = adam_sums(adam, Moments.from_per_example(grads))
    got = adam_sums(scaled, Moments.from_per_example(grads * factor))
    powers = {"inverse_root": -1, "inverse_root_change": -1, "inverse_root_sq": -2}
    for name in NAMES:
        assert float(got[name]) == pytest.approx(float(want[name]) * factor ** powers.get(name, 0), rel=1e-9), name


def test_the_gradient_s_scale_moves_both_preconditioned_sums_and_not_their_ratio() -> None:
    grads = np.random.default_rng(4).standard_normal((6, 8)) + 1
    adam = drawn_step((8,))
    plain = adam_sums(adam, Moments.from_per_example(grads))
    clipped = adam_sums(adam, Moments.from_per_example(0.25 * grads))
    told = adam_sums(adam, Moments.from_per_example(grads), scale=0.0625)
    for name in NAMES:
        assert told[name] == pytest.approx(clipped[name], rel=1e-12), name
    assert told["preconditioned_variance"] == pytest.approx(0.0625 * plain["preconditioned_variance"])


def test_the_preconditioned_pair_is_unbiased() -> None:
    # g ~ N(G, diag s²) in 12 elements under a divisor that the batch has no part in; truth known element by element.
    rng = np.random.default_rng(5)
    mean, deviation, divisor = rng.standard_normal(12), rng.uniform(0.3, 3, 12), rng.uniform(0.2, 5, 12)
    adam = AdamStep(mean, divisor, divisor, mean)
    pairs = np.array(
        [
            [
                float(adam_sums(adam, Moments.from_per_example(rng.standard_normal((6, 12)) * deviation + mean))[name])
                for name in NAMES[:2]
            ]
            for _ in range(1500)
        ]
    )
    truth = np.array([((deviation / divisor) ** 2).sum(), ((mean / divisor) ** 2).sum()])
    # z-bounds of 4 from the draws themselves: false alarm 6e-5 each.
    assert (np.abs(pairs.mean(0) - truth) < 4 * pairs.std(0) / np.sqrt(len(pairs))).all()


def test_a_divisor_that_the_batch_has_a_part_in_hides_noise() -> None:
    """Why P is that of before the step: with b2 = .9 the divisor after it makes the noise 10 % smaller."""
    rng = np.random.default_rng(6)
    before, after = [], []
    for _ in range(400):
        v = rng.chisquare(19, 30) / 19 / 4  # a second moment of the mean of 4 examples of variance 1
        grads = rng.standard_normal((4, 30))
        moments = Moments.from_per_example(grads)
        adam = adam_step(np.zeros(30), v * (1 - 0.9**50), 50, moments.mean, **{**RATES, "b2": 0.9, "eps": 0.0})
        before.append(adam_sums(adam, moments)["preconditioned_grad_sq_norm"])
        after.append(adam_sums(adam._replace(divisor=adam.divisor_after), moments)["preconditioned_grad_sq_norm"])
    error = np.std(before) / np.sqrt(len(before))
    assert abs(np.mean(before)) < 4 * error  # there is no signal: 0 is the truth; false alarm 6e-5
    assert np.mean(after) < -4 * np.std(after) / np.sqrt(len(after))


def test_momentum_that_points_elsewhere_is_counted_where_the_examples_differ() -> None:
    grads = np.array(
        [[1.0, -1.0, 2.0, 1.0, 0.0], [3.0, -3.0, 2.0, -1.0, 0.0]]
    )  # means 2, -2, 2, 0, 0; third: all alike
    ones = np.ones(5)
    momentum = np.array([-1.0, -1.0, -1.0, 1.0, 1.0])
    got = adam_sums(AdamStep(momentum, ones, ones, ones), Moments.from_per_example(grads))
    assert got["momentum_disagreements"] == 1.5  # the first, and half of the fourth, whose mean has no sign


def test_disagreements_are_never_more_than_the_active_elements_they_are_a_share_of() -> None:
    grads = np.array([[3.0, 1.0], [3.0, -2.0]], np.float32)
    grads[1, 0] = np.nextafter(np.float32(3.0), np.float32(4.0))  # apart by rounding alone: not active
    moments = Moments.from_per_example(grads)
    assert moments.m2[0] > 0
    ones = np.ones(2, np.float32)
    found = adam_sums(AdamStep(-ones, ones, ones, ones), moments)["momentum_disagreements"]
    assert found <= float(element_sums(moments)["active_elements"]) == 1.0


def test_before_the_first_step_only_what_the_step_is_made_of_exists() -> None:
    grads = np.random.default_rng(7).standard_normal((5, 3))
    moments = Moments.from_per_example(grads)
    zeros = np.zeros(3)
    for first in (
        adam_step(zeros, zeros, 0, moments.mean, **RATES),
        adam_step(zeros, zeros, np.float32(0), moments.mean, **RATES),
        maxva_step(zeros, TemporalMoments(zeros, zeros, zeros), 0, moments.mean, lr=0.01, b1=0.9, eps=1e-8),
    ):
        sums = adam_sums(first, moments)
        exist = {name for name in NAMES if np.isfinite(sums[name])}
        assert exist == {"inverse_root", "inverse_root_sq", "step_size"}
        assert sums["step_size"] == pytest.approx(0.01, rel=1e-6)  # |m̂/√v̂| is 1


def test_fewer_than_two_examples_have_no_preconditioned_variance() -> None:
    sums = adam_sums(drawn_step((3,)), Moments.from_per_example(np.ones((1, 3))))
    assert np.isnan([sums["preconditioned_variance"], sums["preconditioned_grad_sq_norm"]]).all()
    assert sums["momentum_disagreements"] == 0
    assert np.isfinite([sums[name] for name in NAMES[2:]]).all()


def test_equal_examples_have_no_preconditioned_variance_and_all_signal() -> None:
    adam = drawn_step((3,))
    sums = adam_sums(adam, Moments.from_per_example(np.full((4, 3), 2.0)))
    assert sums["preconditioned_variance"] == 0
    assert sums["preconditioned_grad_sq_norm"] == pytest.approx((4 / adam.divisor**2).sum())


def test_a_dead_element_has_the_divisor_eps_and_stays_finite() -> None:
    grads = np.zeros((6, 4), np.float32)
    adam = adam_step(np.zeros(4, np.float32), np.zeros(4, np.float32), 3, grads[0], **RATES)
    assert (adam.divisor == np.float32(1e-8)).all()
    assert (adam.step == 0).all()
    sums = adam_sums(adam, Moments.from_per_example(grads))
    assert sums["preconditioned_variance"] == sums["preconditioned_grad_sq_norm"] == sums["inverse_root_change"] == 0
    assert sums["inverse_root"] == pytest.approx(1e8)


def test_without_eps_a_dead_element_s_step_does_not_exist_as_in_the_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([parameter], eps=0.0)
    parameter.grad = torch.tensor([0.0, 1.0])
    optimizer.step()
    zeros = np.zeros(2)
    with np.errstate(invalid="ignore"):
        step = adam_step(zeros, zeros, 0, np.array([0.0, 1.0]), lr=1e-3, b1=0.9, b2=0.999, eps=0.0).step
    assert np.isnan(step).tolist() == torch.isnan(parameter).tolist() == [True, False]


def test_a_nan_example_shows_in_the_sums_it_touches_and_in_no_others() -> None:
    grads = np.random.default_rng(8).standard_normal((5, 3))
    grads[2, 1] = np.nan
    with np.errstate(invalid="ignore"):
        sums = adam_sums(drawn_step((3,)), Moments.from_per_example(grads))
    assert np.isnan([sums["preconditioned_variance"], sums["preconditioned_grad_sq_norm"]]).all()
    assert np.isfinite([sums[name] for name in NAMES[2:]]).all()


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1.0, 1e9, 1e18])
@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_extreme_scales_in_float32_keep_their_digits(framework: str, scale: float, eps: float) -> None:
    rng = np.random.default_rng(9)
    grads = (rng.standard_normal((6, 3000)) * scale + scale).astype(np.float32)
    batch_grad = grads.mean(0)
    v = (rng.uniform(0.5, 2, 3000) * scale**2).astype(np.float32)
    m = (rng.standard_normal(3000) * scale).astype(np.float32)
    make = torch.as_tensor if framework == "torch" else jnp.asarray
    adam = adam_step(make(m), make(v), 40, make(batch_grad), **{**RATES, "eps": eps})
    got = adam_sums(adam, Moments.from_per_example(make(grads)))
    wide = adam_step(
        m.astype(np.float64), v.astype(np.float64), 40, batch_grad.astype(np.float64), **{**RATES, "eps": eps}
    )
    want = loop_sums(wide, list(grads.astype(np.float64)))
    for name, value in want.items():
        # Fifteen roundings an element, and 8e-6 for the sum. In jax numbers below 2^-126 are 0: at a scale of 1e-18
        # squares of deviations under .11 of the standard one, 3.4e-4 of the variance; and what this step adds to a
        # v of .5e-36 or more, up to 1.2 % of its root. The change is a difference of two inverse roots, each off by
        # two roundings.
        flushed = 1.3e-2 if framework == "jax" and scale == 1e-18 else 0.0
        slack = (4 * 2**-24 + flushed) * want["inverse_root"] if name == "inverse_root_change" else 0.0
        assert float(got[name]) == pytest.approx(value, rel=1e-5 + flushed, abs=slack), name


def test_half_precision_is_widened() -> None:
    grads = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, wide = (
        adam_step(torch.ones(3, 2, dtype=kind), torch.ones(3, 2, dtype=kind), 5, grads[0].to(kind), **RATES)
        for kind in (torch.bfloat16, torch.float32)
    )
    for a, b in zip(half, wide, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (3, 1, 2)])
def test_odd_shapes_have_sums(shape: tuple[int, ...]) -> None:
    grads = torch.as_tensor(np.random.default_rng(10).standard_normal((4, *shape)))
    adam = AdamStep(*(torch.as_tensor(value) for value in drawn_step(shape)))
    sums = adam_sums(adam, Moments.from_per_example(grads))
    for name in NAMES:
        assert sums[name].shape == ()
        assert torch.isfinite(sums[name]), name


@pytest.mark.parametrize("dialect", DIALECTS)
def test_numpy_torch_and_jitted_jax_make_the_same_of_a_step_count_on_the_device(dialect: str) -> None:
    rng = np.random.default_rng(11)
    grads = (rng.standard_normal((6, 5)) + 1).astype(np.float32)
    first, second = rng.standard_normal(5).astype(np.float32), rng.uniform(0.5, 2, 5).astype(np.float32)
    options: dict[str, object] = {
        "amsgrad-torch": {"largest": second * 2},
        "amsgrad-optax": {"largest": second * 2, "largest_of": "corrected"},
        "radam-torch": {"eps_on": "raw", "threshold": 5.0},
        "radam-optax": {"threshold": 5.0, "inclusive": True},
        "eps_root": {"eps_root": 1e-4},
    }.get(dialect, {})

    def columns(grads: object, m: object, v: object, step: object, largest: object, lr: object) -> dict[str, object]:
        moments = Moments.from_per_example(grads)
        more = dict(options)
        if "largest" in more:
            more["largest"] = largest
        if dialect == "nadam-torch":
            more["mix"] = nadam_mix(step, 0.9, 0.004, 0.3)
        if dialect == "nadam-optax":
            more["mix"] = nesterov_mix(step, 0.9)
        return adam_sums(adam_step(m, v, step, moments.mean, **{**RATES, "lr": lr}, **more), moments)

    arrays = (grads, first, second)
    count_type = jnp.float32 if dialect == "nadam-torch" else jnp.int32  # torch counts in float32, optax in int32
    for made in (0, 3, 30):
        want = columns(*arrays, made, second * 2, 0.01)
        tensors = [torch.as_tensor(a) for a in (*arrays, np.float32(made), second * 2, np.float32(0.01))]
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            traced = jax.jit(columns)(*arrays, jnp.asarray(made, count_type), second * 2, jnp.float32(0.01))
        for got in (columns(*tensors), traced):
            for name in NAMES:
                # float32: about thirty roundings; the change is a difference of two inverse roots.
                slack = 10 * 2**-24 * float(want["inverse_root"]) if name == "inverse_root_change" else 0.0
                assert float(got[name]) == pytest.approx(float(want[name]), rel=3e-6, abs=slack, nan_ok=True), name


def test_nothing_looks_at_a_tensor() -> None:
    """On the meta device there is no value to look at: whoever tries raises."""
    meta = {"device": "meta"}
    moments = Moments.from_per_example(torch.empty(4, 3, **meta))
    step, rate = torch.empty((), **meta), torch.empty((), **meta)
    zeros = torch.empty(3, **meta)
    for adam in (
        adam_step(zeros, zeros, step, moments.mean, **{**RATES, "lr": rate}, threshold=5.0, eps_on="raw"),
        adam_step(zeros, zeros, step, moments.mean, **RATES, mix=nadam_mix(step, 0.9, 0.004, rate), largest=zeros),
        adam_step(zeros, zeros, step, moments.mean, lr=rate, b1=rate, b2=rate, eps=1e-8, mix=nesterov_mix(step, rate)),
        maxva_step(zeros, TemporalMoments(zeros, zeros, zeros), step, moments.mean, lr=rate, b1=0.9, eps=1e-8),
    ):
        assert all(value.device.type == "meta" for value in adam_sums(adam, moments, scale=rate).values())


def test_a_coefficient_out_of_range_is_refused() -> None:
    zeros = np.zeros(2)
    with pytest.raises(ValueError, match=r"coefficient in \[0, 1\), got beta=1.5"):
        adam_step(zeros, zeros, 0, zeros, **{**RATES, "b2": 1.5})
