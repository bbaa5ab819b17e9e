import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core.catalog import STATISTICS
from gradiometer.stats_core.examples import ExampleRows, example_columns, outliers
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_sums
from gradiometer.stats_core.window import windowed
from tests.strategies import gradient_batches

NAMES = [row.name for row in STATISTICS if row.kind == "example"]
DIRECTIONS = ["parallel_variance", "example_cosine", "conflicting_share", "deviation_kurtosis"]


def rows_of(
    layers: Sequence[np.ndarray], weights: np.ndarray | None = None, dtype: type = np.float64, *, dots: bool = True
) -> ExampleRows:
    """What a collector knows of layers of per-example gradients, each of shape (B, *param)."""
    flat = [np.asarray(g, np.float64).reshape(len(g), -1) for g in layers]
    a = np.ones(len(flat[0])) if weights is None else np.asarray(weights, float)
    means = [(a[:, None] * np.where(a[:, None] != 0, g, 0)).sum(0) / max(a.sum(), 1e-300) for g in flat]
    return ExampleRows(
        sq_norms=np.stack([(g * g).sum(1) for g in flat]).astype(dtype),
        mean_sq_norm=np.stack([mean @ mean for mean in means]).astype(dtype),
        weights=a.astype(dtype),
        dots=np.stack([g @ mean for g, mean in zip(flat, means, strict=True)]).astype(dtype) if dots else None,
    )


def only(rows: ExampleRows, name: str) -> float:
    return float(np.asarray(example_columns(rows, [name])[name])[0])


def loop_quantile(sizes: Sequence[float], percent: int) -> float:
    ordered = sorted(sizes)
    if not ordered:
        return math.nan
    place, rest = divmod((len(ordered) - 1) * percent, 100)
    if rest == 0 or ordered[place] == ordered[place + 1]:
        return ordered[place]
    return ordered[place] + (ordered[place + 1] - ordered[place]) * rest / 100


def loop_columns(grads: np.ndarray, weights: Sequence[float] | None = None) -> dict[str, float]:
    """The definitions, one example at a time: the others' mean is formed from the others."""
    everyone = [np.asarray(g, np.float64).ravel() for g in grads]
    raw = [1.0] * len(everyone) if weights is None else [float(a) for a in weights]
    examples = [(a, g) for a, g in zip(raw, everyone, strict=True) if a != 0]
    sizes = [math.sqrt(math.fsum(g * g)) if np.isfinite(g).all() else math.inf for _, g in examples]
    found = {name: loop_quantile(sizes, p) for name, p in zip(NAMES[:4], (50, 95, 99, 100), strict=True)}
    squares = [size**2 for size in sizes if math.isfinite(size)]
    fourth = math.fsum(n * n for n in squares)
    found["effective_examples"] = math.fsum(squares) ** 2 / fourth if fourth > 0 else math.nan
    found |= dict.fromkeys(DIRECTIONS, math.nan)
    if len(examples) < 2 or not all(map(math.isfinite, sizes)):
        return found
    total = math.fsum(a for a, _ in examples)
    w = [a / total for a, _ in examples]
    mean = sum(a * g for a, (_, g) in zip(w, examples, strict=True))
    length = math.sqrt(mean @ mean)
    cosines, against, deviations, along = [], [], [], []
    for i, (_, g) in enumerate(examples):
        others = [(a, h) for k, (a, (_, h)) in enumerate(zip(w, examples, strict=True)) if k != i]
        rest = sum(a * h for a, h in others) / math.fsum(a for a, _ in others)
        product, lengths = float(g @ rest), math.sqrt(g @ g) * math.sqrt(rest @ rest)
        if lengths > 0:
            cosines.append(product / lengths)
        against.append(product < 0)
        deviations.append(float((g - mean) @ (g - mean)))
        along.append(float(g @ mean) / length if length > 0 else math.nan)
    # P along ḡ: the variance of a weighted mean of the numbers ⟨gᵢ, ḡ⟩/‖ḡ‖, as of any numbers.
    s2 = math.fsum(a * a for a in w)
    found["parallel_variance"] = (math.fsum(a * a * x * x for a, x in zip(w, along, strict=True)) - s2 * length**2) / (
        1 - s2
    )
    found["example_cosine"] = float(np.mean(cosines)) if cosines else math.nan
    found["conflicting_share"] = float(np.mean(against))
    spread = float(np.mean(deviations))
    found["deviation_kurtosis"] = float(np.mean(np.square(deviations))) / spread**2 if spread > 0 else math.nan
    return found


