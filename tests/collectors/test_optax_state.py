from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradiometer.collectors.optax_state import AdamRule, adam_steps, optimizer_moments, radam_scalars
from gradiometer.optimizers.optax_api import madam
from gradiometer.stats_core import Moments
from gradiometer.stats_core.adam import AdamStep
from gradiometer.stats_core.maxva import within_variance
from gradiometer.stats_core.radam import rectify

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


Grads = dict[str, object]
RATES: dict[str, float] = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}

FAMILY: dict[str, tuple[optax.GradientTransformation, AdamRule]] = {
    "adam": (optax.adam(0.01), AdamRule(0.01)),
    "adam, eps_root": (optax.adam(0.01, **RATES, eps_root=0.1), AdamRule(0.01, **RATES, eps_root=0.1)),
    "adamw without decay": (optax.adamw(0.01, **RATES, weight_decay=0.0), AdamRule(0.01, **RATES)),
    "nadam": (optax.nadam(0.01, **RATES), AdamRule(0.01, **RATES, nesterov=True)),
    "radam": (optax.radam(0.01, **RATES), AdamRule(0.01, **RATES, threshold=5.0)),
    "radam, Nesterov": (
        optax.radam(0.01, **RATES, nesterov=True),
        AdamRule(0.01, **RATES, threshold=5.0, nesterov=True),
    ),
    "radam, another threshold": (optax.radam(0.01, b2=0.99, threshold=7.0), AdamRule(0.01, b2=0.99, threshold=7.0)),
    "amsgrad": (optax.amsgrad(0.01, b1=0.8, b2=0.5), AdamRule(0.01, b1=0.8, b2=0.5)),
    "scale_by_adam": (optax.chain(optax.scale_by_adam(), optax.scale(-1.0)), AdamRule(1.0)),
    "madam": (madam(0.01, b1=0.8, eps=0.1), AdamRule(0.01, b1=0.8, eps=0.1)),
    "madam, the paper's eps": (
        madam(0.01, b2=0.9, eps=0.1, eps_mode="paper"),
        AdamRule(0.01, eps=0.1, eps_mode="paper"),
    ),
    "madam amsgrad": (madam(0.01, b2=0.6, amsgrad=True), AdamRule(0.01)),
    "schedule": (
        optax.adam(optax.linear_schedule(0.1, 0.0, 9), **RATES),
        AdamRule(optax.linear_schedule(0.1, 0.0, 9), **RATES),
    ),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.adam)(learning_rate=0.01, b1=0.5, b2=0.6, eps=0.3, eps_root=0.1),
        AdamRule(7.0),
    ),
    "inject_hyperparams, radam": (optax.inject_hyperparams(optax.radam)(0.01, **RATES, threshold=6.0), AdamRule()),
    "inject_hyperparams, schedule": (
        optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 9), **RATES),
        AdamRule(optax.linear_schedule(0.1, 0.0, 9)),
    ),
    "inject_hyperparams, madam": (optax.inject_hyperparams(madam)(0.01, b1=0.5, eps=0.3), AdamRule()),
    "apply_if_finite": (optax.apply_if_finite(optax.adam(0.01), 3), AdamRule(0.01)),
}


def first_steps(optimizer: optax.GradientTransformation, rule: AdamRule, grads: object = PARAMS) -> dict[str, AdamStep]:
    """What the reader says before the first update."""
    return jax.jit(lambda grads: adam_steps(optimizer.init(grads), grads, rule))(grads)


def watched(
    optimizer: optax.GradientTransformation, rule: AdamRule, steps: int = 12
) -> Iterator[tuple[dict[str, AdamStep], Grads, object]]:
    """What the reader says just before each update, jitted with it; the update, and the state after it."""
    params = {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(2)}
    state = optimizer.init(params)

    @jax.jit
    def both(grads: Grads, state: object) -> tuple[dict[str, AdamStep], Grads, object]:
        return adam_steps(state, grads, rule), *optimizer.update(grads, state, params)

    rng = np.random.default_rng(0)
    for _ in range(steps):
        grads = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), params)
        said, updates, state = both(grads, state)
        yield said, {"a.w": updates["a"]["w"], "b": updates["b"]}, state


@pytest.mark.parametrize("name", FAMILY)
def test_the_step_that_is_read_is_the_update_that_is_made(name: str) -> None:
    before: dict[str, AdamStep] = {}
    with jax.enable_x64(True):
        for said, updates, _ in watched(*FAMILY[name]):
            assert list(said) == ["a.w", "b"]
            for parameter, step in said.items():
                # optax's 1 - b^t loses three digits, its length of RAdam's average two more at b = .99.
                np.testing.assert_allclose(step.step, -np.asarray(updates[parameter]), rtol=1e-11)
                if before:
                    np.testing.assert_allclose(step.divisor, before[parameter].divisor_after, rtol=1e-12)
                else:
                    assert np.isnan(step.divisor).all()
                    assert np.isnan(step.momentum).all()
            before = said


@pytest.mark.parametrize("name", ["adam", "radam", "madam"])
def test_in_float32_the_step_is_the_update_to_its_digits(name: str) -> None:
    # optax's 1 - b2^t is 1e-3 at adam's first step, off by 2^-24: 3e-5 of its root. Its RAdam at b = .9 subtracts
    # numbers of 19 that are off by 2^-24/(1 - b^t), to leave 5: less.
    for said, updates, _ in watched(*FAMILY[name]):
        for parameter, step in said.items():
            assert step.step.dtype == jnp.float32
            np.testing.assert_allclose(step.step, -np.asarray(updates[parameter]), rtol=1e-4, atol=1e-8)


