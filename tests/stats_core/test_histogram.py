import bisect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gradiometer.stats_core.histogram import SCHEMA, WIDTH, Histogram, Sketch, sketch_fixed, sketch_rows

FRAMEWORKS: dict[str, Callable[[np.ndarray], object]] = {
    "numpy": np.asarray,
    "torch": torch.as_tensor,
    "jax": jnp.asarray,
}
jitted_rows, jitted_fixed = jax.jit(sketch_rows), jax.jit(sketch_fixed)
HALF_A_BUCKET = 2 ** (2**-4) - 1  # 4.4 %: how far a bucket's middle is from its ends at schema 3


def bucket_of(value: float, schema: int = 3) -> int:
    """From the definition, in exact fractions: the smallest i with value ≤ 2^(i/2^n), that is value^(2^n) ≤ 2^i."""
    power = Fraction(value) ** (2 ** max(schema, 0))
    i = math.floor(math.log2(value) * 2.0**schema) - 2
    while power > Fraction(2) ** (i * 2 ** max(-schema, 0)):
        i += 1
    return i


def counted(values: Sequence[float]) -> Histogram:
    """The histogram of a row, one value at a time, from the definition of the buckets and of the window."""
    finite = [float(v) for v in values if math.isfinite(v) and v >= 0]
    lowest = bucket_of(2.0**-126)
    top = max([bucket_of(v) for v in finite if v > 2.0**-126], default=lowest)
    first = max(8 * math.ceil(top / 8) - 255, lowest + 1)
    threshold = 2.0 ** ((first - 1) // 8)
    places = Counter(bucket_of(v) for v in finite if v > threshold)
    return Histogram(
        schema=3,
        zero_threshold=threshold,
        zero_count=sum(v <= threshold for v in finite),
        positive_index=sorted(places),
        positive_count=[places[i] for i in sorted(places)],
    )


def row_of(values: Sequence[float]) -> Histogram:
    return Histogram.from_sketch(sketch_rows(np.array([values], np.float32)))


def host(sketch: Sketch) -> Sketch:
    return Sketch(*(np.asarray(part) for part in sketch))


floats = st.floats(0, 2.0**126, width=32) | st.sampled_from([0.0, 1.0, 2.0, 0.5, math.inf, math.nan, -1.0])
numbers = st.floats(2.0**-60, 2.0**60, width=32)


@st.composite
def histograms(draw: st.DrawFn, *, schema: int | None = None) -> Histogram:
    """Any histogram whose zero threshold is 0 or where a bucket ends."""
    n = draw(st.integers(-4, 8)) if schema is None else schema
    sides = [draw(st.dictionaries(st.integers(-300, 300), st.integers(1, 9), max_size=5)) for _ in range(2)]
    level = draw(st.none() | st.integers(-320, 40))
    kept = [sorted((i, c) for i, c in side.items() if level is None or i > level) for side in sides]
    return Histogram(
        schema=n,
        zero_threshold=0.0 if level is None else 2.0 ** (level * 2.0**-n),
        zero_count=draw(st.integers(0, 3)),
        positive_index=[i for i, _ in kept[0]],
        positive_count=[c for _, c in kept[0]],
        negative_index=[i for i, _ in kept[1]],
        negative_count=[c for _, c in kept[1]],
    )


# ---------------------------------------------------------------- which bucket


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_both_neighbours_of_every_buckets_end_are_in_their_own_buckets(framework: str) -> None:
    # All ends between 2^-126 and 2^127, the float32 at or below each and the one above; the truth in exact fractions.
    ends = range(-1000, 1016)
    below = []
    for i in ends:
        near = np.float32(2.0 ** (i / 8))
        candidates = [np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(np.inf))]
        below.append(max(c for c in candidates if Fraction(float(c)) ** 8 <= Fraction(2) ** i))
    above = [np.nextafter(b, np.float32(np.inf)) for b in below]
    rows = np.array([below, above], np.float32).T  # one row an end: its window holds both
    sketch = host(sketch_rows(FRAMEWORKS[framework](rows)))
    for row, i in enumerate(ends):
        places = np.flatnonzero(sketch.counts[row]) + sketch.first[row]
        assert places.tolist() == [i, i + 1], i


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_powers_of_two_are_the_upper_end_of_their_bucket(framework: str) -> None:
    powers = np.arange(-125, 128)
    sketch = host(sketch_rows(FRAMEWORKS[framework](np.ldexp(np.float32(1), powers)[:, None])))
    assert (np.argmax(sketch.counts, axis=1) + sketch.first == 8 * powers).all()
    assert (sketch.counts.sum(axis=1) == 1).all()


