import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core import elements
from gradiometer.stats_core.elements import element_sums
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.signs import placement_snr, sign_sums
from tests.strategies import gradient_batches

_jitted_moments = jax.jit(lambda grads: Moments.from_per_example(grads, sign_mean=True))
FRAMEWORKS: dict[str, Callable[[np.ndarray], Moments]] = {
    "numpy": lambda grads: Moments.from_per_example(grads, sign_mean=True),
    "torch": lambda grads: Moments.from_per_example(torch.as_tensor(grads), sign_mean=True),
    "jax": lambda grads: _jitted_moments(jnp.asarray(grads)),
}
_jitted_sums = jax.jit(sign_sums)


def loop_signs(grads: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> dict[str, float]:
    """The definition in float64, pair by pair: two different examples' signs multiplied have expectation (E sign)²."""
    flat = [np.asarray(g, np.float64).ravel() for g in grads]
    raw = [1.0] * len(flat) if weights is None else list(weights)
    shares = [a / math.fsum(raw) for a in raw]
    signal, noise, disagreements = 0.0, 0.0, 0.0
    for j in range(len(flat[0])):
        column = [float(g[j]) for g in flat]
        if max(column) == min(column):
            continue
        signs = [(value > 0) - (value < 0) for value in column]
        pairs = [(a, b) for a in range(len(flat)) for b in range(len(flat)) if a != b]
        weight = math.fsum(shares[a] * shares[b] for a, b in pairs)
        signal += math.fsum(shares[a] * shares[b] * signs[a] * signs[b] for a, b in pairs) / weight
        noise += math.fsum(shares[a] * shares[b] * (signs[a] - signs[b]) ** 2 / 2 for a, b in pairs) / weight
        of_signs = math.fsum(w * s for w, s in zip(shares, signs, strict=True))
        of_mean = math.fsum(w * g for w, g in zip(shares, column, strict=True))
        if abs(of_signs) < 1e-12:
            disagreements += 0.5
        elif of_signs * of_mean < 0:
            disagreements += 1.0
    return {"sign_signal": signal, "sign_noise": noise, "sign_disagreements": disagreements}


def sums_of(moments: Moments) -> dict[str, float]:
    """The sums as numbers; under jax compiled, as in training."""
    sums = (_jitted_sums if isinstance(moments.mean, jax.Array) else sign_sums)(moments)
    return {name: float(value) for name, value in sums.items()}


# The definition.


@given(gradient_batches())
def test_the_sums_agree_with_the_float64_loop_over_pairs(grads: np.ndarray) -> None:
    assert sums_of(FRAMEWORKS["numpy"](grads)) == pytest.approx(loop_signs(list(grads)), abs=1e-9)


@given(gradient_batches(), st.integers(0, 10**6))
def test_weighted_sums_agree_with_the_float64_loop_over_pairs(grads: np.ndarray, seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(0.1, 5.0, len(grads))
    got = sums_of(Moments.from_per_example(grads, weights, sign_mean=True))
    assert got == pytest.approx(loop_signs(list(grads), list(weights)), abs=1e-9)


def test_four_examples_by_hand() -> None:
    # Up, up, up, down: e = 1/2, so (4/4 − 1)/3 = 0 and 4·(3/4)/3 = 1. All down: 1 and 0. Two by two: −1/3 and 4/3.
    grads = np.array([[1.0, -1.0, 1.0], [2.0, -2.0, 3.0], [3.0, -3.0, -1.0], [-1.0, -4.0, -1.0]])
    sums = [sums_of(FRAMEWORKS["numpy"](grads[:, j : j + 1])) for j in range(3)]
    assert [s["sign_signal"] for s in sums] == pytest.approx([0, 1, -1 / 3], abs=1e-12)
    assert [s["sign_noise"] for s in sums] == pytest.approx([1, 0, 4 / 3], abs=1e-12)
    assert [s["sign_disagreements"] for s in sums] == [0, 0, 0.5]


def test_where_gradients_are_skewed_the_early_sign_points_the_other_way() -> None:
    # 11 with probability 1/11, else −1: E g = 1/11, E sign = −9/11. The whole population at once:
    population = np.array([[11.0]] + 10 * [[-1.0]])
    moments = FRAMEWORKS["numpy"](population)
    assert moments.mean == pytest.approx([1 / 11])
    assert moments.sign_mean == pytest.approx([-9 / 11])
    assert sums_of(moments)["sign_disagreements"] == 1
    # Batches of 64 of it, 20,000 elements: the mean's sign is right more often than not, that of signs hardly ever.
    grads = np.where(np.random.default_rng(0).random((64, 20_000)) < 1 / 11, 11.0, -1.0)
    moments = FRAMEWORKS["numpy"](grads)
    # E of the squares: (9/11)² = .669; the sd of e² is about 2·.82·.58/8 = .12 an element, .0008 of the mean; 4 sd.
    assert abs(sums_of(moments)["sign_signal"] / 20_000 - (9 / 11) ** 2) < 0.0034
    # P(mean up) = P(6 or more of 64 elevens) = .52 by the binomial; there and only there they disagree. 4 sd: .014.
    up = 1 - sum(math.comb(64, k) * (1 / 11) ** k * (10 / 11) ** (64 - k) for k in range(6))
    assert abs(sums_of(moments)["sign_disagreements"] / 20_000 - up) < 4 * math.sqrt(up * (1 - up) / 20_000)


# Unbiasedness.


@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_signal_and_noise_are_unbiased(k: float, weighted: bool) -> None:
    rng = np.random.default_rng(1)
    examples, size = 6, 100_000
    weights = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) if weighted else None
    grads = rng.standard_normal((examples, size)) + k
    got = sums_of(Moments.from_per_example(grads, weights, sign_mean=True))
    truth = math.erf(k / math.sqrt(2)) ** 2
    share = np.full(examples, 1 / 6) if weights is None else weights / weights.sum()
    s2 = float((share**2).sum())
    squares = (share @ np.sign(grads)) ** 2
    bound = 4 * float(squares.std()) / (1 - s2) / math.sqrt(size)  # 4 sd from the draws: false alarm 6e-5 each
    assert abs(got["sign_signal"] / size - truth) < bound
    assert abs(got["sign_noise"] / size - (1 - truth)) < bound
    assert s2 * (1 - truth) > 2 * bound  # by so much the plain e² is high: it would be caught


def test_gradients_of_exactly_0_lower_the_signal_as_the_docstring_says() -> None:
    # Of 8 examples a share z = 3/4 is 0, by chance: each sign is ±1 with probability 1/8. Low by z/7 = .107.
    rng = np.random.default_rng(2)
    size, z = 200_000, 0.75
    grads = rng.standard_normal((8, size)) * (rng.random((8, size)) > z)
    got = sums_of(FRAMEWORKS["numpy"](grads))
    active = float(element_sums(FRAMEWORKS["numpy"](grads))["active_elements"])
    # A column of zeros alone is inactive, and would have added −1/7 each: back to all columns.
    signal = (got["sign_signal"] - (size - active) / 7) / size
    assert signal == pytest.approx(-z / 7, abs=0.001)  # the sd of e² is .05, of its mean 8/7·.05/447 = .00013
    assert got["sign_signal"] + got["sign_noise"] == pytest.approx(active)


# Invariances.


@given(gradient_batches(), st.randoms(use_true_random=False), st.sampled_from([-3.0, -1e-9, 1e-6, 7.0]))
def test_order_scale_and_direction_change_nothing(grads: np.ndarray, random: object, factor: float) -> None:
    order = list(range(len(grads)))
    random.shuffle(order)  # type: ignore[attr-defined]
    want = sums_of(FRAMEWORKS["numpy"](grads))
    assert sums_of(FRAMEWORKS["numpy"](grads[order])) == pytest.approx(want, abs=1e-9)
    assert sums_of(FRAMEWORKS["numpy"](grads).scaled(factor)) == pytest.approx(want, abs=1e-9)


@given(gradient_batches(min_examples=3), st.data())
def test_merged_shards_give_what_one_pass_gives(grads: np.ndarray, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(grads) - 1))
    merged = FRAMEWORKS["numpy"](grads[:cut]).merge(FRAMEWORKS["numpy"](grads[cut:]))
    assert sums_of(merged) == pytest.approx(sums_of(FRAMEWORKS["numpy"](grads)), abs=1e-9)