def test_they_are_the_catalogues_rows_of_kind_example() -> None:
    rows = rows_of([np.eye(3)])
    assert list(example_columns(rows, NAMES)) == NAMES
    with pytest.raises(ValueError, match="got name='norm_mean'; ask for rows of the catalogue of kind \"example\""):
        example_columns(rows, ["norm_max", "norm_mean"])


@pytest.mark.parametrize("name", NAMES)
def test_each_can_be_asked_for_alone(name: str) -> None:
    rows = rows_of(list(np.random.default_rng(0).standard_normal((3, 6, 4))))
    alone = example_columns(rows, {name})
    assert list(alone) == [name]
    assert alone[name].shape == (3,)
    assert (alone[name] == example_columns(rows, NAMES)[name]).all()


# ---------------------------------------------------------------- the float64 loop


def agree(got: dict[str, np.ndarray], want: dict[str, float], condition: float, row: int = 0) -> None:
    for name, value in want.items():
        size = {"parallel_variance": want["norm_max"] ** 2, "example_cosine": 1.0}.get(name, 0.0)
        # float64 rounds at 1e-16; differences of squares lose as much again as the mean is larger than the deviations.
        bound = 1e-11 * condition
        if name == "deviation_kurtosis" and condition > 2**17:  # four terms, each κ times R²: not resolved
            value = math.nan
        assert got[name][row] == pytest.approx(value, rel=bound, abs=0.1 * bound * size, nan_ok=True), name


def condition_of(grads: np.ndarray) -> float:
    flat = grads.reshape(len(grads), -1)
    return float((flat**2).sum() / ((flat - flat.mean(0)) ** 2).sum())


@given(gradient_batches(min_examples=2))
def test_all_agree_with_the_float64_loop(grads: np.ndarray) -> None:
    agree(example_columns(rows_of([grads]), NAMES), loop_columns(grads), condition_of(grads))