def test_buckets_are_those_of_prometheus() -> None:
    # The ends of schema 3 within an octave as its Go client publishes them, and its rule: the first end that is not
    # below the fraction, eight buckets an exponent. The neighbours of all ends, and random numbers of any size.
    ends = [
        *(0.5, 0.5452538663326288, 0.5946035575013605, 0.6484197773255048),
        *(0.7071067811865475, 0.7711054127039704, 0.8408964152537144, 0.9170040432046711),
    ]
    near = np.array(ends, np.float32)
    rng = np.random.default_rng(1)
    values = [*near, *np.nextafter(near, np.float32(0)), *np.nextafter(near, np.float32(1))]
    values += [*np.exp(rng.uniform(-60, 60, 2000)).astype(np.float32)]
    for value in values:
        fraction, exponent = math.frexp(value)
        want = bisect.bisect_left(ends, fraction) + (exponent - 1) * 8
        assert row_of([value]).positive_index == (want,)


@given(st.floats(2.0**-1000, 2.0**1000))
def test_float64_is_read_as_it_is(value: float) -> None:
    assert Histogram.from_sketch(sketch_rows(np.array([[value]]))).positive_index == (bucket_of(value),)
    assert Histogram.from_sketch(sketch_rows(torch.tensor([[value]], dtype=torch.float64))) == Histogram.from_sketch(
        sketch_rows(np.array([[value]]))
    )


@given(st.lists(floats, min_size=5, max_size=5))
@example([0.0] * 5)
@example([math.nan] * 5)
@example([2.0**-126, 2.0**-130, 1e-45, 0.0, 2.0**-125])
@example([2.0**-126, 1e-45, 0.0, -0.0, math.inf])
def test_a_sketch_is_what_counting_one_by_one_gives(values: list[float]) -> None:
    assert row_of(values) == counted(np.array(values, np.float32).tolist())


@given(st.lists(floats, min_size=6, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6))
def test_numpy_torch_and_jitted_jax_agree_bit_for_bit(values: list[float], mask: list[bool]) -> None:
    rows, keep = np.array([values, values[::-1]], np.float32), np.array(mask)
    for plain, tensors, jitted in (
        (sketch_rows(rows, keep), sketch_rows(torch.as_tensor(rows), torch.as_tensor(keep)), jitted_rows(rows, keep)),
        (
            sketch_fixed(rows[0], keep),
            sketch_fixed(torch.as_tensor(rows[0]), torch.as_tensor(keep)),
            jitted_fixed(rows[0], keep),
        ),
    ):
        for a, b, c in zip(plain, host(tensors), host(jitted), strict=True):
            assert a.dtype == b.dtype == c.dtype == np.int32
            assert (a == b).all()
            assert (a == c).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_counted_as_float32(dtype: torch.dtype) -> None:
    values = torch.exp(torch.randn((3, 100), generator=torch.Generator().manual_seed(0))).to(dtype)
    for a, b in zip(sketch_rows(values), sketch_rows(values.float()), strict=True):
        assert torch.equal(a, b)


def test_nothing_waits_for_the_device() -> None:
    # Tensors on the meta device have no values: looking at one raises, and so does a shape that depends on one.
    values = torch.ones((4, 9), device="meta")
    assert tuple(sketch_rows(values, torch.ones(9, dtype=torch.bool, device="meta")).counts.shape) == (4, WIDTH)
    assert tuple(sketch_fixed(values).counts.shape) == (1, WIDTH)


# ---------------------------------------------------------------- the window


@given(st.lists(numbers, min_size=5, max_size=5), st.integers(-40, 40))
def test_a_power_of_two_only_shifts_the_window(values: list[float], exponent: int) -> None:
    plain = sketch_rows(np.array([values], np.float32))
    scaled = sketch_rows(np.ldexp(np.array([values], np.float32), exponent))
    assert scaled.first.tolist() == (plain.first + 8 * exponent).tolist()
    assert (scaled.counts == plain.counts).all()
    assert Histogram.from_sketch(scaled) == Histogram.from_sketch(plain).shifted(8 * exponent)


def test_values_of_31_octaves_are_kept_apart_from_zero() -> None:
    assert row_of([2.0**-31, 1.0]).zero_count == 0
    assert row_of([2.0**-32, 1.0]).zero_count == 1
    assert row_of([2.0**-32, 1.0]).zero_threshold == 2.0**-32


def test_a_row_without_a_value_above_zero_has_the_lowest_window() -> None:
    for values in ([0.0, 0.0], [math.nan, 0.0], [1e-40, 0.0]):
        histogram = row_of(values)
        assert histogram.zero_threshold == 2.0**-126
        assert histogram.count == histogram.zero_count == sum(map(math.isfinite, values))


