from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import gradiometer as gm
from gradiometer.collectors.jax_flax import TrainState
from gradiometer.optimizers.optax_api import madam
from tests.jax_models import MODELS

MODEL = MODELS["cnn with GroupNorm"]


def test_moments_reach_the_optimizer() -> None:
    optimizer = madam(1e-2, variance="per_example")
    state = TrainState.create(apply_fn=None, params=MODEL.params, tx=optimizer)

    @jax.jit
    def step(state: Any) -> Any:
        _, grads, moments = gm.value_and_grad(MODEL.loss_fn)(state.params, MODEL.batch)
        return state.apply_gradients(grads=grads, moments=moments)

    after = step(state)
    assert after.tx is optimizer
    assert int(after.step) == 1
    _, grads, moments = jax.jit(gm.value_and_grad(MODEL.loss_fn))(MODEL.params, MODEL.batch)
    updates, _ = jax.jit(optimizer.update)(grads, state.opt_state, MODEL.params, moments=moments)
    want = optax.apply_updates(MODEL.params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.params, want)


def test_without_moments_it_is_flax_s_own() -> None:
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.5))
    after = state.apply_gradients(grads={"w": jnp.ones(2)})
    np.testing.assert_array_equal(after.params["w"], [0.5, 0.5])


def test_the_state_is_saved_and_restored() -> None:
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=madam(0.1))
    state = state.apply_gradients(grads={"w": jnp.array([1.0, 2.0])})
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, state, restored)


def test_an_optimizer_that_takes_no_extra_arguments_is_refused() -> None:
    plain = optax.GradientTransformation(lambda params: optax.EmptyState(), lambda g, s, p=None: (g, s))
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=plain)
    with pytest.raises(TypeError, match="needs an optimizer that takes moments, got tx=GradientTransformation"):
        state.apply_gradients(grads={"w": jnp.ones(2)}, moments={"w": None})
