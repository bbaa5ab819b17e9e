"""madam held against the paper's recursion, against Adam, and against what optax asks of an optimizer."""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import gradiometer as gm
from gradiometer.optimizers.optax_api import madam, scale_by_madam
from gradiometer.stats_core import Moments
from gradiometer.stats_core.maxva import within_variance
from tests.jax_models import MODELS, cast
from tests.reference import maxva_naive

PARAMS = {"a": {"w": np.array([[1.0, -2.0], [0.5, 3.0]], np.float32)}, "b": np.array([4.0, -1.0], np.float32)}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper eps": {"eps_mode": "paper"},
    "amsgrad": {"amsgrad": True},
    "decay": {"weight_decay": 0.01},
    "b2 of 1": {"b2": 1.0},
    "per example": {"variance": "per_example"},
    "per example, full": {"variance": "per_example", "within": "full"},
}


_from_per_example = jax.jit(Moments.from_per_example)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def gradients(steps: int, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda leaf: (rng.standard_normal(leaf.shape) + 0.3).astype(np.float32), PARAMS)
        for _ in range(steps)
    ]


def moments_around(grads: Any, spread: float = 1.0, batch: int = 4) -> Any:
    """Moments of a few examples whose mean is the gradient."""
    rng = np.random.default_rng(9)

    def one(leaf: Any) -> Moments:
        noise = rng.standard_normal((batch, *leaf.shape)).astype(np.float32) * spread
        return _from_per_example(np.asarray(leaf)[None] + noise - noise.mean(0, keepdims=True))

    return jax.tree.map(one, grads)


def run(optimizer: Any, grads: list[Any], params: Any = PARAMS) -> tuple[list[Any], Any]:
    """Updates and last state, jitted; moments are given always, and ignored by whom does not want them."""
    state, update, found = optimizer.init(params), jax.jit(optimizer.update), []
    for g in grads:
        updates, state = update(g, state, params, moments=moments_around(g))
        found.append(updates)
    return found, state