@given(gradient_batches(min_examples=3), st.integers(0, 10**6))
def test_with_weights_all_agree_with_the_float64_loop(grads: np.ndarray, seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(0.2, 5.0, len(grads))
    agree(example_columns(rows_of([grads], weights), NAMES), loop_columns(grads, weights), condition_of(grads))


@given(gradient_batches(min_examples=3), st.integers(0, 10**6))
def test_padding_is_no_example_whatever_it_holds(grads: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    place = int(rng.integers(0, len(grads) + 1))
    rubbish = rng.choice([np.nan, np.inf, 0.0, 1e30])
    plain = rows_of([grads])
    padded = ExampleRows(
        sq_norms=np.insert(plain.sq_norms, place, rubbish, axis=1),
        mean_sq_norm=plain.mean_sq_norm,
        weights=np.insert(plain.weights, place, 0.0),
        dots=np.insert(plain.dots, place, -rubbish, axis=1),
    )
    want, got = example_columns(plain, NAMES), example_columns(padded, NAMES)
    assert got == {name: pytest.approx(value, rel=1e-9, nan_ok=True) for name, value in want.items()}


def test_several_layers_and_the_model_are_rows_of_their_own() -> None:
    rng = np.random.default_rng(1)
    layers = [rng.standard_normal((9, 5)) + 1, rng.standard_normal((9, 3, 2)), 1e6 * rng.standard_normal((9, 1))]
    model = np.concatenate([g.reshape(9, -1) for g in layers], axis=1)
    parts = rows_of(layers)
    rows = ExampleRows(
        sq_norms=np.vstack([parts.sq_norms, parts.sq_norms.sum(0)]),
        mean_sq_norm=np.append(parts.mean_sq_norm, parts.mean_sq_norm.sum()),
        weights=parts.weights,
        dots=np.vstack([parts.dots, parts.dots.sum(0)]),
    )
    got = example_columns(rows, NAMES)
    for row, grads in enumerate([*layers, model]):
        agree(got, loop_columns(grads), 1e3, row)


# ---------------------------------------------------------------- closed forms


def test_quantiles_are_those_of_the_norms() -> None:
    sq_norms = (np.arange(101.0) ** 2)[None]
    rows = ExampleRows(sq_norms, np.ones(1), np.ones(101))
    got = example_columns(rows, NAMES[:4])
    assert [float(value[0]) for value in got.values()] == [50.0, 95.0, 99.0, 100.0]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_quantiles_are_numpys(sizes: list[float]) -> None:
    rows = ExampleRows(np.square(sizes)[None], np.ones(1), np.ones(len(sizes)))
    got = [value[0] for value in example_columns(rows, NAMES[:4]).values()]
    assert got == pytest.approx(np.quantile(np.sqrt(np.square(sizes)), [0.5, 0.95, 0.99, 1.0]), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_effective_examples_counts_examples_of_equal_size(k: int) -> None:
    rows = ExampleRows(np.repeat([[5.0, 0.0]], [k, 12 - k], axis=1), np.ones(1), np.ones(12))
    assert only(rows, "effective_examples") == pytest.approx(k, rel=1e-15)


def test_orthogonal_examples_neither_agree_nor_conflict() -> None:
    rows = rows_of([np.eye(8) * np.arange(1.0, 9.0)[:, None]])
    assert only(rows, "example_cosine") == pytest.approx(0, abs=1e-15)
    assert only(rows, "conflicting_share") == 0


def test_examples_of_disjoint_elements_do_not_conflict_by_their_rounding() -> None:
    # An embedding where no two examples share a token: what is formed is a rounding error of either sign.
    rng = np.random.default_rng(2)
    grads = np.zeros((12, 12 * 257), np.float32)
    for i in range(12):
        grads[i, i * 257 : (i + 1) * 257] = rng.standard_normal(257) * 10.0 ** rng.integers(-3, 3)
    mean = grads.mean(0)
    rows = ExampleRows((grads**2).sum(1)[None], np.array([mean @ mean]), np.ones(12, np.float32), (grads @ mean)[None])
    assert ((rows.dots - rows.sq_norms / 12) < 0).any()  # there is something to be misread
    assert only(rows, "conflicting_share") == 0
    assert abs(only(rows, "example_cosine")) < 1e-4


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0, 4.0]])
def test_equal_gradients_agree_and_do_not_deviate(weights: list[float] | None) -> None:
    grads = np.tile([[3.0, 4.0]], (4, 1))
    got = example_columns(rows_of([grads], None if weights is None else np.array(weights)), NAMES)
    assert got["example_cosine"][0] == pytest.approx(1, rel=1e-12)
    assert got["conflicting_share"][0] == 0
    assert got["parallel_variance"][0] == pytest.approx(0, abs=1e-12)
    assert np.isnan(got["deviation_kurtosis"][0])
    assert got["effective_examples"][0] == pytest.approx(4)


def test_two_opposite_examples_conflict_with_each_other() -> None:
    got = example_columns(rows_of([np.array([[2.0, 0.0], [-1.0, 0.0]])]), NAMES)
    assert got["example_cosine"][0] == pytest.approx(-1, rel=1e-12)
    assert got["conflicting_share"][0] == 1
    # Mean .5, deviations ±1.5: all the variance, 4.5 of an example and 2.25 of the mean, lies along the mean.
    assert got["parallel_variance"][0] == pytest.approx(2.25, rel=1e-12)
    assert got["deviation_kurtosis"][0] == pytest.approx(1, rel=1e-12)


def test_two_of_equal_size_and_opposite_direction_have_no_mean_to_lie_along() -> None:
    got = example_columns(rows_of([np.array([[2.0, 0.0], [-2.0, 0.0]])]), NAMES)
    assert np.isnan(got["parallel_variance"][0])
    assert got["example_cosine"][0] == pytest.approx(-1)
    assert got["conflicting_share"][0] == 1