@given(gradient_batches())
def test_signal_and_noise_add_up_to_the_active_elements(grads: np.ndarray) -> None:
    moments = FRAMEWORKS["numpy"](grads)
    got = sums_of(moments)
    active = float(element_sums(moments)["active_elements"])
    assert got["sign_signal"] + got["sign_noise"] == pytest.approx(active)
    assert 0 <= got["sign_disagreements"] <= active


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_tie_is_half_a_disagreement_however_the_shards_were_merged(framework: str) -> None:
    # 3 up, 3 down in ten elements; in float32 thirds of thirds leave a last bit behind.
    grads = np.abs(np.random.default_rng(3).standard_normal((6, 10))).astype(np.float32)
    grads[[0, 1, 5]] *= -1
    merged = FRAMEWORKS[framework](grads[:1])
    for row in range(1, 6):
        merged = merged.merge(FRAMEWORKS[framework](grads[row : row + 1]))
    assert sums_of(merged)["sign_disagreements"] == sums_of(FRAMEWORKS[framework](grads))["sign_disagreements"] == 5


# Frameworks.


@pytest.mark.parametrize("weighted", [False, True])
def test_torch_and_jitted_jax_agree_with_numpy(weighted: bool) -> None:
    rng = np.random.default_rng(4)
    grads = (rng.standard_normal((9, 40, 25)) + 0.2).astype(np.float32)
    grads[:, 3] = 0.0
    weights = rng.uniform(0.5, 2.0, 9).astype(np.float32) if weighted else None
    want = sums_of(Moments.from_per_example(grads.astype(np.float64), weights, sign_mean=True))
    for array in (torch.as_tensor, jnp.asarray):
        moments = Moments.from_per_example(array(grads), None if weights is None else array(weights), sign_mean=True)
        # Each e² is right to 2⁻²² or so, the sums of 975 to a few times that.
        assert sums_of(moments) == pytest.approx(want, rel=1e-5, abs=1e-5 * 975)