def test_each_row_has_a_window_of_its_own_and_a_mask_of_its_own() -> None:
    rows = np.array([[1.0, 1e20], [1e-20, 3e-20]], np.float32)
    sketch = sketch_rows(rows, np.array([[True, False], [True, True]]))
    assert [Histogram.from_sketch(sketch, row) for row in (0, 1)] == [row_of([1.0]), row_of([1e-20, 3e-20])]


def test_the_fixed_window_goes_from_2_to_the_minus_16_to_2_to_the_16() -> None:
    inside = np.ldexp(1.0, np.arange(-15, 17))
    histogram = Histogram.from_sketch(sketch_fixed(np.array([*inside, 2.0**-16, 0.0, 2.0**17, np.inf, np.nan, -1.0])))
    assert histogram.zero_threshold == 2.0**-16
    assert histogram.zero_count == 2  # 2^-16 and 0
    assert histogram.positive_index == tuple(range(-120, 129, 8))
    assert histogram.positive_count == (*[1] * 31, 3)  # 2^16, 2^17 and infinity; NaN and negative are not counted


@given(st.lists(floats, min_size=4, max_size=4), st.lists(floats, min_size=4, max_size=4))
def test_the_parameters_of_a_layer_are_added(left: list[float], right: list[float]) -> None:
    parts = [sketch_fixed(np.array(part, np.float32)) for part in (left, right)]
    whole = sketch_fixed(np.array([left, right], np.float32))
    for a, b in zip(parts[0].added(parts[1]), whole, strict=True):
        assert (a == b).all()


def test_counts_are_exact_beyond_what_float32_holds() -> None:
    ones = torch.ones(1).expand(2**24 + 3)
    assert int(sketch_fixed(ones).counts.sum()) == 2**24 + 3


# ---------------------------------------------------------------- merging


@given(st.lists(floats, min_size=8, max_size=8), st.integers(1, 7))
def test_the_sketch_of_a_concatenation_is_the_merge_of_the_sketches(values: list[float], cut: int) -> None:
    assert row_of(values[:cut]).merge(row_of(values[cut:])) == row_of(values)


@given(st.permutations(range(6)), st.lists(floats, min_size=6, max_size=6))
def test_the_order_of_the_values_does_not_matter(order: list[int], values: list[float]) -> None:
    assert row_of([values[i] for i in order]) == row_of(values)


@given(histograms(), histograms(), histograms())
def test_merging_is_associative(a: Histogram, b: Histogram, c: Histogram) -> None:
    assert a.merge(b).merge(c) == a.merge(b.merge(c))


@given(histograms(), histograms())
def test_merging_is_commutative_and_loses_no_count(a: Histogram, b: Histogram) -> None:
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).count == a.count + b.count


@given(histograms())
def test_an_empty_histogram_of_the_highest_schema_is_the_identity(a: Histogram) -> None:
    assert a.merge(Histogram(schema=8)) == a


@given(st.lists(numbers, min_size=1, max_size=20), st.integers(-4, 2))
def test_a_lower_schema_is_what_counting_at_it_gives(values: list[float], schema: int) -> None:
    fine, want = (Counter(bucket_of(v, n) for v in values) for n in (3, schema))
    histogram = Histogram(3, 0.0, 0, sorted(fine), [fine[i] for i in sorted(fine)])
    coarse = histogram.merge(Histogram(schema=schema))
    assert coarse.schema == schema
    assert dict(zip(coarse.positive_index, coarse.positive_count, strict=True)) == want


def test_the_larger_threshold_wins_and_takes_the_buckets_below_it() -> None:
    low = Histogram(3, 2.0**-8, 1, (-60, -8, 0), (2, 3, 4), (-60, 8), (5, 6))
    high = Histogram(3, 0.5, 7)
    assert low.merge(high) == Histogram(3, 0.5, 1 + 7 + 2 + 3 + 5, (0,), (4,), (8,), (6,))


def test_a_threshold_within_a_bucket_is_raised_to_its_end() -> None:
    # As Prometheus does: .6 lies in (2^(-6/8), 2^(-5/8)] = (.595, .648], which is then counted as zero whole.
    merged = Histogram(3, 0.6, 1).merge(Histogram(3, 0.0, 0, (-6, -5, -4), (1, 2, 4)))
    assert merged == Histogram(3, 2.0 ** (-5 / 8), 1 + 1 + 2, (-4,), (4,))


# ---------------------------------------------------------------- reading