def test_the_kurtosis_of_normal_deviations_is_that_of_the_closed_form() -> None:
    # g ~ N(0, diag s): E R⁴/(E R²)² = 1 + 2 Σs²/(Σs)². n = 20,000: the ratio's variance is that of
    # y²/m² - 2 k y/m (y = R², m = E y, k = the ratio) over n; bound 4.5 sd: false alarm 7e-6 for each of three.
    rng = np.random.default_rng(3)
    for scales in (np.ones(2), np.ones(300), 1 / np.arange(1.0, 60.0)):
        want = 1 + 2 * (scales**2).sum() / scales.sum() ** 2
        grads = rng.standard_normal((20_000, len(scales))) * np.sqrt(scales)
        y = ((grads - grads.mean(0)) ** 2).sum(1) / scales.sum()
        sd = float(np.std(y * y - 2 * want * y)) / math.sqrt(20_000)
        assert abs(only(rows_of([grads]), "deviation_kurtosis") - want) < 4.5 * sd + 4 * want / 20_000
    # In 300 dimensions it is 1.007: all examples are about equally far from their mean.


def test_one_far_example_has_the_largest_kurtosis_there_is() -> None:
    # One deviates by n - 1, the others by -1: R⁴ sums to (n-1)⁴ + (n-1), R² to n(n-1).
    n = 50
    grads = np.zeros((n, 1))
    grads[0] = n
    want = n * ((n - 1) ** 4 + (n - 1)) / (n * (n - 1)) ** 2
    assert only(rows_of([grads + 1e-3]), "deviation_kurtosis") == pytest.approx(want, rel=1e-9)


# ---------------------------------------------------------------- leaving oneself out


def test_half_of_the_examples_conflict_under_pure_noise() -> None:
    # Turning one example round turns its product with the others' mean round: each conflicts with probability 1/2.
    # 2,000 batches of 8; the share's sd over batches is at most 1/2: bound 4.5/√2,000/2 = .050, false alarm 7e-6.
    # With itself in the mean the share would be that of z < -√(p)/√(7)…: far below (statistics.md: .039 for .224).
    rng = np.random.default_rng(4)
    layers = list(rng.standard_normal((2000, 8, 6)))
    rows = rows_of(layers)
    got = example_columns(rows, ["conflicting_share", "example_cosine"])
    assert abs(got["conflicting_share"].mean() - 0.5) < 0.050
    assert (rows.dots < 0).mean() < 0.3
    # E cos = 0 likewise, and |cos| <= 1 with variance 1/6: sd of the mean at most .41/√2,000 (all alike) = .0091.
    assert abs(got["example_cosine"].mean()) < 4.5 * 0.0091


def test_the_mean_product_with_the_others_is_the_unbiased_signal() -> None:
    rng = np.random.default_rng(5)
    grads = rng.standard_normal((7, 5)) + 0.4
    rows = rows_of([grads])
    others = (7 * rows.dots[0] - rows.sq_norms[0]) / 6
    assert others.mean() == pytest.approx(noise_sums(Moments.from_per_example(grads)).grad_sq_norm, rel=1e-12)


def test_the_cosine_of_a_signal_in_noise_is_what_geometry_says() -> None:
    # g = G + σz in p = 4,096 dimensions, |G| = 1, σ²p = 9, B = 16: cos → |G|²/(√(1 + 9)·√(1 + 9/15)). Its relative
    # error is of order 1/√p = 1.6 % for an example and a quarter of that for the mean of 16, doubled by √B-fold
    # shared parts; bound 5 %.
    rng = np.random.default_rng(6)
    signal = rng.standard_normal(4096)
    signal /= np.linalg.norm(signal)
    grads = signal + rng.standard_normal((16, 4096)) * 3 / 64
    assert only(rows_of([grads]), "example_cosine") == pytest.approx(1 / math.sqrt(10 * 1.6), rel=0.05)


# ---------------------------------------------------------------- along and across