def test_nothing_waits_for_the_device() -> None:
    # Tensors on the meta device have no values: whoever looks at one raises.
    mean, rows, one = torch.ones(7, 3, device="meta"), torch.ones(9, device="meta"), torch.ones((), device="meta")
    for sums in ((9.0, 9.0), (9.0 * one, 11.0 * one)):
        found = sign_sums(Moments(9, *sums, mean, mean, rows, rows, sign_mean=mean))
        assert all(value.shape == () for value in found.values())


def test_tensors_of_many_tiles_and_with_a_graph_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = np.random.default_rng(11).standard_normal((6, 70, 30)) + 0.3
    monkeypatch.setattr(elements, "_CACHED", 500)
    got = Moments.from_per_example(torch.as_tensor(grads).requires_grad_(), sign_mean=True)
    assert sums_of(got) == pytest.approx(sums_of(FRAMEWORKS["numpy"](grads)), rel=1e-9)


def test_half_precision_is_widened() -> None:
    grads = torch.as_tensor(np.random.default_rng(5).standard_normal((16, 500)) + 0.3).to(torch.bfloat16)
    got = sums_of(Moments.from_per_example(grads, sign_mean=True))
    want = sums_of(Moments.from_per_example(grads.double(), sign_mean=True))
    assert got == pytest.approx(want, rel=1e-5, abs=1e-5 * 500)


# Edges.


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_dead_equal_or_not_finite_is_left_out(framework: str, poison: float) -> None:
    grads = (np.random.default_rng(6).standard_normal((8, 20)) + 0.3).astype(np.float32)
    spoilt = np.concatenate([grads, np.zeros((8, 4), np.float32), np.full((8, 4), 0.1, np.float32)], axis=1)
    rest = sums_of(FRAMEWORKS[framework](np.delete(grads, 7, axis=1)))
    spoilt[3, 7] = poison
    with np.errstate(all="ignore"):
        moments = FRAMEWORKS[framework](spoilt)
    assert sums_of(moments) == pytest.approx(rest, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_the_scale_of_float32_gradients_does_not_matter(framework: str, scale: float) -> None:
    grads = np.random.default_rng(7).standard_normal((8, 300)) + 0.3
    got = sums_of(FRAMEWORKS[framework]((grads * scale).astype(np.float32)))
    assert got == pytest.approx(sums_of(FRAMEWORKS["numpy"](grads)), rel=1e-5, abs=1e-5 * 300)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_example_has_neither_signal_nor_noise(framework: str) -> None:
    got = sums_of(FRAMEWORKS[framework](np.ones((1, 3), np.float32)))
    assert math.isnan(got["sign_signal"])
    assert math.isnan(got["sign_noise"])
    assert got["sign_disagreements"] == 0


def test_moments_without_signs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"collect them with Moments.from_per_example\(grads, sign_mean=True\)"):
        sign_sums(Moments.from_per_example(np.ones((3, 2))))


# The theory.


@pytest.mark.parametrize(("k", "ratio"), [(1e-4, math.sqrt(2 / math.pi)), (0.1, 0.799), (3.0, 4.53)])
def test_the_sign_keeps_four_fifths_of_a_small_signal_and_magnifies_a_large_one(k: float, ratio: float) -> None:
    found = placement_snr(k)
    assert found.sign_first / found.mean_first == pytest.approx(ratio, abs=0.003 if k > 1 else 5e-4)
    assert placement_snr(k, batch=1) == pytest.approx((k, found.sign_first, found.sign_first))
    assert placement_snr(-k) == pytest.approx([-value for value in found])


