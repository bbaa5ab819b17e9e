import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gradiometer.stats_core.arrays import concrete_count, positive_or_one, square_sum, total, widened


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
def test_sums_are_kept_in_float64_where_there_is_one(make: object) -> None:
    values = make(np.full(341, 1e18, np.float32))  # type: ignore[operator]
    assert float(square_sum(values)) == pytest.approx(341e36, rel=1e-6)


def test_jax_sums_stay_in_the_arrays_type_without_a_warning() -> None:
    assert total(jnp.ones(3)).dtype == jnp.float32


def test_half_precision_is_widened_and_the_rest_left() -> None:
    assert widened(torch.ones(2, dtype=torch.float16)).dtype == torch.float32
    assert widened(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
    wide = np.ones(2)
    assert widened(wide) is wide


def test_a_traced_count_has_no_value() -> None:
    seen = []
    jax.make_jaxpr(lambda count: seen.append(concrete_count(count)) or count)(3)
    assert seen == [None]
    assert concrete_count(4) == concrete_count(np.int64(4)) == concrete_count(jnp.asarray(4)) == 4.0


def test_divisors_are_replaced_where_they_are_not_positive() -> None:
    assert positive_or_one(0.0) == 1.0
    assert positive_or_one(np.array([0.0, -2.0, 3.0])).tolist() == [1.0, 1.0, 3.0]