@given(gradient_batches(min_examples=3))
def test_both_tests_are_the_papers_formulas(grads: np.ndarray) -> None:
    flat = grads.reshape(len(grads), -1)
    n, mean = len(flat), flat.mean(0)
    dots, size = flat @ mean, float(mean @ mean)
    inner = ((dots - size) ** 2).sum() / (n - 1) / (n * size**2)
    orthogonal = sum(((g - g @ mean / size * mean) ** 2).sum() for g in flat) / (n - 1) / (n * size)
    sums = noise_sums(Moments.from_per_example(grads))
    columns = {
        "parallel_variance": example_columns(rows_of([grads]), ["parallel_variance"])["parallel_variance"][None],
        "batch_variance": np.array([[sums.batch_variance]]),
        "mean_sq_norm": np.array([[sums.mean_sq_norm]]),
    }
    # Relative to the norm test: one of the two parts can be nothing (in one dimension nothing is orthogonal).
    scale = float(sums.batch_variance) / size
    rounding = 1e-11 * condition_of(grads)
    assert windowed("inner_product_test", columns)[0] == pytest.approx(inner, rel=rounding, abs=rounding * scale)
    assert windowed("orthogonality_test", columns)[0] == pytest.approx(orthogonal, rel=rounding, abs=rounding * scale)


