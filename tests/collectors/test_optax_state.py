import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradiometer.collectors.optax_state import optimizer_moments
from gradiometer.optimizers.optax_api import madam
from gradiometer.stats_core import Moments
from gradiometer.stats_core.maxva import within_variance

PARAMS = {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(2)}


@pytest.mark.parametrize(
    "optimizer",
    [
        madam(0.1),
        optax.chain(optax.clip_by_global_norm(1.0), madam(0.1), optax.ema(0.9)),
        optax.inject_hyperparams(madam)(learning_rate=0.1),
        optax.MultiSteps(madam(0.1), 2).gradient_transformation(),
        optax.apply_if_finite(madam(0.1), 3),
    ],
    ids=["alone", "chain", "inject_hyperparams", "MultiSteps", "apply_if_finite"],
)
def test_the_state_is_found_wherever_it_lies(optimizer: optax.GradientTransformation) -> None:
    found = optimizer_moments(optimizer.init(PARAMS))
    assert list(found) == ["a.w", "b"]
    assert found["a.w"].moments.u.shape == (2, 3)
    assert {name: round(float(beta), 6) for name, beta in found["b"].betas.items()} == {
        "beta_max": 0.999,
        "beta_min": 0.5,
        "beta_init": 0.999,
    }


def test_only_the_optimizer_s_own_parameters_are_found() -> None:
    labels = {"a": {"w": "ours"}, "b": "theirs"}
    optimizer = optax.multi_transform({"ours": madam(0.1), "theirs": optax.adam(0.1)}, labels)
    assert list(optimizer_moments(optimizer.init(PARAMS))) == ["a.w"]


def test_two_of_the_family_each_show_their_own() -> None:
    labels = {"a": {"w": "slow"}, "b": "fast"}
    optimizer = optax.multi_transform({"slow": madam(0.1, b2=0.99), "fast": madam(0.1, b2=0.9)}, labels)
    found = optimizer_moments(optimizer.init(PARAMS))
    assert {name: round(float(one.betas["beta_max"]), 6) for name, one in found.items()} == {"a.w": 0.99, "b": 0.9}


@pytest.mark.parametrize("state", [None, (), optax.adam(0.1).init(PARAMS), optax.sgd(0.1, 0.9).init(PARAMS)])
def test_no_other_optimizer_is_taken_for_one(state: object) -> None:
    assert optimizer_moments(state) == {}


@pytest.mark.parametrize(
    ("options", "within"),
    [({}, None), ({"variance": "per_example"}, "mean"), ({"variance": "per_example", "within": "full"}, "full")],
)
def test_the_examples_variance_is_taken_as_the_optimizer_takes_it(options: dict[str, str], within: str) -> None:
    moments = Moments.from_per_example(jnp.array([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]]))
    one = optimizer_moments(madam(0.1, **options).init(PARAMS))["b"]
    got = jax.jit(lambda m: one.within_variance(m, jnp.float32(0.25)))(moments)
    want = np.zeros(2) if within is None else 0.25 * np.asarray(within_variance(moments, within))
    np.testing.assert_allclose(got, want, rtol=1e-6)