def assert_trees_close(got: Any, want: Any, **tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


# The maths.


@pytest.mark.parametrize(
    ("within", "b2", "b2_min"), [(None, 0.98, 0.5), (None, 0.9, 0.7), ("mean", 0.999, 0.5), ("full", 0.9, 0.7)]
)
def test_the_state_is_that_of_the_brute_force_search(within: Any, b2: float, b2_min: float) -> None:
    grads = gradients(8)
    options = {} if within is None else {"variance": "per_example", "within": within}
    optimizer = scale_by_madam(b2=b2, b2_min=b2_min, **options)
    _, state = run(optimizer, grads)
    for path in (("a", "w"), ("b",)):
        leaf = [pick(g, path) for g in grads]
        tau2 = None
        if within is not None:
            tau2 = [np.asarray(within_variance(pick(moments_around(g), path), within), np.float64) for g in grads]
        want = maxva_naive([g.astype(np.float64) for g in leaf], tau2, b2, b2_min)
        for name in ("u", "s", "w"):
            np.testing.assert_allclose(pick(getattr(state, name), path), want[name], rtol=2e-3, atol=2e-4)


def pick(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("eps_mode", ["outside", "paper"])
def test_the_first_two_steps_are_known(eps_mode: Any) -> None:
    """w₁ = 1 − b2, v₁ = g₁²; the second weighs both gradients by what b2 gives them."""
    b1, b2, eps = 0.9, 0.99, 0.1
    g1, g2 = 2.0, -1.0
    updates, _ = run(
        scale_by_madam(b1=b1, b2=b2, eps=eps, eps_mode=eps_mode), [jnp.array([g]) for g in (g1, g2)], jnp.zeros(1)
    )
    w1 = 1 - b2
    w2 = 1 - b2**2
    v2 = (b2 * (1 - b2) * g1**2 + (1 - b2) * g2**2) / w2
    m2 = (b1 * (1 - b1) * g1 + (1 - b1) * g2) / (1 - b1**2)
    extra1, extra2 = (eps, eps) if eps_mode == "outside" else (eps / w1**0.5, eps / w2**0.5)
    assert float(updates[0][0]) == pytest.approx(g1 / (abs(g1) + extra1), rel=1e-5)
    assert float(updates[1][0]) == pytest.approx(m2 / (v2**0.5 + extra2), rel=1e-4)


@pytest.mark.parametrize(("b2", "decay"), [(0.9, 0.0), (0.999, 0.1)])
def test_it_is_adam_where_the_coefficient_can_not_move(b2: float, decay: float) -> None:
    grads = gradients(20)
    ours, _ = run(madam(1e-2, b2=b2, b2_min=b2, weight_decay=decay), grads)
    adam = optax.with_extra_args_support(optax.adamw(1e-2, b2=b2, weight_decay=decay))
    with jax.numpy_dtype_promotion("standard"):  # optax's own is not strict
        theirs, _ = run(adam, grads)
    for got, want in zip(ours, theirs, strict=True):
        assert_trees_close(got, want, rtol=2e-4, atol=1e-9)


def test_a_spike_is_listened_to_at_once() -> None:
    """Zhu et al.: one gradient of many sigma is given half of the weight; Adam gives it 1 − b2."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(2000).astype(np.float32)) for _ in range(200)]
    optimizer = scale_by_madam()
    state, update = optimizer.init(grads[0]), jax.jit(optimizer.update)
    for g in grads:
        _, state = update(g, state)
    before = float(jnp.mean(state.s))
    _, state = update(jnp.full(2000, 30.0), state)
    assert float(jnp.mean(state.s)) > 30 * before


def test_amsgrad_never_lets_the_denominator_fall() -> None:
    scales = (1.0, 10.0, 0.1, 0.1, 0.1, 0.1)
    grads = [jax.tree.map(lambda leaf, s=scale: leaf * np.float32(s), gradients(1)[0]) for scale in scales]
    optimizer = scale_by_madam(b2=0.5, b2_min=0.5, amsgrad=True)
    state, update, largest = optimizer.init(PARAMS), jax.jit(optimizer.update), 0.0
    for g in grads:
        _, state = update(g, state)
        now = float(state.max_denominator["b"][0])
        assert now >= largest
        largest = now
    assert largest > 4 * float(jnp.sqrt(state.s["b"][0] + state.u["b"][0] ** 2))


def test_weight_decay_is_decoupled_and_scaled_by_the_learning_rate() -> None:
    grads = gradients(3)
    plain, _ = run(madam(0.1), grads)
    decayed, _ = run(madam(0.1, weight_decay=0.5), grads)
    masked, _ = run(madam(0.1, weight_decay=0.5, mask={"a": True, "b": False}), grads)
    for without, all_of_it, some in zip(plain, decayed, masked, strict=True):
        want = jax.tree.map(lambda u, p: u - 0.1 * 0.5 * p, without, PARAMS)
        assert_trees_close(all_of_it, want, rtol=1e-5, atol=1e-8)
        assert_trees_close(some, {"a": want["a"], "b": without["b"]}, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("variant", "scale"), [("default", 1e-15), ("per example", 1e15), ("per example", 1e-15)])
def test_the_step_does_not_depend_on_the_scale_of_the_loss(variant: str, scale: float) -> None:
    """float32 squares of deviations below 1e-19 underflow, so the scale is kept 1e4 above that."""
    grads = gradients(6)
    optimizer = scale_by_madam(eps=0.0, **VARIANTS[variant])
    want, _ = run(optimizer, grads)
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    for g, expected in zip(grads, want, strict=True):
        scaled = jax.tree.map(lambda leaf: leaf * np.float32(scale), g)
        moments = jax.tree.map(
            lambda m: m.scaled(np.float32(scale)), moments_around(g), is_leaf=lambda node: isinstance(node, Moments)
        )
        updates, state = update(scaled, state, moments=moments)
        assert_trees_close(updates, expected, rtol=1e-3, atol=1e-4)


def test_a_gradient_of_0_moves_nothing_and_stays_finite() -> None:
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    for variant in ("paper eps", "amsgrad"):
        updates, state = run(madam(0.1, **VARIANTS[variant]), [zeros] * 3)
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.matrix
@pytest.mark.parametrize(("b2", "want"), [(0.98, 2.83), (0.999, 5.74)])
def test_the_stationary_second_moment_of_the_paper_s_rule(b2: float, want: float) -> None:
    assert stationary(b2, None) == pytest.approx(want, rel=0.03)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("b2", "within", "want"), [(0.98, "mean", 3.84), (0.999, "mean", 6.78), (0.98, "full", 79.7), (0.999, "full", 93.3)]
)
def test_the_stationary_second_moment_on_per_example_moments(b2: float, within: Any, want: float) -> None:
    assert stationary(b2, within) == pytest.approx(want, rel=0.03)


def stationary(b2: float, within: Any, batch: int = 64, coordinates: int = 2000) -> float:
    """E v in units of the variance of the mean, for N(0, 1) examples; the whole run is one compiled loop."""
    options = {} if within is None else {"variance": "per_example", "within": within}
    optimizer = scale_by_madam(b2=b2, **options)
    examples = 1 if within is None else batch

    def draw(key: jax.Array) -> tuple[jax.Array, Moments]:
        mean_key, m2_key = jax.random.split(key)
        mean = jax.random.normal(mean_key, (coordinates,)) / examples**0.5
        m2 = jax.random.chisquare(m2_key, max(1, examples - 1), shape=(coordinates,))
        rows = jnp.ones(examples)
        count = jnp.float32(examples)
        return mean, Moments(count, count, count, mean, m2, rows, rows)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        state, kept = carry
        mean, moments = draw(key)
        _, state = optimizer.update(mean, state, moments=moments)
        return (state, kept), jnp.mean(state.s + state.u * state.u)

    burn = int(12 / (1 - b2))
    keys = jax.random.split(jax.random.key(1), 2 * burn)
    _, v = jax.jit(lambda keys: lax.scan(step, (optimizer.init(jnp.zeros(coordinates)), 0), keys))(keys)
    return float(jnp.mean(v[burn:])) * examples


# Moments on their way to the optimizer.


def test_moments_of_identical_examples_are_the_paper_s_rule() -> None:
    grads = gradients(5)
    want, _ = run(madam(0.1), grads)
    optimizer = madam(0.1, variance="per_example")
    state = optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    for g, expected in zip(grads, want, strict=True):
        updates, state = update(g, state, PARAMS, moments=moments_around(g, spread=0.0))
        assert_trees_close(updates, expected, rtol=1e-4)


@pytest.mark.parametrize("factor", [1e-3, 64.0])
def test_what_was_done_to_all_gradients_alike_is_undone(factor: float) -> None:
    """Clipping by the global norm scales every g by one factor: the moments, measured before, must follow."""
    grads = gradients(5)
    optimizer = scale_by_madam(eps=0.0, variance="per_example")
    want, _ = run(optimizer, grads)
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    for g, expected in zip(grads, want, strict=True):
        clipped = jax.tree.map(lambda leaf: leaf * np.float32(factor), g)
        updates, state = update(clipped, state, moments=moments_around(g))
        assert_trees_close(updates, expected, rtol=2e-4)


def test_the_order_of_clip_and_madam_in_a_chain_is_the_user_s() -> None:
    grads = gradients(4)
    wide = scale_by_madam(eps=0.0, variance="per_example")
    want, _ = run(wide, grads)
    got, _ = run(optax.chain(optax.clip_by_global_norm(0.1), wide), grads)
    for clipped, expected in zip(got[:1], want[:1], strict=True):  # from the second on, clips differ from step to step
        assert_trees_close(clipped, expected, rtol=1e-4)


def test_a_parameter_without_moments_takes_the_paper_s_rule() -> None:
    grads = gradients(4)
    plain, _ = run(madam(0.1), grads)
    optimizer = madam(0.1, variance="per_example")
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    for g, expected in zip(grads, plain, strict=True):
        moments = {"a": {"w": None}, "b": moments_around(g)["b"]}
        updates, state = update(g, state, PARAMS, moments=moments)
        assert_trees_close(updates["a"], expected["a"], rtol=1e-5)
    assert not np.allclose(updates["b"], expected["b"], rtol=1e-3)


def test_a_step_that_was_not_measured_takes_the_paper_s_rule() -> None:
    model = MODELS["mlp"]
    fn = gm.value_and_grad(model.loss_fn)
    optimizer, plain = madam(0.1, variance="per_example"), madam(0.1)

    def step(optimizer: Any, measure: bool) -> Any:
        _, grads, moments = fn(model.params, model.batch, measure=measure)
        return optimizer.update(grads, optimizer.init(model.params), model.params, moments=moments)[0]

    unmeasured = jax.jit(lambda: step(optimizer, False))()
    assert_trees_close(unmeasured, jax.jit(lambda: step(plain, False))(), rtol=1e-6)


def test_per_example_without_moments_says_what_to_pass() -> None:
    optimizer = madam(0.1, variance="per_example")
    with pytest.raises(ValueError, match=r"needs moments with variance='per_example', got moments=None; call update\("):
        jax.jit(optimizer.update)(PARAMS, optimizer.init(PARAMS), PARAMS)


def test_moments_of_other_parameters_are_refused() -> None:
    optimizer = madam(0.1, variance="per_example")
    moments = {"params": moments_around(PARAMS)}
    with pytest.raises(ValueError, match=r"needs moments of the parameters that it updates, got moments of \[.*params"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, moments=moments)


def test_nan_in_one_coordinate_stays_there() -> None:
    optimizer = madam(0.1, variance="per_example")
    g = gradients(1)[0]
    g["b"][0] = np.nan
    updates, _ = jax.jit(optimizer.update)(g, optimizer.init(PARAMS), PARAMS, moments=moments_around(g))
    assert np.isnan(updates["b"]).tolist() == [True, False]
    assert np.isfinite(updates["a"]["w"]).all()


# What optax asks of an optimizer: one table, common checks.


def quadratic() -> tuple[Any, Callable[[Any], jax.Array]]:
    target = jnp.array([1.0, -1.0, 2.0])
    return jnp.zeros(3), lambda x: jnp.sum((x - target) ** 2)


def rosenbrock() -> tuple[Any, Callable[[Any], jax.Array]]:
    return jnp.zeros(2), lambda x: (1 - x[0]) ** 2 + 100.0 * (x[1] - x[0] ** 2) ** 2


def affine() -> tuple[Any, Callable[[Any], jax.Array]]:
    params = {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}
    return params, lambda p: jnp.sum((p["w"] @ jnp.array([1.0, 2.0]) + p["b"] - jnp.array([0.5, -0.5])) ** 2)


@pytest.mark.parametrize("target", [quadratic, rosenbrock, affine])
@pytest.mark.parametrize("variant", ["default", "per example"])
def test_it_converges(variant: str, target: Any) -> None:
    params, objective = target()
    optimizer = madam(1e-2, **VARIANTS[variant])

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(objective)(params)
        moments = jax.tree.map(lambda g: Moments.from_per_example(jnp.stack([g, g])), grads)
        updates, state = optimizer.update(grads, state, params, moments=moments)
        return (optax.apply_updates(params, updates), state), None

    (found, _), _ = jax.jit(lambda: lax.scan(step, (params, optimizer.init(params)), None, length=4000))()
    assert float(objective(found)) < 1e-2 * float(objective(params))


@pytest.mark.parametrize("variant", ["default", "amsgrad", "per example, full"])
def test_the_second_call_compiles_nothing(variant: str) -> None:
    optimizer = madam(0.1, **VARIANTS[variant])
    update, state = jax.jit(optimizer.update), optimizer.init(PARAMS)
    for g in gradients(3):
        _, state = update(g, state, PARAMS, moments=moments_around(g))
    assert update._cache_size() == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_have_the_type_of_the_gradients_and_state_is_wide(dtype: Any) -> None:
    grads, params = (cast(tree, dtype) for tree in (gradients(1)[0], PARAMS))
    optimizer = madam(0.1, variance="per_example")
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(grads, state, params, moments=moments_around(gradients(1)[0]))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(after[0][1:5])} == {jnp.dtype(jnp.float32)}
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, after)


def test_float64_parameters_have_float64_state() -> None:
    with jax.enable_x64(True):
        params = cast(PARAMS, jnp.float64)
        optimizer = madam(0.1)
        state = optimizer.init(params)
        updates, after = jax.jit(optimizer.update)(params, state, params)
        assert {leaf.dtype for leaf in jax.tree.leaves((updates, after[0].u))} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize("variant", ["amsgrad", "per example"])
def test_the_state_survives_pickling_and_donation(variant: str) -> None:
    optimizer = madam(0.1, **VARIANTS[variant])
    _, state = run(optimizer, gradients(2))
    again = pickle.loads(pickle.dumps(jax.device_get(state)))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    g = gradients(3)[2]
    want, _ = jax.jit(optimizer.update)(g, again, PARAMS, moments=moments_around(g))
    got, _ = jax.jit(optimizer.update, donate_argnums=1)(g, state, PARAMS, moments=moments_around(g))
    assert_trees_close(got, want, rtol=1e-6)


def wrapped(name: str, optimizer: Any, schedule: Any = 0.1) -> Any:
    return {
        "chain": lambda: optax.chain(optax.identity(), optimizer),
        "masked": lambda: optax.masked(optimizer, {"a": True, "b": True}),
        "multi_transform": lambda: optax.multi_transform({"x": optimizer, "y": optax.sgd(0.0)}, {"a": "x", "b": "x"}),
        "apply_if_finite": lambda: optax.apply_if_finite(optimizer, 3),
        "MultiSteps": lambda: optax.MultiSteps(optimizer, 1).gradient_transformation(),
        "named_chain": lambda: optax.named_chain(("madam", optimizer)),
    }[name]()


@pytest.mark.parametrize(
    "wrapper", ["chain", "masked", "multi_transform", "apply_if_finite", "MultiSteps", "named_chain"]
)
def test_wrapping_changes_nothing(wrapper: str) -> None:
    grads, variant = gradients(3), "per example"
    want, _ = run(madam(0.1, **VARIANTS[variant]), grads)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps and apply_if_finite promote by themselves
        got, _ = run(wrapped(wrapper, madam(0.1, **VARIANTS[variant])), grads)
    for one, expected in zip(got, want, strict=True):
        assert_trees_close(one, expected, rtol=1e-5)


@pytest.mark.parametrize("variance", ["minibatch", "per_example"])
def test_only_some_parameters_can_be_its_own(variance: Any) -> None:
    grads = gradients(3)
    labels = {"a": {"w": "ours"}, "b": "theirs"}
    optimizer = optax.multi_transform({"ours": madam(0.1, variance=variance), "theirs": optax.sgd(0.5)}, labels)
    got, _ = run(optimizer, grads)
    alone = madam(0.1, variance=variance)
    state, update = alone.init({"w": PARAMS["a"]["w"]}), jax.jit(alone.update)
    for one, g in zip(got, grads, strict=True):
        only = {"w": moments_around(g)["a"]["w"]}
        want, state = update({"w": g["a"]["w"]}, state, moments=only)
        np.testing.assert_allclose(one["a"]["w"], want["w"], rtol=1e-5)
        np.testing.assert_allclose(one["b"], -0.5 * g["b"], rtol=1e-6)


@pytest.mark.parametrize("variance", ["minibatch", "per_example"])
def test_hyperparameters_can_be_injected(variance: Any) -> None:
    grads = gradients(4)
    want, _ = run(madam(0.1, b2=0.9, weight_decay=0.1, variance=variance), grads)
    optimizer = optax.inject_hyperparams(madam)(learning_rate=0.1, b2=0.9, weight_decay=0.1, variance=variance)
    got, state = run(optimizer, grads)
    assert float(state.hyperparams["b2"]) == pytest.approx(0.9)
    for one, expected in zip(got, want, strict=True):
        assert_trees_close(one, expected, rtol=2e-4)


def test_b2_of_1_can_be_injected() -> None:
    grads = gradients(4)
    want, _ = run(madam(0.1, b2=1.0), grads)
    got, state = run(optax.inject_hyperparams(madam)(learning_rate=0.1, b2=1.0), grads)
    assert float(state.inner_state[0].rule.b2_init) == pytest.approx(0.9)
    assert_trees_close(got[-1], want[-1], rtol=2e-4)


def test_the_learning_rate_may_be_a_schedule() -> None:
    grads = gradients(3)
    flat, _ = run(madam(1.0), grads)
    scheduled, _ = run(madam(lambda count: 1.0 / (1.0 + count.astype(jnp.float32))), grads)
    for step, (one, base) in enumerate(zip(scheduled, flat, strict=True)):
        assert_trees_close(one, jax.tree.map(lambda leaf, s=step: leaf / (1 + s), base), rtol=1e-5)


def test_nnx_s_optimizer_hands_moments_on() -> None:
    model = MODELS["nnx mlp"]
    net = nnx.Linear(6, 2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(net, nnx.Param)
    fn = gm.value_and_grad(lambda params, batch: jnp.mean((nnx.merge(graph, params)(batch["x"]) - batch["y"]) ** 2))
    with jax.numpy_rank_promotion("allow"):
        _, grads, moments = jax.jit(fn)(params, model.batch)
    optimizer = nnx.Optimizer(net, madam(0.1, variance="per_example"), wrt=nnx.Param)
    before = np.asarray(net.kernel.get_value())
    optimizer.update(net, grads, moments=moments)
    raw = madam(0.1, variance="per_example")
    updates, _ = raw.update(grads, raw.init(params), params, moments=moments)
    np.testing.assert_allclose(net.kernel.get_value() - before, updates["kernel"].get_value(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, "needs 0 <= b1 < 1, got b1=1.0"),
        ({"b2": 0.4}, "needs 0 <= b2_min <= b2 <= 1, got b2_min=0.5, b2=0.4; set b2_min=b2 for Adam"),
        ({"b2": 1.1}, "b2_min=0.5, b2=1.1"),
        ({"b2_init": 1.0}, "needs 0 <= b2_init < 1, got b2_init=1.0"),
        ({"eps": -1.0}, "needs eps of at least 0, got eps=-1.0"),
        ({"eps_mode": "inside"}, r"needs eps_mode in \('outside', 'paper'\), got eps_mode='inside'"),
        ({"variance": "batch"}, r"needs variance in \('minibatch', 'per_example'\), got variance='batch'"),
        ({"within": "half"}, r"needs within in \('mean', 'full'\), got within='half'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        madam(0.1, **options)