@given(gradient_batches(min_examples=3), st.integers(0, 10**6))
def test_what_is_not_along_the_mean_lies_across_it_with_weights_too(grads: np.ndarray, seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(0.2, 5.0, len(grads))
    flat, w = grads.reshape(len(grads), -1), weights / weights.sum()
    mean = w @ flat
    across = flat - np.outer(flat @ mean, mean) / (mean @ mean)
    want = float((w**2 * (across**2).sum(1)).sum()) / (1 - float((w**2).sum()))
    whole = float(noise_sums(Moments.from_per_example(grads, weights)).batch_variance)
    along = only(rows_of([grads], weights), "parallel_variance")
    assert whole - along == pytest.approx(want, abs=1e-11 * float((w * (flat**2).sum(1)).sum()))
    assert want >= 0


def test_weights_that_are_nearly_equal_are_taken_for_equal_as_in_the_noise_sums() -> None:
    # In one dimension all variance is along the mean: P∥ is P, also where the mean is 1,000 times the deviations and
    # the weights differ by 5e-4, which in the weighted form would move both by 2·1,000·5e-4 of themselves.
    rng = np.random.default_rng(16)
    grads, weights = 1000 + rng.standard_normal((16, 1)), 1 + 5e-4 * rng.standard_normal(16)
    whole = float(noise_sums(Moments.from_per_example(grads, weights)).batch_variance)
    assert only(rows_of([grads], weights), "parallel_variance") == pytest.approx(whole, rel=1e-6)


def test_with_unequal_weights_the_parallel_variance_keeps_its_sign() -> None:
    # Σw²(x² - x̄²)/(1 - s₂) of x = 1, 2 with w = .9, .1, x̄ = 1.1: (.81 * -.21 + .01 * 2.79)/.18.
    rows = rows_of([np.array([[1.0], [2.0]])], np.array([9.0, 1.0]))
    assert only(rows, "parallel_variance") == pytest.approx((0.81 * -0.21 + 0.01 * 2.79) / 0.18, rel=1e-12)


@pytest.mark.parametrize("weights", [None, np.arange(1.0, 9.0)])
def test_the_parallel_variance_is_unbiased_where_the_direction_is_known(weights: np.ndarray | None) -> None:
    # |G| = 1,000 in one direction, σ = 1: ḡ's direction is G's to 1e-3, and the variance along it that of one element:
    # Σw² (1/8 with equal weights). 6,000 batches, z-bound 4.5 from the draws themselves: false alarm 7e-6.
    rng = np.random.default_rng(7)
    grads = rng.standard_normal((6000, 8, 3))
    grads[:, :, 0] += 1000
    found = example_columns(rows_of(list(grads), weights), ["parallel_variance"])["parallel_variance"]
    w = np.full(8, 1 / 8) if weights is None else weights / weights.sum()
    assert abs(found.mean() - (w**2).sum()) < 4.5 * found.std() / math.sqrt(6000) + 2e-6


# ---------------------------------------------------------------- laws


@given(gradient_batches(min_examples=2), st.randoms())
def test_the_order_of_the_examples_does_not_matter(grads: np.ndarray, random: object) -> None:
    order = list(range(len(grads)))
    random.shuffle(order)  # type: ignore[attr-defined]
    weights = np.arange(1.0, len(grads) + 1)
    left = example_columns(rows_of([grads], weights), NAMES)
    right = example_columns(rows_of([grads[order]], weights[order]), NAMES)
    assert right == {
        name: pytest.approx(value, rel=1e-10 * condition_of(grads), abs=1e-12, nan_ok=True)
        for name, value in left.items()
    }


@given(gradient_batches(min_examples=2), st.integers(-30, 30))
def test_a_power_of_two_in_the_loss_scales_norms_and_variance_exactly(grads: np.ndarray, exponent: int) -> None:
    c = 2.0**exponent
    plain, scaled = example_columns(rows_of([grads]), NAMES), example_columns(rows_of([grads * c]), NAMES)
    for row in STATISTICS:
        if row.kind == "example":
            assert scaled[row.name][0] == pytest.approx(plain[row.name][0] * c**row.power, rel=1e-13, nan_ok=True)


@given(gradient_batches(min_examples=2), st.floats(1e-3, 1e3))
def test_only_the_ratios_of_the_weights_matter(grads: np.ndarray, factor: float) -> None:
    weights = np.arange(1.0, len(grads) + 1)
    left = example_columns(rows_of([grads], weights), NAMES)
    right = example_columns(rows_of([grads], weights * factor), NAMES)
    assert right == {
        name: pytest.approx(value, rel=1e-10 * condition_of(grads), abs=1e-12, nan_ok=True)
        for name, value in left.items()
    }


# ---------------------------------------------------------------- edges


def test_one_example_has_a_norm_and_no_direction() -> None:
    for rows in (rows_of([np.array([[3.0, 4.0]])]), rows_of([np.array([[3.0, 4.0], [9.0, 9.0]])], np.array([2.0, 0]))):
        got = example_columns(rows, NAMES)
        assert [got[name][0] for name in NAMES[:5]] == [5.0, 5.0, 5.0, 5.0, 1.0]
        assert all(np.isnan(got[name][0]) for name in DIRECTIONS)


def test_no_example_has_nothing() -> None:
    got = example_columns(rows_of([np.ones((3, 2))], np.zeros(3)), NAMES)
    assert all(np.isnan(value[0]) for value in got.values())


def test_two_examples_have_everything() -> None:
    got = example_columns(rows_of([np.array([[3.0, 4.0], [0.0, 2.0]])]), NAMES)
    agree(got, loop_columns(np.array([[3.0, 4.0], [0.0, 2.0]])), 10)
    assert all(np.isfinite(value[0]) for value in got.values())


def test_gradients_of_zero_have_norms_and_conflict_with_nothing() -> None:
    got = example_columns(rows_of([np.zeros((5, 2))]), NAMES)
    assert [float(got[name][0]) for name in NAMES[:4]] == [0.0] * 4
    assert got["conflicting_share"][0] == 0
    missing = ["effective_examples", "parallel_variance", "example_cosine", "deviation_kurtosis"]
    assert all(np.isnan(got[name][0]) for name in missing)


def test_a_zero_gradient_among_others_has_no_cosine() -> None:
    grads = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    got = example_columns(rows_of([grads]), NAMES)
    assert got["example_cosine"][0] == pytest.approx(1.0)
    assert got["conflicting_share"][0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_example_that_is_not_finite_counts_as_infinitely_large(bad: float) -> None:
    # The mean was formed without it, as a collector may: its own numbers are left out, and no one else's are touched.
    rng = np.random.default_rng(8)
    grads = rng.standard_normal((8, 5)) + 0.3
    rows = rows_of([grads])
    with_bad = ExampleRows(
        sq_norms=np.append(rows.sq_norms, [[bad]], axis=1),
        mean_sq_norm=rows.mean_sq_norm,
        weights=np.ones(9),
        dots=np.append(rows.dots, [[bad]], axis=1),
    )
    plain, got = example_columns(rows, NAMES), example_columns(with_bad, NAMES)
    assert got["norm_median"][0] == sorted(np.sqrt(rows.sq_norms[0]))[4]
    assert got["norm_p95"][0] == got["norm_p99"][0] == got["norm_max"][0] == math.inf
    for name in NAMES[4:]:
        assert got[name][0] == pytest.approx(plain[name][0], rel=1e-12), name


def test_where_the_mean_is_not_finite_no_direction_is() -> None:
    grads = np.random.default_rng(9).standard_normal((6, 4))
    grads[2, 1] = np.nan
    rows = rows_of([grads])
    assert np.isnan(rows.mean_sq_norm).all()
    got = example_columns(rows, NAMES)
    assert all(np.isnan(got[name][0]) for name in DIRECTIONS)
    finite = np.delete(grads, 2, axis=0)
    assert got["effective_examples"][0] == pytest.approx(loop_columns(finite)["effective_examples"], rel=1e-12)
    assert np.isfinite(got["norm_median"][0])


def test_a_norm_that_overflowed_spoils_no_variance_along_the_mean() -> None:
    # ‖g₀‖² is beyond float32, its product with the mean is not: the mean still holds the example.
    grads = np.random.default_rng(10).standard_normal((64, 4)) * 1e17
    grads[0] += 2e19
    rows = rows_of([grads])
    narrow = ExampleRows(*(np.clip(part, None, np.inf).astype(np.float64) for part in rows))
    narrow.sq_norms[narrow.sq_norms > 3.4e38] = np.inf
    want = loop_columns(grads)
    assert np.isinf(narrow.sq_norms).sum() == 1
    assert only(narrow, "parallel_variance") == pytest.approx(want["parallel_variance"], rel=1e-12)


def test_a_quantile_that_falls_on_an_example_is_not_drawn_to_an_infinite_neighbour() -> None:
    # 21 examples: the 95th percentile is the 20th in size exactly, whatever the 21st is; .95 * 20 in float32 is not 19.
    sq_norms = np.append(np.arange(1.0, 21.0) ** 2, np.nan).astype(np.float32)[None]
    rows = ExampleRows(sq_norms, np.ones(1, np.float32), np.ones(21, np.float32))
    assert only(rows, "norm_p95") == 20.0
    assert only(ExampleRows(*map(torch.as_tensor, rows[:3])), "norm_p95") == 20.0


def test_one_example_of_nearly_all_weight_leaves_no_others_to_compare_with() -> None:
    rows = rows_of([np.random.default_rng(11).standard_normal((4, 3))], np.array([1.0, 1e-9, 1e-9, 1e-9]), np.float32)
    got = example_columns(rows, NAMES)
    assert np.isfinite(got["conflicting_share"][0])
    assert abs(got["example_cosine"][0]) <= 1  # of the three others with the first: it has no resolved one itself
    assert got["norm_median"][0] > 0


def test_without_products_directions_are_missing() -> None:
    got = example_columns(rows_of([np.eye(3)], dots=False), NAMES)
    assert all(np.isnan(got[name][0]) for name in DIRECTIONS)
    assert got["norm_max"][0] == 1


# ---------------------------------------------------------------- precision and frameworks


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1.0, 1e9, 1e18])
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_float32_follows_the_loop_at_extreme_scales(framework: str, scale: float) -> None:
    rng = np.random.default_rng(12)
    sizes = np.exp(rng.standard_normal((32, 1)) / 4)
    grads = (rng.standard_normal((32, 40)) * sizes + 0.1) * scale  # squares from 3e-38 (variance) to 2e38 (norms)
    want, rows = loop_columns(grads), rows_of([grads], dtype=np.float32)
    make = {"numpy": np.asarray, "torch": torch.as_tensor, "jax": jnp.asarray}[framework]
    run = jax.jit(lambda rows: example_columns(rows, NAMES)) if framework == "jax" else None
    made = ExampleRows(*map(make, rows))
    got = run(made) if run else example_columns(made, NAMES)
    assert scale != 1e18 or rows.sq_norms.max() > 1e38  # the reciprocal of this is no normal number
    for name, value in want.items():
        # Inputs are rounded at 6e-8; differences of them lose the ratio of their size to the result, below 40 here.
        assert float(got[name][0]) / value == pytest.approx(1, rel=4e-6), name


