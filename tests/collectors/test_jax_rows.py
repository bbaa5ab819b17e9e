import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradiometer.collectors.jax_rows import absent_moments, rows_of
from tests.reference import loop_moments, relative_error

GRADS = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32) + 100


def linear(leaves: Any, row: Any) -> tuple[jax.Array, jax.Array]:
    """A loss whose gradient is the row itself."""
    return jnp.vdot(leaves[0], row), row[:2]


@pytest.mark.parametrize("weights", [None, np.array([1, 2, 0, 0, 3, 1, 4], np.float32)], ids=["plain", "weighted"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_chunks_of_any_size_give_what_one_pass_gives(chunk: int, weights: Any) -> None:
    """Two rows of weight 0 fall into one chunk, which then holds no example."""
    run = jax.jit(functools.partial(rows_of, linear, [jnp.ones(4)]), static_argnums=2)
    whole, parts = (run(GRADS, weights, size)._replace(grads=None) for size in (None, chunk))
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, parts)
    np.testing.assert_array_equal(whole.losses, parts.losses)
    np.testing.assert_array_equal(whole.aux, parts.aux)
    present = slice(None) if weights is None else weights != 0
    want = loop_moments(list(GRADS[present]), None if weights is None else list(weights[present]))
    for found in (whole.moments[0], parts.moments[0]):
        assert float(found.count) == want.count
        assert relative_error(found.mean, want.mean) <= 1e-6
        assert relative_error(found.m2, want.m2) <= 1e-6 * want.kappa
        assert relative_error(found.sq_norms[present], want.sq_norms) <= 1e-6
    np.testing.assert_array_equal(whole.moments[0].sq_norms, parts.moments[0].sq_norms)


def test_memory_does_not_grow_with_the_batch() -> None:
    def temp_bytes(batch: int, chunk: int | None) -> int:
        def run(w: Any, x: Any) -> Any:
            return rows_of(lambda leaves, row: (jnp.sum(jnp.tanh(leaves[0] @ row) ** 2), None), [w], x, None, chunk)

        lowered = jax.jit(run).lower(jnp.ones((64, 64)), jnp.ones((batch, 64)))
        return int(lowered.compile().memory_analysis().temp_size_in_bytes)

    one_leaf = 64 * 64 * 4
    assert temp_bytes(64, None) > 64 * one_leaf
    assert temp_bytes(64, 4) <= temp_bytes(16, 4) + one_leaf


def test_a_large_mean_leaves_the_variance_its_digits() -> None:
    grads = np.random.default_rng(1).standard_normal((64, 50)).astype(np.float32) + 3000
    found = jax.jit(functools.partial(rows_of, linear, [jnp.ones(50)]), static_argnums=2)(grads, None, 8)
    want = loop_moments(list(grads))
    assert relative_error(found.moments[0].m2, want.m2) <= 1e-4  # κ is 1e7


def test_absent_moments_merge_as_nothing() -> None:
    some = rows_of(linear, [jnp.ones(4)], GRADS, None, None).moments[0]
    merged = absent_moments(jnp.ones(4), 0).merge(some)
    for name in ("count", "weight_sum", "mean", "m2", "sq_norms"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(some, name))
    assert absent_moments(jnp.ones(4, jnp.bfloat16), 3).m2.dtype == jnp.float32