@given(st.lists(numbers, min_size=1, max_size=60), st.floats(0, 1))
def test_quantiles_are_right_to_half_a_bucket(values: list[float], q: float) -> None:
    values = sorted(np.array(values, np.float32).tolist())
    assume(values[0] > values[-1] * 2.0**-31)
    want = values[max(0, math.ceil(q * len(values) - 1e-9) - 1)]
    got = row_of(values).quantile(q)
    assert abs(got - want) <= HALF_A_BUCKET * want * (1 + 1e-12)


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_quantiles_stay_right_after_merging_steps(q: float) -> None:
    rng = np.random.default_rng(0)
    steps = np.exp(rng.standard_normal((16, 101))).astype(np.float32)
    sketch = sketch_rows(steps)
    merged = Histogram(schema=8)
    for row in range(16):
        merged = merged.merge(Histogram.from_sketch(sketch, row))
    ordered = np.sort(steps.ravel())
    want = ordered[max(0, math.ceil(q * len(ordered)) - 1)]
    assert merged.quantile(q) == pytest.approx(want, rel=HALF_A_BUCKET)


def test_seven_per_cent_of_a_hundred_are_seven() -> None:
    assert 0.07 * 100 > 7
    histogram = Histogram(positive_index=range(100), positive_count=[1] * 100)
    assert histogram.quantile(0.07) == 2.0 ** (5.5 / 8)


def test_quantiles_go_from_the_most_negative_through_zero() -> None:
    histogram = Histogram(0, 0.5, 2, (1, 3), (1, 1), (0, 2), (1, 1))
    values = [-(2.0**1.5), -(2.0**-0.5), 0.0, 0.0, 2.0**0.5, 2.0**2.5]
    assert [histogram.quantile(k / 6) for k in range(1, 7)] == values
    assert histogram.quantile(0) == values[0]
    ends = [(-4.0, -2.0, 1), (-1.0, -0.5, 1), (-0.5, 0.5, 2), (1.0, 2.0, 1), (4.0, 8.0, 1)]
    assert list(histogram.buckets()) == ends


def test_nothing_has_no_quantile() -> None:
    assert math.isnan(Histogram().quantile(0.5))
    assert list(Histogram().buckets()) == []
    with pytest.raises(ValueError, match="needs 0 <= q <= 1, got q=50; give a share, not per cent"):
        Histogram().quantile(50)


@given(histograms().filter(lambda a: a.schema >= 0), st.integers(-100, 100), st.integers(-100, 100))
def test_shifts_add_up_and_turn_back(a: Histogram, first: int, second: int) -> None:
    assert a.shifted(first).shifted(second) == a.shifted(first + second)
    assert a.shifted(first).shifted(-first) == a


@given(histograms(schema=3), histograms(schema=3), st.integers(-100, 100))
def test_shifting_both_shifts_their_merge(a: Histogram, b: Histogram, buckets: int) -> None:
    assert a.shifted(buckets).merge(b.shifted(buckets)) == a.merge(b).shifted(buckets)


def test_a_threshold_beyond_the_floats_is_refused() -> None:
    with pytest.raises(
        ValueError, match="got zero_threshold=inf, zero_count=0; merge histograms, don't subtract, and shift"
    ):
        Histogram(-4, 1.0).shifted(64)


def test_a_threshold_that_is_no_buckets_end_shifts_by_the_ratio() -> None:
    assert Histogram(3, 0.6, 1).shifted(8).zero_threshold == pytest.approx(1.2, rel=1e-15)


def test_ends_beyond_the_floats_are_infinite() -> None:
    assert list(Histogram(0, 0.0, 0, (1025,), (1,)).buckets()) == [(math.inf, math.inf, 1)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 9}, "a schema between -4 and 8, got schema=9; see"),
        ({"zero_threshold": -1.0}, "got zero_threshold=-1.0, zero_count=0; merge"),
        ({"zero_threshold": math.nan}, "got zero_threshold=nan, zero_count=0; merge"),
        ({"zero_count": -1}, "got zero_threshold=0.0, zero_count=-1; merge"),
        ({"positive_index": [1, 2], "positive_count": [1]}, "got 2 indices and 1 counts; leave empty buckets out"),
        ({"negative_index": [2, 1], "negative_count": [1, 1]}, "ascending negative_index and as many negative_count"),
        ({"positive_index": [1, 1], "positive_count": [1, 1]}, "ascending positive_index"),
        ({"positive_index": [1, 2], "positive_count": [1, 0]}, "at least 1, got 2 indices"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Histogram(**fields)  # type: ignore[arg-type]


def test_sequences_of_any_kind_become_tuples() -> None:
    a = Histogram(positive_index=[1, 2], positive_count=iter([3, 4]))  # type: ignore[arg-type]
    assert a == Histogram(positive_index=(1, 2), positive_count=(3, 4))
    assert hash(a) == hash(Histogram(positive_index=(1, 2), positive_count=(3, 4)))


def test_eight_buckets_an_octave() -> None:
    assert (SCHEMA, WIDTH) == (3, 256)
    widths = [high / low for low, high, _ in Histogram(positive_index=range(8), positive_count=[1] * 8).buckets()]
    assert widths == [pytest.approx(2**0.125)] * 8
    assert math.prod(widths) == pytest.approx(2.0)