def test_numpy_torch_and_jitted_jax_agree() -> None:
    rng = np.random.default_rng(13)
    layers = [rng.standard_normal((24, 7)) * 10.0**k + 0.2 for k in range(-3, 4)]
    weights = rng.uniform(0.5, 2, 24)
    weights[[3, 17]] = 0
    rows = rows_of(layers, weights, np.float32)
    rows.sq_norms[2, 5] = np.nan
    plain = example_columns(rows, NAMES)
    tensors = example_columns(ExampleRows(*map(torch.as_tensor, rows)), NAMES)
    jitted = jax.jit(lambda rows: example_columns(rows, NAMES))(ExampleRows(*map(jnp.asarray, rows)))
    # Deviations from a mean κ times as large, in squares: a few roundings of 6e-8 grow by κ, and by 7κ in one of the
    # seven directions.
    conditions = [7 * condition_of(np.delete(g, [3, 17], axis=0)) for g in layers]
    for name, other in itertools.product(NAMES, (tensors, jitted)):
        assert np.asarray(other[name]).dtype == np.float32
        for row, condition in enumerate(conditions):
            bound = 8 * 6e-8 * condition
            assert np.asarray(other[name])[row] == pytest.approx(plain[name][row], rel=bound, nan_ok=True), name


def test_nothing_waits_for_the_device() -> None:
    # Tensors on the meta device have no values: looking at one raises, and so does a shape that depends on one.
    rows = ExampleRows(*(torch.as_tensor(part, device="meta") for part in rows_of([np.eye(5), np.eye(5)])))
    assert {tuple(column.shape) for column in example_columns(rows, NAMES).values()} == {(2,)}
    assert tuple(outliers(rows.sq_norms[0], 3, rows.weights).rows.shape) == (3,)