def test_no_signal_has_no_snr_and_a_certain_sign_no_noise() -> None:
    assert placement_snr(0.0, batch=9, decay=0.5) == (0.0, 0.0, 0.0)
    assert placement_snr(50.0).sign_first == math.inf
    # Where e rounds to 1: P(wrong sign) = Φ(−9) = 1.1286e-19, e/√(1 − e²) = 1/√(4·Φ(−9)).
    assert placement_snr(9.0).sign_first == pytest.approx(1 / math.sqrt(4 * 1.1286e-19), rel=1e-4)


@pytest.mark.parametrize(("batch", "decay"), [(0, 0.0), (4, 1.0), (4, -0.1)])
def test_a_batch_or_momentum_out_of_range_is_refused(batch: int, decay: float) -> None:
    with pytest.raises(ValueError, match="give the number of examples and the coefficient of the momentum"):
        placement_snr(0.1, batch=batch, decay=decay)


@pytest.mark.parametrize("k", [0.1, 0.3])
def test_the_columns_ratio_is_the_theory_squared(k: float) -> None:
    # One batch of 8, 400,000 normal elements: signal over noise is e²/(1 − e²).
    size = 400_000
    grads = np.random.default_rng(8).standard_normal((8, size)) + k
    got = sums_of(FRAMEWORKS["numpy"](grads))
    # sd of (8e² − 1)/7 an element below .45; the ratio's is that times 1/(1 − e²) twice. 4 sd: false alarm 6e-5.
    noise = 1 - math.erf(k / math.sqrt(2)) ** 2
    bound = 4 * 0.45 / noise**2 / math.sqrt(size)
    assert abs(got["sign_signal"] / got["sign_noise"] - placement_snr(k).sign_first ** 2) < bound


def test_simulated_momentum_has_the_snr_and_the_share_of_right_signs_of_the_theory_and_of_the_study() -> None:
    # B = 16, a = .9, k = .1. 4,000 chains of 150 steps (.9^150 = 1e-7 of the start is left), the last step of each.
    rng = np.random.default_rng(9)
    chains, steps, batch, decay, k = 4000, 150, 16, 0.9, 0.1
    momenta = np.zeros((3, chains))
    for _ in range(steps):
        grads = rng.standard_normal((batch, chains)) + k
        mean = grads.mean(axis=0)
        momenta = decay * momenta + (1 - decay) * np.stack([mean, np.sign(mean), np.sign(grads).mean(axis=0)])
    snr = momenta.mean(axis=1) / momenta.std(axis=1)
    right = (momenta > 0).mean(axis=1)
    theory = np.array(placement_snr(k, batch, decay))
    # Variance of a mean over sd: (1 + snr²/2)/N. sd below .026; 4 of them, false alarm 6e-5 each.
    assert (np.abs(snr - theory) < 4 * np.sqrt((1 + theory**2 / 2) / chains)).all()
    # The study's own simulation adds its error, unknown: 2 % of each figure (1.77 is 1.5 % above the theory's 1.74).
    assert theory == pytest.approx([1.77, 1.44, 1.40], rel=0.02)
    assert snr == pytest.approx([1.77, 1.44, 1.40], abs=4 * 0.026 + 0.03)
    # sd of a share p of 4,000: .0031 at .96, .0043 at .92.
    assert right == pytest.approx([0.961, 0.919, 0.921], abs=4 * 0.0043)


def test_the_sign_of_the_mean_of_sixteen_skewed_examples_points_the_other_way_too() -> None:
    # 11 w.p. 1/11, else −1: the mean of 16 is above 0 from two elevens on. E sign = 1 − 2·P(0 or 1) = −.13.
    none_or_one = (10 / 11) ** 16 + 16 / 11 * (10 / 11) ** 15
    assert 1 - 2 * none_or_one == pytest.approx(-0.13, abs=0.005)
    grads = np.where(np.random.default_rng(10).random((16, 40_000)) < 1 / 11, 11.0, -1.0)
    moments = FRAMEWORKS["numpy"](grads)
    assert np.sign(moments.mean).mean() == pytest.approx(1 - 2 * none_or_one, abs=4 / 200)
    # They disagree exactly where the mean is up and fewer than eight of sixteen are.
    ups = (grads > 0).sum(axis=0)
    wanted = ((ups >= 2) & (ups < 8)).sum() + 0.5 * (ups == 8).sum()
    assert sums_of(moments)["sign_disagreements"] == wanted
