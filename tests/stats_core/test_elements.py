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
from gradiometer.stats_core.elements import (
    element_limits,
    element_parts,
    element_sums,
    element_sums_of_parts,
    gsnr,
    t_squares,
)
from gradiometer.stats_core.moments import Moments, variance
from tests.strategies import gradient_batches

# Of printed tables: t.975 by degrees of freedom.
T_CRITICAL = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 6: 2.44691, 7: 2.36462, 8: 2.30600}

_jitted = jax.jit(Moments.from_per_example)
FRAMEWORKS: dict[str, Callable[[np.ndarray], Moments]] = {
    "numpy": Moments.from_per_example,
    "torch": lambda grads: Moments.from_per_example(torch.as_tensor(grads)),
    # Compiled as in training; the count stays a number.
    "jax": lambda grads: _jitted(jnp.asarray(grads))._replace(
        count=len(grads), weight_sum=float(len(grads)), weight_sq_sum=float(len(grads))
    ),
}


def loop_elements(grads: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> dict[str, float]:
    """The definition, element by element in float64. The significance of weighted elements is left to others."""
    flat = [np.asarray(g, np.float64).ravel() for g in grads]
    raw = [1.0] * len(flat) if weights is None else list(weights)
    shares = [a / math.fsum(raw) for a in raw]
    s2 = math.fsum(w * w for w in shares)
    n = 1 / s2
    active, gsnr_sum, evidence_sum, significant = 0, [], [], 0
    for j in range(len(flat[0])):
        mean = math.fsum(w * g[j] for w, g in zip(shares, flat, strict=True))
        sigma2 = math.fsum(w * (g[j] - mean) ** 2 for w, g in zip(shares, flat, strict=True)) / (1 - s2)
        if sigma2 <= (1e-12 * mean) ** 2:
            continue
        active += 1
        ratio = mean**2 / sigma2
        gsnr_sum.append((n - 3) / (n - 1) * ratio - 1 / n)
        evidence_sum.append(1 - (n - 3) / (n - 1) * n * ratio)
        significant += math.sqrt(n * ratio) > T_CRITICAL[round(n) - 1]
    exists = n > 3.001
    return {
        "active_elements": active,
        "gsnr_sum": math.fsum(gsnr_sum) if exists else math.nan,
        "evidence_sum": math.fsum(evidence_sum) if exists else math.nan,
        "significant_elements": significant,
    }


def normal_columns(examples: int, size: int, ratio: float, seed: int, dtype: type = np.float64) -> np.ndarray:
    """Per-example gradients whose every element is normal with GSNR ``ratio``."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((examples, size)) + math.sqrt(ratio)).astype(dtype)


def as_floats(sums: dict[str, object]) -> dict[str, float]:
    return {name: float(value) for name, value in sums.items()}  # type: ignore[arg-type]


_jitted_sums = jax.jit(element_sums)


def sums_of(moments: Moments) -> dict[str, float]:
    """The sums as numbers; under jax compiled, as in training."""
    return as_floats((_jitted_sums if isinstance(moments.mean, jax.Array) else element_sums)(moments))


# The definition.


@given(gradient_batches())
def test_the_sums_agree_with_the_float64_loop(grads: np.ndarray) -> None:
    got, want = as_floats(element_sums(Moments.from_per_example(grads))), loop_elements(list(grads))
    # M2 is right to 1e-12·kappa, and a ratio x to that of its own size, x·kappa ≤ x² roughly; x is below 1e6 here.
    room = 1e-6 * (1 + abs(want["gsnr_sum"])) if math.isfinite(want["gsnr_sum"]) else 0.0
    assert got["active_elements"] == want["active_elements"]
    assert got["significant_elements"] == want["significant_elements"]
    assert got["gsnr_sum"] == pytest.approx(want["gsnr_sum"], rel=1e-9, abs=room, nan_ok=True)
    assert got["evidence_sum"] == pytest.approx(want["evidence_sum"], rel=1e-9, abs=room * len(grads), nan_ok=True)


@given(gradient_batches(min_examples=4), st.integers(0, 10**6))
def test_weighted_sums_agree_with_the_float64_loop(grads: np.ndarray, seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(0.5, 2.0, len(grads))
    got = as_floats(element_sums(Moments.from_per_example(grads, weights)))
    want = loop_elements(list(grads), list(weights))
    room = 1e-6 * (1 + abs(want["gsnr_sum"])) if math.isfinite(want["gsnr_sum"]) else 0.0
    assert got["active_elements"] == want["active_elements"]
    assert got["gsnr_sum"] == pytest.approx(want["gsnr_sum"], rel=1e-9, abs=room, nan_ok=True)
    assert got["evidence_sum"] == pytest.approx(want["evidence_sum"], rel=1e-9, abs=room * len(grads), nan_ok=True)


@given(gradient_batches(min_examples=4))
def test_the_sums_are_those_of_the_arrays(grads: np.ndarray) -> None:
    moments = Moments.from_per_example(grads)
    sums, n = as_floats(element_sums(moments)), len(grads)
    assert sums["gsnr_sum"] == pytest.approx(float(np.nansum(gsnr(moments))), rel=1e-9, abs=1e-9)
    t2 = t_squares(moments)
    assert sums["active_elements"] == np.isfinite(t2).sum()
    assert sums["evidence_sum"] == pytest.approx(float(np.nansum(1 - (n - 3) / (n - 1) * t2)), rel=1e-9, abs=1e-9)


def test_five_numbers_by_hand() -> None:
    # 2 4 3 6 5: mean 4, variance 2.5; t² = 5·16/2.5 = 32, above 2.776² = 7.7; r = (2/4)·16/2.5 − 1/5 = 3.
    moments = Moments.from_per_example(np.array([[2.0], [4.0], [3.0], [6.0], [5.0]]))
    assert t_squares(moments) == pytest.approx([32.0])
    assert gsnr(moments) == pytest.approx([3.0])
    wanted = {"active_elements": 1, "gsnr_sum": 3, "evidence_sum": -15, "significant_elements": 1}
    assert as_floats(element_sums(moments)) == pytest.approx(wanted)


def test_the_t_statistic_of_two_numbers_is_their_sum_over_their_difference() -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 50))
    assert t_squares(Moments.from_per_example(np.stack([a, b]))) == pytest.approx(((a + b) / (a - b)) ** 2)


def test_an_element_is_significant_from_the_critical_value_on() -> None:
    # n = 4, deviations −1, −1, 1, 1: σ̂² = 4/3, t = mean·√3; critical 3.18245.
    deviations = np.array([-1.0, -1.0, 1.0, 1.0])[:, None]
    edge = 3.18245 / math.sqrt(3)
    means = np.array([edge - 1e-4, edge + 1e-4, -edge + 1e-4, -edge - 1e-4])
    assert element_sums(Moments.from_per_example(deviations + means))["significant_elements"] == 2


# Unbiasedness.


@pytest.mark.parametrize("examples", [8, 32])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_gsnr_is_unbiased_for_normal_elements(examples: int, ratio: float) -> None:
    size, freedom, shift = 200_000, examples - 1, examples * ratio
    got = as_floats(element_sums(Moments.from_per_example(normal_columns(examples, size, ratio, 11))))
    # t² is noncentral F(1, n − 1) with noncentrality n·r; its variance from the textbook; r̂ = ((n−3)/(n−1)·t² − 1)/n.
    spread = (1 + shift) ** 2 + (1 + 2 * shift) * (freedom - 2)
    sd = math.sqrt(2 * spread / ((freedom - 2) ** 2 * (freedom - 4))) * freedom * (examples - 3) / freedom / examples
    bound = 4 * sd / math.sqrt(size)  # false alarm 6e-5 each
    assert abs(got["gsnr_sum"] / size - ratio) < bound
    # The same test would catch the plug-in ratio less 1/n, which is this much too high.
    assert 2 * ratio / (examples - 3) + 2 / (examples * (examples - 3)) > 2 * bound


@pytest.mark.parametrize("examples", [8, 32])
def test_evidence_is_0_under_noise(examples: int) -> None:
    size, freedom = 200_000, examples - 1
    got = as_floats(element_sums(Moments.from_per_example(normal_columns(examples, size, 0.0, 12))))
    # Variance of F(1, ν): 2ν²(ν − 1)/((ν − 2)²(ν − 4)). 4 sd: false alarm 6e-5 each.
    sd = math.sqrt(2 * (freedom - 1) / ((freedom - 2) ** 2 * (freedom - 4))) * (freedom - 2)
    bound = 4 * sd / math.sqrt(size)
    assert abs(got["evidence_sum"] / size) < bound
    assert 2 / (examples - 3) > 2 * bound  # where the uncorrected criterion sits


@pytest.mark.parametrize("examples", [4, 8, 32, 128])
def test_one_element_in_twenty_is_significant_under_noise(examples: int) -> None:
    size = 40_000
    got = element_sums(Moments.from_per_example(normal_columns(examples, size, 0.0, 13)))["significant_elements"]
    bound = 4 * math.sqrt(0.05 * 0.95 / size)  # .0044; a fixed threshold of 2 gives .139, .086, .054, .048
    assert abs(float(got) / size - 0.05) < bound


@pytest.mark.parametrize(("examples", "reads"), [(8, 0.14), (32, 0.008)])
def test_skewed_elements_read_high_as_the_docstring_says(examples: int, reads: float) -> None:
    grads = np.random.default_rng(14).standard_exponential((examples, 200_000)) - 1.0
    found = float(element_sums(Moments.from_per_example(grads))["gsnr_sum"]) / 200_000
    assert found == pytest.approx(reads, abs=0.1 * reads)  # its own sd is .0011 and .0001


@pytest.mark.parametrize(("token_means", "evidence", "share"), [(False, 0.01, 0.049), (True, 0.24, 0.026)])
def test_unequal_weights_err_towards_noise_as_far_as_the_docstring_says(
    token_means: bool, evidence: float, share: float
) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.uniform(0.1, 2.0, 32)
    grads = rng.standard_normal((32, 100_000))
    if token_means:
        grads /= np.sqrt(lengths)[:, None]
    got = as_floats(element_sums(Moments.from_per_example(grads, lengths)))
    assert got["evidence_sum"] / 100_000 == pytest.approx(evidence, abs=0.02)  # sd of the mean .005
    assert got["significant_elements"] / 100_000 == pytest.approx(share, abs=0.003)  # sd .0007


def test_examples_of_weight_0_are_as_good_as_absent() -> None:
    grads = normal_columns(12, 300, 0.1, 15)
    weights = np.array([3.0] * 8 + [0.0] * 4)
    got = as_floats(element_sums(Moments.from_per_example(grads, weights)))
    assert got == pytest.approx(as_floats(element_sums(Moments.from_per_example(grads[:8]))), rel=1e-9)


# Invariances.


@given(gradient_batches(min_examples=4), st.randoms(use_true_random=False))
def test_the_order_of_the_examples_does_not_matter(grads: np.ndarray, random: object) -> None:
    order = list(range(len(grads)))
    random.shuffle(order)  # type: ignore[attr-defined]
    got = as_floats(element_sums(Moments.from_per_example(grads[order])))
    want = as_floats(element_sums(Moments.from_per_example(grads)))
    assert got == pytest.approx(want, rel=1e-6, abs=1e-6 * len(grads))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e9, 1e18])
def test_the_scale_of_the_gradients_does_not_matter_in_float32(framework: str, scale: float) -> None:
    grads = normal_columns(16, 3000, 0.1, 16)
    want = sums_of(Moments.from_per_example(grads))
    got = sums_of(FRAMEWORKS[framework]((grads * scale).astype(np.float32)))
    assert got["active_elements"] == 3000
    # Rounding of x: 2⁻²⁴ of each gradient moves t by about √n·2⁻²⁴ of itself plus that of the sums: far below 1e-5.
    # jax at 1e-18: squares below .11 standard deviations are lost, ∫z² = 3.4e-4 of M₂ on average; three times that.
    room = 1e-3 if (framework, scale) == ("jax", 1e-18) else 1e-5
    assert got["gsnr_sum"] == pytest.approx(want["gsnr_sum"], abs=room * (want["gsnr_sum"] + 3000 / 16))
    assert got["evidence_sum"] == pytest.approx(-16 * got["gsnr_sum"], rel=1e-5)
    assert abs(got["significant_elements"] - want["significant_elements"]) <= 1 + room * 3000


@given(gradient_batches(min_examples=4), st.integers(0, 2**16))
def test_turning_elements_over_changes_nothing(grads: np.ndarray, seed: int) -> None:
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], grads.shape[1:])
    got = as_floats(element_sums(Moments.from_per_example(grads * signs)))
    assert got == as_floats(element_sums(Moments.from_per_example(grads)))


@given(gradient_batches(min_examples=4))
def test_the_elements_of_two_parameters_add_up(grads: np.ndarray) -> None:
    flat = grads.reshape(len(grads), -1)
    whole = as_floats(element_sums(Moments.from_per_example(flat)))
    parts = [element_sums(Moments.from_per_example(part)) for part in (flat[:, :1], flat[:, 1:])]
    assert {n: float(parts[0][n] + parts[1][n]) for n in whole} == pytest.approx(whole, rel=1e-9, abs=1e-9)


@given(gradient_batches(min_examples=5), st.data())
def test_merged_shards_give_what_one_pass_gives(grads: np.ndarray, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(grads) - 1))
    merged = Moments.from_per_example(grads[:cut]).merge(Moments.from_per_example(grads[cut:]))
    got, want = as_floats(element_sums(merged)), as_floats(element_sums(Moments.from_per_example(grads)))
    assert got == pytest.approx(want, rel=1e-6, abs=1e-6 * len(grads))


# Frameworks.


@pytest.mark.parametrize("weighted", [False, True])
def test_torch_and_jitted_jax_agree_with_numpy(weighted: bool) -> None:
    grads = normal_columns(12, 900, 0.2, 17, np.float32).reshape(12, 30, 30)
    grads[:, 0] = 0.0
    weights = np.random.default_rng(18).uniform(0.5, 2.0, 12).astype(np.float32) if weighted else None
    want = as_floats(element_sums(Moments.from_per_example(grads.astype(np.float64), weights)))
    torch_weights = None if weights is None else torch.as_tensor(weights)
    in_torch = Moments.from_per_example(torch.as_tensor(grads), torch_weights)
    in_jax = Moments.from_per_example(jnp.asarray(grads), weights if weights is None else jnp.asarray(weights))
    for got in (element_sums(in_torch), jax.jit(element_sums)(in_jax)):
        assert float(got["active_elements"]) == want["active_elements"] == 870
        assert float(got["gsnr_sum"]) == pytest.approx(want["gsnr_sum"], rel=1e-5, abs=1e-5 * 870)
        assert float(got["evidence_sum"]) == pytest.approx(want["evidence_sum"], rel=1e-5, abs=12e-5 * 870)
        assert abs(float(got["significant_elements"]) - want["significant_elements"]) <= 1
    for array in (gsnr, t_squares):
        expected = array(Moments.from_per_example(grads.astype(np.float64), weights))
        assert array(in_torch).numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
        assert np.asarray(jax.jit(array)(in_jax)) == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("examples", [1, 2, 3, 4])
def test_a_traced_count_gives_what_a_concrete_one_gives(examples: int) -> None:
    moments = Moments.from_per_example(jnp.asarray(normal_columns(examples, 50, 0.2, 19, np.float32)))
    want, got = as_floats(element_sums(moments)), as_floats(jax.jit(element_sums)(moments))
    # The traced threshold is right to 5e-6: an element may lie between the two only with probability 1e-4.
    assert got == pytest.approx(want, rel=1e-5, abs=1e-3, nan_ok=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_waits_for_the_device(weighted: bool) -> None:
    # Tensors on the meta device have no values: whoever looks at one raises.
    one = torch.ones((), device="meta")
    sums = (9.0 * one, 11.0 * one) if weighted else (9.0, 9.0)
    mean, rows = torch.ones(7, 3, device="meta"), torch.ones(9, device="meta")
    moments = Moments(9, *sums, mean, mean, rows, rows)
    assert all(value.shape == () for value in element_sums(moments).values())
    assert gsnr(moments).shape == t_squares(moments).shape == (7, 3)


@pytest.mark.parametrize("layout", ["plain", "transposed", "wide", "channels last"])
def test_arrays_of_many_tiles_add_up_to_float32_precision(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"plain": (700, 1000), "transposed": (1000, 700), "wide": (3, 250_000), "channels last": (40, 25, 20, 30)}
    grads = torch.as_tensor(normal_columns(16, math.prod(shape[layout]), 0.1, 20, np.float32))
    moments = Moments.from_per_example(grads.reshape(16, *shape[layout]))
    if layout == "transposed":
        moments = moments._replace(mean=moments.mean.T, m2=moments.m2.T)
    if layout == "channels last":
        last = torch.channels_last
        moments = moments._replace(
            mean=moments.mean.contiguous(memory_format=last), m2=moments.m2.contiguous(memory_format=last)
        )
    want = element_sums(moments._replace(mean=moments.mean.double(), m2=moments.m2.double()))
    for cached in (elements._CACHED, 10_000):
        monkeypatch.setattr(elements, "_CACHED", cached)
        limits = element_limits(moments)
        active, ratio_sum, significant = element_parts(moments.mean, moments.m2, limits).tolist()
        assert active == math.prod(shape[layout])
        assert significant == float(want["significant_elements"])
        exact = moments.mean.double() ** 2 / moments.m2.double()
        assert ratio_sum == pytest.approx(float(exact.sum()), rel=3e-6)
        assert torch.allclose(t_squares(moments).double(), exact * 15 * 16, rtol=1e-6, atol=0)


def test_jax_sums_of_a_million_elements_keep_float32_precision() -> None:
    grads = normal_columns(8, 1_000_000, 0.1, 21, np.float32)
    moments = Moments.from_per_example(grads)
    exact = float((moments.mean.astype(np.float64) ** 2 / moments.m2.astype(np.float64)).sum())
    in_jax = moments._replace(mean=jnp.asarray(moments.mean), m2=jnp.asarray(moments.m2))

    @jax.jit
    def parts(one: Moments) -> jax.Array:
        return element_parts(one.mean, one.m2, element_limits(one))

    active, ratio_sum, _ = np.asarray(parts(in_jax)).tolist()
    assert active == 1_000_000
    assert ratio_sum == pytest.approx(exact, rel=3e-6)


def test_the_parts_of_many_parameters_are_formed_at_once() -> None:
    all_moments = [Moments.from_per_example(torch.as_tensor(normal_columns(6, size, 0.3, size))) for size in (3, 40)]
    limits = element_limits(all_moments[0])
    stacked = torch.stack([element_parts(one.mean, one.m2, limits) for one in all_moments])
    together = element_sums_of_parts(stacked, limits)
    for row, one in enumerate(all_moments):
        assert {n: float(value[row]) for n, value in together.items()} == pytest.approx(as_floats(element_sums(one)))


def test_moments_are_left_as_they_are() -> None:
    grads = torch.as_tensor(normal_columns(6, 50, 0.3, 22)).requires_grad_()
    moments = Moments.from_per_example(grads)
    before = [moments.mean.detach().clone(), moments.m2.detach().clone()]
    found = [*element_sums(moments).values(), gsnr(moments), t_squares(moments)]
    assert torch.equal(moments.mean, before[0])
    assert torch.equal(moments.m2, before[1])
    assert not any(value.requires_grad for value in found)


def test_half_precision_is_widened() -> None:
    grads = torch.as_tensor(normal_columns(16, 500, 0.2, 23)).to(torch.bfloat16)
    got = element_sums(Moments.from_per_example(grads))
    want = element_sums(Moments.from_per_example(grads.double()))
    assert float(got["gsnr_sum"]) == pytest.approx(float(want["gsnr_sum"]), abs=1e-5 * 500)


# Edges.


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_dead_element_is_left_out_of_all_four(framework: str) -> None:
    grads = normal_columns(8, 20, 0.3, 24, np.float32)
    want = sums_of(FRAMEWORKS[framework](grads))
    got = sums_of(FRAMEWORKS[framework](np.pad(grads, ((0, 0), (0, 5)))))
    assert got == pytest.approx(want, rel=1e-6)
    assert np.isnan(np.asarray(t_squares(FRAMEWORKS[framework](np.zeros((8, 3), np.float32))))).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("value", [0.1, 1e-9, 3e15])
def test_an_element_that_is_the_same_for_all_up_to_rounding_is_left_out_of_all_four(
    framework: str, value: float
) -> None:
    # Merged in shards of unequal size, and with a last bit that differs, as sums in another order leave it.
    grads = np.full((21, 3), value, np.float32)
    grads[::3, 1] = np.nextafter(np.float32(value), np.float32(np.inf))
    grads[::5, 2] = np.nextafter(np.float32(value), np.float32(0))
    parts = [FRAMEWORKS[framework](part) for part in np.split(grads, [2, 9, 10])]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    for moments in (merged, FRAMEWORKS[framework](grads)):
        assert (np.asarray(moments.m2) > 0).any()  # so it is rounding, not 0, that is left out
        assert set(sums_of(moments).values()) == {0.0}
        assert np.isnan(np.asarray(gsnr(moments))).all()


def test_a_small_true_spread_is_not_rounding() -> None:
    # Standard deviation 1e-5 of the mean, in float32: 80 eps.
    grads = (1.0 + 1e-5 * np.random.default_rng(25).standard_normal((16, 100))).astype(np.float32)
    assert element_sums(Moments.from_per_example(grads))["active_elements"] == 100


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_an_element_that_is_not_finite_is_left_out(framework: str, poison: float) -> None:
    # (3e38 is finite; its square is not.)
    grads = normal_columns(8, 20, 0.3, 26, np.float32)
    poisoned = grads.copy()
    poisoned[3, 7] = poison
    with np.errstate(all="ignore"):
        moments = FRAMEWORKS[framework](poisoned)
    assert not np.isfinite(np.asarray(moments.m2)[7])
    rest = sums_of(FRAMEWORKS[framework](np.delete(grads, 7, axis=1)))
    assert sums_of(moments) == pytest.approx(rest, rel=1e-6)
    assert np.flatnonzero(np.isnan(np.asarray(t_squares(moments)))).tolist() == [7]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_up_to_three_examples_have_no_expectation(framework: str) -> None:
    grads = normal_columns(4, 20, 0.3, 27, np.float32)
    for examples in (1, 2, 3, 4):
        moments = FRAMEWORKS[framework](grads[:examples])
        got = sums_of(moments)
        assert got["active_elements"] == (0 if examples == 1 else 20)
        assert math.isnan(got["gsnr_sum"]) == math.isnan(got["evidence_sum"]) == (examples <= 3)
        assert math.isnan(got["significant_elements"]) == (examples == 1)
        assert np.isnan(np.asarray(gsnr(moments))).all() == (examples <= 3)
        assert np.isnan(np.asarray(t_squares(moments))).all() == (examples == 1)


@pytest.mark.parametrize("weight", [0.1, 0.3, 7e4])
@pytest.mark.parametrize("examples", [2, 3, 4])
def test_the_rounding_of_weights_does_not_decide_what_exists(weight: float, examples: int) -> None:
    grads = torch.as_tensor(normal_columns(examples, 20, 0.3, 28, np.float32))
    plain = as_floats(element_sums(Moments.from_per_example(grads)))
    weighted = as_floats(element_sums(Moments.from_per_example(grads, torch.full((examples,), weight))))
    assert weighted == pytest.approx(plain, rel=1e-4, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, 1e-9)])
def test_all_the_weight_on_one_example_is_one_example(weights: tuple[float, float]) -> None:
    grads = torch.as_tensor([[1.0, 2.0], [3.0, 5.0]])
    got = as_floats(element_sums(Moments.from_per_example(grads, torch.tensor(weights))))
    assert np.isnan([got["gsnr_sum"], got["evidence_sum"], got["significant_elements"]]).all()


@pytest.mark.parametrize("zeros", [np.zeros, torch.zeros, jnp.zeros])
def test_no_example_has_no_statistics(zeros: Callable[..., object]) -> None:
    got = as_floats(element_sums(Moments(0, 0.0, 0.0, zeros(3), zeros(3), zeros(0), zeros(0))))
    assert got.pop("active_elements") == 0
    assert np.isnan(list(got.values())).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1, 1, 1), (1, 7)])
def test_odd_shapes_are_taken(framework: str, shape: tuple[int, ...]) -> None:
    grads = np.random.default_rng(29).standard_normal((6, *shape)).astype(np.float32)
    moments = FRAMEWORKS[framework](grads)
    assert sums_of(moments)["active_elements"] == math.prod(shape)
    assert tuple(gsnr(moments).shape) == tuple(t_squares(moments).shape) == shape


def test_the_t_statistic_is_the_mean_over_its_standard_error() -> None:
    moments = Moments.from_per_example(normal_columns(9, 30, 0.5, 30))
    assert t_squares(moments) == pytest.approx(moments.mean**2 / (variance(moments) / 9))
