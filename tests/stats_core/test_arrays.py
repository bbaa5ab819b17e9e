import math

import array_api_compat
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core import arrays
from gradiometer.stats_core.arrays import (
    concrete_count,
    namespace,
    positive_or_one,
    power_of_two,
    row_dots,
    row_square_sums,
    signs,
    square_sum,
    total,
    unit_exponent,
    widened,
)
from tests.tolerances import square_sum_error, sum_error, unit_roundoff

FRAMEWORKS = {"numpy": np.asarray, "torch": torch.as_tensor, "jax": jnp.asarray}
WIDE = {"numpy": np.asarray, "torch": torch.as_tensor}  # those with float64
SIZES = [0, 1, 2, 63, 64, 65, 5000, 32_768, 32_769, 33_000, 40_000]  # both sides of where chunks begin


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("size", SIZES)
def test_sums_agree_with_the_exact_ones(framework: str, size: int) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    exact = [float(v) for v in x]
    found = FRAMEWORKS[framework](x)
    wide = framework in WIDE
    bound = sum_error(np.float32, size, float64=wide) * math.fsum(map(abs, exact))
    assert abs(float(total(found)) - math.fsum(exact)) <= bound
    squares = math.fsum(v * v for v in exact)
    assert abs(float(square_sum(found)) - squares) <= square_sum_error(np.float32, size, float64=wide) * squares


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("shape", [(3, 0), (1, 5), (4, 64), (7, 5001), (40, 1000), (2, 32_768)])
def test_rows_are_added_up_each_for_itself(framework: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[1])
    rows, vector = (rng.standard_normal(s).astype(np.float32) for s in (shape, shape[1:]))
    make, wide = FRAMEWORKS[framework], framework in WIDE
    squares, dots = np.asarray(row_square_sums(make(rows))), np.asarray(row_dots(make(rows), make(vector)))
    assert squares.shape == dots.shape == shape[:1]
    for row, square, dot in zip(rows.astype(np.float64), squares, dots, strict=True):
        want = math.fsum(row * row)
        assert abs(square - want) <= square_sum_error(np.float32, shape[1], float64=wide) * want
        products = row * vector.astype(np.float64)
        bound = sum_error(np.float32, shape[1], float64=wide) + unit_roundoff(np.float32)
        assert abs(dot - math.fsum(products)) <= bound * math.fsum(np.abs(products))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_view_of_rows_and_a_transposed_array_are_taken_as_they_are(framework: str) -> None:
    values = FRAMEWORKS[framework](np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32))
    turned = values.T
    assert float(square_sum(turned)) == pytest.approx(float(square_sum(values)), rel=1e-5)
    assert np.asarray(row_square_sums(turned[:, 7:])) == pytest.approx(
        (np.asarray(turned, np.float64)[:, 7:] ** 2).sum(1), rel=1e-5
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("size", [3, 1000, 40_000])
def test_ones_are_counted(framework: str, size: int) -> None:
    ones = FRAMEWORKS[framework](np.ones((size, 2), np.float32))
    assert float(total(ones)) == 2 * size
    assert float(square_sum(3 * ones)) == pytest.approx(18 * size, rel=1e-6)
    assert np.asarray(row_square_sums(ones.T)) == pytest.approx([size, size], rel=1e-6)
    assert np.asarray(row_dots(ones.T, 2 * ones[:, 0])).tolist() == [2 * size, 2 * size]


@given(st.integers(0, 2**32 - 1), st.integers(2, 40_000), st.data())
def test_sums_do_not_mind_the_order_and_add_up_over_parts(seed: int, size: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size).astype(np.float32)
    cut = data.draw(st.integers(0, size))
    bound = 2 * square_sum_error(np.float32, size)
    whole = square_sum(x)
    assert square_sum(rng.permutation(x)) == pytest.approx(whole, rel=bound)
    assert square_sum(x[:cut]) + square_sum(x[cut:]) == pytest.approx(whole, rel=bound)
    assert abs(total(x[:cut]) + total(x[cut:]) - total(x)) <= 2 * sum_error(np.float32, size) * total(np.abs(x))


@pytest.mark.parametrize("framework", WIDE)
@pytest.mark.parametrize("size", [341, 5000, 40_000])
@pytest.mark.parametrize("scale", [1e-18, 1e18, 2.3e18])
def test_squares_have_room_in_float64_from_1e_18_to_23e17(framework: str, size: int, scale: float) -> None:
    x = np.full(size, scale, np.float32)
    want = size * float(x[0]) ** 2
    bound = square_sum_error(np.float32, size)
    assert float(square_sum(WIDE[framework](x))) == pytest.approx(want, rel=bound)
    assert np.asarray(row_square_sums(WIDE[framework](x[None]))) == pytest.approx([want], rel=bound)
    assert np.asarray(row_dots(WIDE[framework](x[None]), WIDE[framework](-x))) == pytest.approx([-want], rel=bound)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("size", [10, 40_000])
def test_what_has_no_square_in_float32_counts_as_0(framework: str, size: int) -> None:
    assert float(square_sum(FRAMEWORKS[framework](np.full(size, 1e-23, np.float32)))) == 0.0
    assert float(square_sum(FRAMEWORKS[framework](np.full(size, 1e-18, np.float32)))) > 0.0


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("size", [10, 40_001])
def test_a_nan_and_an_infinity_show_in_the_sum(framework: str, size: int) -> None:
    x = np.ones(size, np.float32)
    for poison in (np.nan, np.inf):
        x[size // 2] = poison
        assert np.array_equal(float(total(FRAMEWORKS[framework](x))), poison, equal_nan=True)
        assert np.array_equal(float(square_sum(FRAMEWORKS[framework](x))), poison, equal_nan=True)


def test_types_of_sums_are_float64_where_there_is_one() -> None:
    for size in (3, 40_000):
        assert total(torch.ones(size)).dtype == square_sum(torch.ones(size)).dtype == torch.float64
        assert total(np.ones(size, np.float32)).dtype == np.float64
        assert row_square_sums(torch.ones(2, size)).dtype == torch.float64
        assert total(jnp.ones(size)).dtype == square_sum(jnp.ones(size)).dtype == jnp.float32


@pytest.mark.parametrize("size", [512, 40_000])
def test_half_precision_is_added_up_in_float32_or_wider(size: int) -> None:
    x = torch.full((size,), 1.0078125, dtype=torch.bfloat16)  # the next after 1: a bfloat16 sum would stick at 256
    assert float(total(x)) == pytest.approx(1.0078125 * size, rel=1e-5)
    assert float(square_sum(jnp.asarray(x.float().numpy(), jnp.bfloat16))) == pytest.approx(1.0156860 * size, rel=1e-5)
    assert float(row_square_sums(x[None])[0]) == pytest.approx(1.0156860 * size, rel=1e-5)


@pytest.mark.parametrize("size", [100, 40_001])
def test_sums_never_look_at_a_value_on_the_host(size: int) -> None:
    x = torch.empty(2, size, device="meta")  # has no values: looking at one raises
    for found in (total(x), square_sum(x), row_square_sums(x)[0], row_dots(x, x[0])[0], signs(x)[0, 0]):
        assert found.device.type == "meta"


def test_numbers_have_no_namespace_but_numpys_own_scalars_do() -> None:
    assert namespace(np.float64(1.0), 2.0) is namespace(np.ones(1))
    assert namespace(torch.ones(1), np.float64(1.0), 2) is namespace(torch.ones(1))
    with pytest.raises(TypeError):
        namespace(1.0, 2)


def test_half_precision_is_widened_and_the_rest_left() -> None:
    assert widened(torch.ones(2, dtype=torch.float16)).dtype == torch.float32
    assert widened(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
    wide = np.ones(2)
    assert widened(wide) is wide


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_signs_are_those_of_the_elements(framework: str) -> None:
    found = signs(FRAMEWORKS[framework](np.array([-2.0, 0.0, 1e-30, np.inf], np.float32)))
    assert np.asarray(found).tolist() == [-1.0, 0.0, 1.0, 1.0]


@given(st.floats(2.0**-126, 2.0**126, width=32))
def test_in_its_unit_the_largest_magnitude_has_a_square_with_room_for_sums(peak: float) -> None:
    exponent = int(unit_exponent(np.array([0.0, -peak, peak / 3], np.float32)))
    assert 2.0**-40 <= peak / 2.0**exponent <= 2.0**40
    assert (exponent == 0) == (2.0**-41 <= peak < 2.0**40)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("peak", "want"), [(0.0, 0), (1e-12, 0), (1e12, 0), (1e18, 20), (1e-18, -59), (1.2e-38, -125)])
def test_the_unit_is_the_same_on_every_framework(framework: str, peak: float, want: int) -> None:
    values = FRAMEWORKS[framework](np.array([peak, 0.0], np.float32))
    assert int(unit_exponent(values)) == want
    if framework == "jax":
        assert int(jax.jit(unit_exponent)(values)) == want


def test_the_unit_of_subnormal_numbers_is_the_smallest_normal_one() -> None:
    assert int(unit_exponent(np.array([1e-40], np.float32))) == -126  # jax takes them for 0


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_unit_is_that_of_the_largest_of_several_arrays_and_of_the_roots_of_squares(framework: str) -> None:
    make = FRAMEWORKS[framework]
    small, large = (make(np.full(3, x, np.float32)) for x in (1e-18, 1e18))
    assert int(unit_exponent(small, large)) == int(unit_exponent(large)) == 20
    assert int(unit_exponent(small, squares=[make(np.full(3, 1e36, np.float32))])) == 20
    assert int(unit_exponent(make(np.zeros(0, np.float32)), small)) == -59
    assert int(unit_exponent(make(np.zeros(0, np.float32)))) == 0


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_the_unit_passes_over_what_is_not_finite(framework: str, poison: float) -> None:
    assert int(unit_exponent(FRAMEWORKS[framework](np.array([poison, 1e18], np.float32)))) == 20
    assert int(unit_exponent(FRAMEWORKS[framework](np.array([poison, 1.0], np.float32)))) == 0


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_powers_of_two_are_exact(framework: str) -> None:
    make = FRAMEWORKS[framework]
    dtype = array_api_compat.array_namespace(make(np.zeros(1, np.float32))).float32
    exponents = np.arange(-126, 128, dtype=np.int32)
    found = power_of_two(make(exponents), dtype)
    assert np.asarray(found, np.float64).tolist() == [2.0 ** int(e) for e in exponents]
    assert float(power_of_two(make(exponents)[3], dtype)) == 2.0**-123
    assert power_of_two(-3, dtype) == 0.125


def test_a_traced_count_has_no_value() -> None:
    seen = []
    jax.make_jaxpr(lambda count: seen.append(concrete_count(count)) or count)(3)
    assert seen == [None]
    assert concrete_count(4) == concrete_count(np.int64(4)) == concrete_count(jnp.asarray(4)) == 4.0


def test_divisors_are_replaced_where_they_are_not_positive() -> None:
    assert positive_or_one(0.0) == 1.0
    assert positive_or_one(np.array([0.0, -2.0, 3.0])).tolist() == [1.0, 1.0, 3.0]


def test_every_public_name_is_listed() -> None:
    public = {name for name, value in vars(arrays).items() if getattr(value, "__module__", None) == arrays.__name__}
    assert {name for name in public if not name.startswith("_")} | {"Array"} == set(arrays.__all__)
