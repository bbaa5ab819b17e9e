import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

from gradiometer.optimizers.optax_api import madam
from gradiometer.optimizers.optax_bridge import as_aggregator
from gradiometer.stats_core import Moments
from gradiometer.stats_core.errors import MissingDependency

PARAMS = {"w": jnp.zeros(3), "b": jnp.zeros(())}


def per_example(seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed))
    return {"w": jax.random.normal(keys[0], (8, 3)), "b": jax.random.normal(keys[1], (8,))}


def test_it_is_an_aggregator_that_gives_madam_the_moments_of_what_came_in() -> None:
    optimizer = madam(0.1, variance="per_example")
    aggregator = as_aggregator(optimizer)
    assert isinstance(aggregator, aggregating.Aggregator)
    state, other = aggregator.init(PARAMS), optimizer.init(PARAMS)
    for seed in range(3):
        grads = per_example(seed)
        got, state = jax.jit(aggregator.update)(grads, state, PARAMS)
        moments = jax.tree.map(Moments.from_per_example, grads)
        mean = jax.tree.map(lambda g: g.mean(0), grads)
        want, other = jax.jit(optimizer.update)(mean, other, PARAMS, moments=moments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, want)


def test_it_stands_in_a_pipeline_behind_per_example_clipping() -> None:
    clip = optax.stateless(lambda grads, _: jax.vmap(optax.projections.projection_l2_ball)(grads))
    pipeline = aggregating.process(clip, as_aggregator(madam(0.1, variance="per_example")), optax.scale(0.5))
    state = pipeline.init(PARAMS)
    updates, _ = jax.jit(pipeline.update)(per_example(0), state, PARAMS)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)
    assert all(float(jnp.abs(leaf).max()) <= 0.05 * 1.001 for leaf in jax.tree.leaves(updates))


def test_half_precision_comes_out_as_it_went_in() -> None:
    aggregator = as_aggregator(madam(0.1, variance="per_example"))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), per_example(0))
    updates, state = aggregator.update(grads, aggregator.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert state[0].s["w"].dtype == jnp.float32


def test_an_optax_without_aggregators_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optax.experimental", None)
    with pytest.raises(
        MissingDependency, match=r"needs optax with optax.experimental.aggregating, got optax=.*pip inst"
    ):
        as_aggregator(madam(0.1))