def test_half_precision_is_widened() -> None:
    rows = rows_of([np.random.default_rng(14).standard_normal((6, 4))], dtype=np.float32)
    half = ExampleRows(*(torch.as_tensor(part).bfloat16() for part in rows))
    got = example_columns(half, NAMES)
    assert all(value.dtype == torch.float32 for value in got.values())
    same = example_columns(ExampleRows(*(part.float() for part in half)), NAMES)
    assert all(torch.equal(got[name], same[name]) for name in NAMES)


def test_float64_sums_beside_float32_norms_are_taken_as_they_come() -> None:
    rows = rows_of([np.random.default_rng(15).standard_normal((6, 4))])
    mixed = ExampleRows(
        torch.as_tensor(rows.sq_norms).float(),
        torch.as_tensor(rows.mean_sq_norm),
        torch.as_tensor(rows.weights).float(),
        torch.as_tensor(rows.dots).float(),
    )
    want, got = example_columns(rows, NAMES), example_columns(mixed, NAMES)
    assert all(float(got[name][0]) == pytest.approx(want[name][0], rel=1e-5) for name in NAMES)


# ---------------------------------------------------------------- outliers


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.5, 4.0, 1e30, np.inf, np.nan]), min_size=1, max_size=12), st.integers(1, 9)
)
def test_outliers_are_the_largest_in_order(sq_norms: list[float], k: int) -> None:
    size = [n if math.isfinite(n) else math.inf for n in sq_norms]
    want = sorted(range(len(size)), key=lambda i: (-size[i], i))[:k]
    values = np.array(sq_norms, np.float32)
    jitted = jax.jit(outliers, static_argnums=1)
    for got in (outliers(values, k), outliers(torch.as_tensor(values), k), jitted(jnp.asarray(values), k)):
        assert np.asarray(got.rows).tolist() == want
        assert np.asarray(got.sq_norms) == pytest.approx(values[want], nan_ok=True)


def test_more_outliers_than_examples_are_all_of_them() -> None:
    assert outliers(np.array([1.0, 2.0]), 5).rows.tolist() == [1, 0]


def test_padding_is_no_outlier() -> None:
    sq_norms, weights = np.array([np.nan, 4.0, 0.0, 9.0]), np.array([0.0, 1.0, 2.0, 0.0])
    got = outliers(sq_norms, 4, weights)
    assert got.rows.tolist() == [1, 2, -1, -1]
    assert got.sq_norms == pytest.approx([4.0, 0.0, np.nan, np.nan], nan_ok=True)


def test_no_outliers_at_all_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="needs k >= 1, got k=0; ask for at least one example"):
        outliers(np.ones(3), 0)