def test_the_divisor_after_is_that_of_the_state_which_the_update_leaves() -> None:
    for said, _, state in watched(optax.adam(0.01, **RATES), AdamRule(0.01, **RATES)):
        inner = state[0]
        v_hat = np.asarray(inner.nu["b"], np.float64) / (1 - 0.9 ** int(inner.count))
        np.testing.assert_allclose(said["b"].divisor_after, np.sqrt(v_hat) + 1e-3, rtol=1e-6)


def test_decoupled_decay_is_no_part_of_the_step() -> None:
    for said, updates, _ in watched(optax.adamw(0.01, **RATES, weight_decay=0.5), AdamRule(0.01, **RATES), 3):
        decay = 0.01 * 0.5 * 1.0  # of parameters that stay at 1
        np.testing.assert_allclose(said["b"].step, -np.asarray(updates["b"]) - decay, rtol=1e-4)


@pytest.mark.parametrize("within", ["mean", "full"])
def test_madam_s_step_with_the_examples_variance_is_the_update_that_is_made(within: str) -> None:
    rng = np.random.default_rng(1)
    optimizer = madam(0.01, variance="per_example", within=within)
    params = {"w": jnp.zeros(4)}
    state = optimizer.init(params)

    @jax.jit
    def both(per_example: jax.Array, state: object) -> tuple[dict[str, AdamStep], Grads, object]:
        moments = Moments.from_per_example(per_example)
        grads = {"w": 0.5 * moments.mean}
        tau2 = optimizer_moments(state)["w"].within_variance(moments, jnp.float32(0.25))
        said = adam_steps(state, grads, AdamRule(0.01), within={"w": tau2})
        return said, *optimizer.update(grads, state, params, moments={"w": moments})

    for _ in range(5):
        said, updates, state = both(jnp.asarray(rng.standard_normal((6, 4)), jnp.float32), state)
        np.testing.assert_allclose(said["w"].step, -np.asarray(updates["w"]), rtol=1e-5)


def test_a_parameter_that_is_kept_from_the_optimizer_is_absent() -> None:
    labels = {"a": {"w": "adam"}, "b": "sgd"}
    optimizer = optax.multi_transform({"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}, labels)
    assert list(first_steps(optimizer, AdamRule(0.1))) == ["a.w"]
    masked = optax.masked(optax.adam(0.1), {"a": {"w": False}, "b": True})
    assert list(first_steps(masked, AdamRule(0.1))) == ["b"]


def test_injected_rates_are_each_group_s_own() -> None:
    labels = {"a": {"w": "slow"}, "b": "fast"}
    make = optax.inject_hyperparams(optax.adam)
    optimizer = optax.multi_transform({"slow": make(1e-3), "fast": make(1e-1)}, labels)
    said = first_steps(optimizer, AdamRule())
    assert float(abs(said["a.w"].step).max()) == pytest.approx(1e-3, rel=1e-4)
    assert float(abs(said["b"].step).max()) == pytest.approx(1e-1, rel=1e-4)


def test_a_rate_that_is_not_known_leaves_the_step_unknown_and_the_divisor_known() -> None:
    said = first_steps(optax.adam(0.1), AdamRule())
    assert np.isnan(said["b"].step).all()
    np.testing.assert_allclose(said["b"].divisor_after, 1.0, rtol=1e-4)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, 0.9),
        optax.rmsprop(0.1),
        optax.chain(optax.scale_by_stddev(), optax.scale(-1.0)),
        optax.adabelief(0.1),
        optax.novograd(0.1),
        optax.lion(0.1),
        optax.set_to_zero(),
    ],
)
def test_of_an_optimizer_outside_the_family_nothing_is_read(optimizer: optax.GradientTransformation) -> None:
    state = optimizer.init(PARAMS)
    assert adam_steps(state, PARAMS, AdamRule(0.1)) == {}
    assert radam_scalars(state, AdamRule(threshold=5.0)) == {}
    assert adam_steps(None, PARAMS, AdamRule(0.1)) == {}


def test_half_precision_is_read_in_float32() -> None:
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    said = first_steps(optax.adam(0.1, mu_dtype=jnp.bfloat16), AdamRule(0.1), params)
    assert {value.dtype for value in said["w"]} == {jnp.dtype("float32")}
    np.testing.assert_allclose(said["w"].step, 0.1, rtol=1e-4)


def test_a_step_is_read_under_strict_promotion_of_types_and_ranks() -> None:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for optimizer, rule in FAMILY.values():
            jax.eval_shape(lambda grads, o=optimizer, r=rule: adam_steps(o.init(grads), grads, r), PARAMS)


def test_radam_s_scalars_are_those_of_the_step_that_comes() -> None:
    rule = AdamRule(0.01, **RATES, threshold=5.0)
    read = jax.jit(lambda state: radam_scalars(state, rule))
    optimizer = optax.radam(0.01, **RATES)
    update = jax.jit(optimizer.update)
    state = optimizer.init(PARAMS)
    for step in range(1, 9):
        want = rectify(step, 0.9, inclusive=True)
        got = {name: float(value) for name, value in read(state).items()}
        assert got == {
            "radam_length": pytest.approx(want.length, rel=1e-6),
            "radam_rectification": pytest.approx(want.rectification, rel=1e-6),
            "radam_rectified": float(step >= 6),
            "radam_multiplier": pytest.approx(want.multiplier, rel=1e-6),
        }
        _, state = update(PARAMS, state)
    assert radam_scalars(state, AdamRule()) == {}
    injected = optax.inject_hyperparams(optax.radam)(0.01, b2=0.9).init(PARAMS)
    assert float(radam_scalars(injected, AdamRule())["radam_length"]) == 1.0
