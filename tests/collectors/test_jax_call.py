"""What a loss function may take beside parameters and batch, and what it may return beside the loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import gradiometer as gm
from gradiometer.stats_core.errors import UnsupportedModel
from tests.reference import loop_moments, relative_error

X = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
Y = np.array([1, 0, 1, 1, 0, 1], np.float32)
WEIGHTS = np.array([3.0, 1.0, 2.0, 0.0, 5.0, 1.0], np.float32)
PARAMS = {"w": np.array([0.5, -1.0, 2.0], np.float32)}


def losses_of(params: Any, x: Any, y: Any) -> jax.Array:
    return (x @ params["w"] - y) ** 2


def row_grads() -> list[np.ndarray]:
    w = PARAMS["w"].astype(np.float64)
    return [2 * (x @ w - y) * x for x, y in zip(X.astype(np.float64), Y, strict=True)]


def losses() -> np.ndarray:
    return np.asarray((X.astype(np.float64) @ PARAMS["w"] - Y) ** 2)


def assert_moments(moments: Any, weights: np.ndarray | None = None) -> None:
    present = slice(None) if weights is None else weights != 0
    grads = [g for g, there in zip(row_grads(), np.ones(6) if weights is None else weights != 0, strict=True) if there]
    want = loop_moments(grads, None if weights is None else list(weights[present]))
    assert float(moments.count) == want.count
    assert relative_error(moments.mean, want.mean) <= 1e-6
    assert relative_error(moments.m2, want.m2) <= 1e-6 * want.kappa
    assert relative_error(moments.sq_norms[present], want.sq_norms) <= 1e-6
    assert float(moments.weight_sq_sum) == pytest.approx(want.weight_sq_sum)


@pytest.mark.parametrize("measure", [True, False])
def test_a_sum_over_rows_is_undone_in_the_moments_and_kept_in_the_gradient(measure: bool) -> None:
    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return jnp.sum(losses_of(params, *batch))

    fn = gm.value_and_grad(loss_fn, loss_reduction="sum")
    value, grads, moments = jax.jit(fn)(PARAMS, (X, Y), measure=measure)
    assert float(value) == pytest.approx(losses().sum(), rel=1e-6)
    np.testing.assert_allclose(grads["w"], sum(row_grads()), rtol=1e-5)
    if measure:
        assert_moments(moments["w"])
    fn.check(PARAMS, (X, Y))


@pytest.mark.parametrize("measure", [True, False])
def test_one_loss_a_row_is_averaged(measure: bool) -> None:
    fn = gm.value_and_grad(lambda params, batch: losses_of(params, *batch), loss_reduction="per_example")
    value, grads, moments = jax.jit(fn)(PARAMS, (X, Y), measure=measure)
    assert float(value) == pytest.approx(losses().mean(), rel=1e-6)
    np.testing.assert_allclose(grads["w"], np.mean(row_grads(), 0), rtol=1e-5)
    if measure:
        assert_moments(moments["w"])


def weighted(reduction: str) -> Any:
    def loss_fn(params: Any, batch: Any, weights: Any) -> jax.Array:
        rows = losses_of(params, *batch)
        if reduction == "per_example":
            return rows
        summed = jnp.sum(weights * rows)
        return summed if reduction == "sum" else summed / jnp.sum(weights)

    return loss_fn


@pytest.mark.parametrize(
    ("reduction", "measure", "microbatch_size"),
    [(reduction, measure, None) for reduction in ("mean", "sum", "per_example") for measure in (True, False)]
    + [("mean", True, 2)],
)
def test_weights_are_those_of_the_rows(reduction: str, measure: bool, microbatch_size: int | None) -> None:
    fn = gm.value_and_grad(
        weighted(reduction), loss_reduction=reduction, weights_argnum=2, microbatch_size=microbatch_size
    )
    value, grads, moments = jax.jit(fn)(PARAMS, (X, Y), WEIGHTS, measure=measure)
    scale = 1.0 if reduction == "sum" else 1.0 / WEIGHTS.sum()
    assert float(value) == pytest.approx(scale * (WEIGHTS * losses()).sum(), rel=1e-5)
    np.testing.assert_allclose(grads["w"], scale * (WEIGHTS[:, None] * row_grads()).sum(0), rtol=1e-5)
    if measure:
        assert_moments(moments["w"], WEIGHTS)


def test_check_knows_of_weights() -> None:
    gm.value_and_grad(weighted("mean"), weights_argnum=2).check(PARAMS, (X, Y), WEIGHTS)


def test_whole_numbers_are_weights_too() -> None:
    fn = gm.value_and_grad(weighted("mean"), weights_argnum=2)
    _, _, moments = jax.jit(fn)(PARAMS, (X, Y), WEIGHTS.astype(np.int32))
    assert_moments(moments["w"], WEIGHTS)


def test_a_row_of_weight_0_is_no_row_even_if_its_own_loss_is_not_a_number() -> None:
    """A padded row of a token mean: its own tokens are 0, and so is what its loss is divided by."""

    def loss_fn(params: Any, batch: Any, tokens: Any) -> jax.Array:
        x, mask = batch
        return jnp.sum(mask * (x @ params["w"])) / jnp.sum(mask)

    mask = (WEIGHTS > 0).astype(np.float32)
    value, grads, moments = jax.jit(gm.value_and_grad(loss_fn, weights_argnum=2))(PARAMS, (X, mask), mask)
    want = jax.value_and_grad(loss_fn)(PARAMS, (X, mask), mask)
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    np.testing.assert_allclose(grads["w"], want[1]["w"], rtol=1e-5)
    assert np.isfinite(moments["w"].m2).all()
    assert float(moments["w"].count) == 5


def test_a_batch_of_nothing_but_padding_has_moments_of_nothing() -> None:
    fn = gm.value_and_grad(weighted("per_example"), loss_reduction="per_example", weights_argnum=2)
    value, grads, moments = jax.jit(fn)(PARAMS, (X, Y), np.zeros(6, np.float32))
    assert (float(value), float(moments["w"].count)) == (0.0, 0.0)
    assert not np.asarray(grads["w"]).any()


@pytest.mark.parametrize("keys", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["typed key", "raw key"])
def test_each_row_has_a_key_of_its_own(keys: jax.Array) -> None:
    def loss_fn(params: Any, x: Any, rngs: Any) -> jax.Array:
        keep = jax.random.bernoulli(rngs["dropout"], 0.5, x.shape)
        return jnp.mean(jnp.where(keep, x, jnp.zeros_like(x)) @ params["w"])

    x = np.ones((8, 3), np.float32)
    value, _, moments = jax.jit(gm.value_and_grad(loss_fn, rng_argnums=2))(PARAMS, x, {"dropout": keys})
    grads = [jax.grad(loss_fn)(PARAMS, x[:1], {"dropout": key})["w"] for key in jax.random.split(keys, 8)]
    assert len({tuple(np.asarray(g).tolist()) for g in grads}) > 1
    want = loop_moments([np.asarray(g) for g in grads])
    assert relative_error(moments["w"].mean, want.mean) <= 1e-6
    assert relative_error(moments["w"].m2, want.m2) <= 1e-5
    assert float(value) == pytest.approx(float(want.mean @ PARAMS["w"]), rel=1e-5)


@pytest.mark.parametrize(("measure", "microbatch_size"), [(True, None), (True, 4), (False, None)])
def test_aux_is_that_of_the_plain_call(measure: bool, microbatch_size: int | None) -> None:
    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        rows = losses_of(params, *batch)
        aux = {"rows": rows, "kept": jnp.tile(rows[:, None], (1, 2)), "right": jnp.sum(rows < 1), "worst": rows.max()}
        return rows.mean(), (aux, None)

    fn = gm.value_and_grad(loss_fn, has_aux=True, microbatch_size=microbatch_size)
    (value, (aux, none)), _, _ = jax.jit(fn)(PARAMS, (X, Y), measure=measure)
    want_value, (want, _) = loss_fn(PARAMS, (X, Y))
    assert none is None
    assert float(value) == pytest.approx(float(want_value), rel=1e-6)
    assert aux.keys() == want.keys()
    for name, leaf in want.items():
        assert (aux[name].shape, aux[name].dtype) == (leaf.shape, leaf.dtype), name
        np.testing.assert_allclose(aux[name], leaf, rtol=1e-5)


def test_aux_that_is_one_a_row_costs_no_second_forward_pass() -> None:
    widths: list[int] = []

    def loss_fn(params: Any, x: Any) -> tuple[jax.Array, jax.Array]:
        widths.append(x.shape[0])
        logits = x @ params["w"]
        return jnp.mean(logits), logits

    with_aux = jax.jit(gm.value_and_grad(loss_fn, has_aux=True)).lower(PARAMS, X).as_text()
    assert sorted(set(widths)) == [1, 6]  # the 6 for its shape alone:
    without = jax.jit(gm.value_and_grad(lambda params, x: loss_fn(params, x)[0])).lower(PARAMS, X).as_text()
    assert with_aux.count("dot_general") <= without.count("dot_general") + 1  # the rows' logits; no second pass


def test_one_row_has_its_aux() -> None:
    def loss_fn(params: Any, x: Any) -> tuple[jax.Array, Any]:
        logits = x @ params["w"]
        return jnp.mean(logits), (logits, jnp.max(logits), x)

    (_, aux), _, _ = jax.jit(gm.value_and_grad(loss_fn, has_aux=True))(PARAMS, X[:1])
    assert [leaf.shape for leaf in aux] == [(1,), (), (1, 3)]
    np.testing.assert_allclose(aux[1], X[0] @ PARAMS["w"], rtol=1e-6)


class _WithBatchNorm(linen.Module):
    train: bool

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(1)(linen.BatchNorm(use_running_average=not self.train)(x))


@pytest.mark.parametrize("measure", [True, False])
def test_batchnorm_in_training_mode_is_refused_by_name(measure: bool) -> None:
    net = _WithBatchNorm(train=True)
    variables = net.init(jax.random.key(0), X)

    def loss_fn(params: Any, x: Any, batch_stats: Any) -> tuple[jax.Array, Any]:
        out, updates = net.apply({"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"])
        return jnp.mean(out**2), updates

    fn = gm.value_and_grad(loss_fn, has_aux=True)
    with pytest.raises(UnsupportedModel, match=r"got aux='batch_stats.BatchNorm_0.mean'.*use GroupNorm"):
        fn(variables["params"], X, variables["batch_stats"], measure=measure)


def test_batchnorm_that_updates_nothing_is_measured() -> None:
    net = _WithBatchNorm(train=False)
    variables = net.init(jax.random.key(0), X)

    def loss_fn(params: Any, x: Any, batch_stats: Any) -> jax.Array:
        return jnp.mean(net.apply({"params": params, "batch_stats": batch_stats}, x) ** 2)

    gm.value_and_grad(loss_fn).check(variables["params"], X, variables["batch_stats"])


def test_batchnorm_of_nnx_is_refused_by_name() -> None:
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    graph, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss_fn(params: Any, x: Any, statistics: Any) -> tuple[jax.Array, Any]:
        merged = nnx.merge(graph, params, statistics, copy=True)
        out = merged(x)
        return jnp.mean(out**2), nnx.state(merged, nnx.BatchStat)

    with pytest.raises(UnsupportedModel, match=r"got aux='mean'.*BatchNorm in training mode"):
        gm.value_and_grad(loss_fn, has_aux=True)(params, X, statistics)


def test_batchnorm_whose_statistics_are_thrown_away_is_found_by_check() -> None:
    net = _WithBatchNorm(train=True)
    variables = net.init(jax.random.key(0), X)

    def loss_fn(params: Any, x: Any) -> jax.Array:
        out, _ = net.apply({"params": params, **{k: v for k, v in variables.items() if k != "params"}}, x, mutable=True)
        return jnp.mean(out**2)

    with pytest.raises(UnsupportedModel, match="replace layers that mix rows"):
        gm.value_and_grad(loss_fn).check(variables["params"], X)


def loss_of_x(params: Any, x: Any) -> jax.Array:
    return jnp.mean(x @ params["w"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gm.value_and_grad(loss_of_x)(PARAMS), "at least 2 positional arguments, got args=1"),
        (
            lambda: gm.value_and_grad(loss_of_x)(PARAMS, {"x": X, "y": Y[:2]}),
            r"share a leading axis of examples, got shapes \[\(6, 3\), \(2,\)\]",
        ),
        (lambda: gm.value_and_grad(loss_of_x)(PARAMS, {}), r"leading axis of examples, got shapes \[\]"),
        (lambda: gm.value_and_grad(loss_of_x)(PARAMS, (X, 0.5)), r"got shapes \[\(6, 3\), \(\)\]; name the batch"),
        (lambda: gm.value_and_grad(loss_of_x)(PARAMS, X[:0]), r"got shapes \[\(0, 3\)\]"),
        (
            lambda: gm.value_and_grad(lambda p, x: x @ p["w"])(PARAMS, X),
            r"loss of shape \(\) for 1 rows under loss_reduction='mean', got shape=\(1,\); return that, or set",
        ),
        (
            lambda: gm.value_and_grad(loss_of_x, loss_reduction="per_example")(PARAMS, X, measure=False),
            r"loss of shape \(6,\) for 6 rows under loss_reduction='per_example', got shape=\(\)",
        ),
        (lambda: gm.value_and_grad(loss_of_x)({"n": 3}, X), r"needs a floating-point parameter, got none at argnums"),
        (
            lambda: gm.value_and_grad(lambda p, x, a: 0.0, weights_argnum=2)(PARAMS, X, Y[:2]),
            r"one weight a row, got weights of shape \(2,\) for batch=6",
        ),
    ],
)
def test_a_call_that_makes_no_sense_says_what_to_do(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="real parameters, got w=complex64; keep real and imaginary part"):
        gm.value_and_grad(loss_of_x)({"w": np.ones(3, np.complex64)}, X)
