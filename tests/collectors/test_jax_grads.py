import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradiometer as gm
from gradiometer.stats_core import Moments, variance
from gradiometer.stats_core.errors import UnsupportedModel
from tests.jax_models import BATCH, MODELS, cast, loop, rows
from tests.reference import LoopMoments, relative_error


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """No type is widened and no axis added behind the user's back."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def cases(quick_alone: set[str], quick_chunked: set[str]) -> list[Any]:
    """Every model, at once and by chunks of 2 (the last of 1); those that are not quick belong to the matrix."""
    quick = {None: quick_alone, 2: quick_chunked}
    return [
        pytest.param(name, size, marks=[] if name in quick[size] else pytest.mark.matrix)
        for name in MODELS
        for size in (None, 2)
    ]


def leaves_of(moments: Any) -> list[Moments]:
    return [m for m in jax.tree.leaves(moments, is_leaf=lambda x: isinstance(x, Moments)) if isinstance(m, Moments)]


def assert_agree(got: list[Moments], want: list[LoopMoments], bound: float) -> None:
    """The promise of the design; leaves whose true gradient is 0 are judged on the scale of the largest."""
    assert len(got) == len(want)
    floor = bound * max(np.linalg.norm(w.mean) for w in want)
    for m, w in zip(got, want, strict=True):
        assert (float(m.count), float(m.weight_sum)) == (w.count, pytest.approx(w.weight_sum, rel=1e-6))
        assert float(m.weight_sq_sum) == pytest.approx(w.weight_sq_sum, rel=1e-6)
        assert np.linalg.norm(np.asarray(m.mean) - w.mean) <= max(bound * np.linalg.norm(w.mean), floor)
        assert np.linalg.norm(np.asarray(m.sq_norms) - w.sq_norms) <= max(bound * np.linalg.norm(w.sq_norms), floor**2)
        assert relative_error(np.asarray(m.m2), w.m2) <= bound * w.kappa or np.linalg.norm(w.m2) <= floor**2
        assert (np.asarray(m.m2) >= 0).all()


@pytest.mark.parametrize(("name", "microbatch_size"), cases(quick_alone=set(MODELS), quick_chunked={"tied attention"}))
def test_float32_agrees_with_the_float64_loop(name: str, microbatch_size: int | None) -> None:
    model = MODELS[name]
    losses, want = loop(model)
    params, batch = cast(model.params, jnp.float32), cast(model.batch, jnp.float32)
    fn = jax.jit(gm.value_and_grad(model.loss_fn, microbatch_size=microbatch_size))
    value, grads, moments = fn(params, batch)
    assert_agree(leaves_of(moments), want, 1e-5)
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-5)
    plain = jax.jit(jax.grad(model.loss_fn, allow_int=True))(params, batch)
    assert jax.tree.structure(grads) == jax.tree.structure(plain)
    for got, ours, expected in zip(
        jax.tree.leaves(grads), jax.tree.leaves(params), jax.tree.leaves(plain), strict=True
    ):
        assert (got.dtype, got.shape) == (jnp.asarray(ours).dtype, expected.shape)
        if got.dtype == jnp.float32:
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
        else:
            assert not got.any()


@pytest.mark.parametrize(("name", "microbatch_size"), cases(quick_alone={"tied attention"}, quick_chunked={"mlp"}))
def test_float64_agrees_with_the_float64_loop(name: str, microbatch_size: int | None) -> None:
    model = MODELS[name]
    _, want = loop(model)
    flax_promotes = name in ("cnn with GroupNorm", "nnx mlp")
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard" if flax_promotes else "strict"):
        fn = gm.value_and_grad(model.loss_fn, microbatch_size=microbatch_size)
        _, _, moments = jax.jit(fn)(cast(model.params, jnp.float64), cast(model.batch, jnp.float64))
        assert_agree(leaves_of(moments), want, 1e-12)


def test_what_is_not_floating_point_has_no_moments() -> None:
    model = MODELS["counter and None"]
    _, grads, moments = jax.jit(gm.value_and_grad(model.loss_fn))(model.params, model.batch)
    assert moments["steps"] is None
    assert grads["steps"] == 0
    assert grads["nothing"] is None


def test_a_traced_measure_chooses_on_the_device() -> None:
    model = MODELS["mlp"]
    fn = jax.jit(gm.value_and_grad(model.loss_fn))
    on, off = fn(model.params, model.batch, measure=True), fn(model.params, model.batch, measure=False)
    assert fn._cache_size() == 1
    assert jax.tree.structure(on) == jax.tree.structure(off)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), on) == jax.tree.map(lambda x: (x.shape, x.dtype), off)
    assert [float(m.count) for m in leaves_of(on[2])] == [BATCH] * 4
    for m in leaves_of(off[2]):
        assert not any(np.asarray(field).any() for field in m if field is not None)
    plain = jax.jit(jax.value_and_grad(model.loss_fn))(model.params, model.batch)
    for got, want in zip(jax.tree.leaves(off[:2]), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_an_unmeasured_step_does_not_differentiate_rows() -> None:
    model = MODELS["mlp"]
    shapes: list[tuple[int, ...]] = []

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        shapes.append(batch["x"].shape)
        return model.loss_fn(params, batch)

    gm.value_and_grad(loss_fn)(model.params, model.batch, measure=np.bool_(False))
    assert shapes == [(BATCH, 6)]


def test_nothing_leaves_the_device_and_the_second_call_compiles_nothing() -> None:
    model = MODELS["mlp"]
    traced = 0

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        nonlocal traced
        traced += 1
        return model.loss_fn(params, batch)

    fn = gm.value_and_grad(loss_fn, microbatch_size=2)

    def step(params: Any, temporal: Any, batch: Any, measure: Any) -> Any:
        _, _, moments = fn(params, batch, measure=measure)
        return gm.summarize(moments, temporal)

    temporal = gm.init_temporal(model.params)
    jaxpr = str(jax.make_jaxpr(step)(model.params, temporal, model.batch, True))
    assert "scan" in jaxpr
    assert "callback" not in jaxpr
    jitted = jax.jit(step)
    _, temporal = jitted(model.params, temporal, model.batch, True)
    before = traced
    jitted(model.params, temporal, model.batch, False)
    assert (traced, jitted._cache_size()) == (before, 1)


def test_one_example_has_a_gradient_and_no_variance() -> None:
    model = MODELS["mlp"]
    one = jax.tree.map(lambda leaf: leaf[:1], model.batch)
    value, grads, moments = jax.jit(gm.value_and_grad(model.loss_fn))(model.params, one)
    want, want_grads = jax.value_and_grad(model.loss_fn)(model.params, one)
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    np.testing.assert_allclose(grads["out"]["kernel"], want_grads["out"]["kernel"], rtol=1e-5)
    assert not np.asarray(moments["out"]["kernel"].m2).any()
    assert np.isnan(jax.jit(variance)(moments["out"]["kernel"])).all()


def test_one_bad_example_is_data() -> None:
    model = MODELS["mlp"]
    batch = {"x": model.batch["x"].copy(), "y": model.batch["y"]}
    batch["x"][2, 0] = np.inf
    _, grads, moments = jax.jit(gm.value_and_grad(model.loss_fn))(model.params, batch)
    assert np.isnan(grads["hidden"]["kernel"]).any()
    finite = np.isfinite(moments["hidden"]["kernel"].sq_norms)
    assert finite.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_gradients_of_any_scale_keep_their_digits(scale: float) -> None:
    params, x = {"w": jnp.zeros(3)}, np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    _, _, moments = gm.value_and_grad(lambda p, x: jnp.mean(x @ p["w"]) * np.float32(scale))(params, x)
    unit = (moments["w"].mean / scale, moments["w"].m2 / scale / scale, moments["w"].sq_norms / scale / scale)
    wide = x.astype(np.float64)
    lost = 8 * np.finfo(np.float32).tiny / scale / scale  # squares below the smallest normal number are flushed to 0
    for got, want in zip(unit, (wide.mean(0), 8 * wide.var(0), (wide**2).sum(1)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=lost)


def test_half_precision_is_accumulated_in_float32() -> None:
    model = MODELS["mlp"]
    params, batch = cast(model.params, jnp.bfloat16), cast(model.batch, jnp.bfloat16)
    value, grads, moments = jax.jit(gm.value_and_grad(model.loss_fn))(params, batch)
    assert value.dtype == jnp.bfloat16
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    assert {m.m2.dtype for m in leaves_of(moments)} == {jnp.dtype(jnp.float32)}
    _, want = loop(model)
    half_loop = [jax.tree.leaves(jax.jit(jax.grad(model.loss_fn))(params, row)) for row in rows(batch)]
    for index, (m, w) in enumerate(zip(leaves_of(moments), want, strict=True)):
        mean = np.mean([np.asarray(grads[index], np.float64) for grads in half_loop], axis=0)
        # No more than twice the error of a loop over the same rows in bfloat16.
        assert relative_error(m.mean, w.mean) <= 2 * relative_error(mean, w.mean) + 1e-3


def test_several_argnums_give_tuples_and_several_batch_arguments_are_rows() -> None:
    def loss_fn(x: jax.Array, w: jax.Array, b: jax.Array, *, power: int, y: Any = None, z: Any = None) -> jax.Array:
        return jnp.mean((x @ w + b) ** power)

    x, w, b = jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.ones(2), jnp.zeros(())
    value, grads, moments = gm.value_and_grad(loss_fn, argnums=(1, 2), batch_argnums=0)(x, w, b, power=2)
    want = jax.value_and_grad(loss_fn, argnums=(1, 2))(x, w, b, power=2)
    np.testing.assert_allclose(value, want[0])
    assert isinstance(moments, tuple)
    for got, expected, m in zip(grads, want[1], moments, strict=True):
        np.testing.assert_allclose(got, expected)
        np.testing.assert_allclose(m.mean, expected)

    def paired(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((x @ w - y) ** 2)

    _, _, moments = gm.value_and_grad(paired, batch_argnums=(1, 2))(w, x, jnp.array([1.0, 1.0]))
    assert moments.sq_norms.shape == (2,)


def test_a_python_float_is_a_parameter() -> None:
    params = {"w": jnp.ones(2), "scale": 0.5}
    fn = gm.value_and_grad(lambda p, x: jnp.mean(x @ p["w"]) * p["scale"])
    _, grads, moments = fn(params, jnp.array([[1.0, 2.0], [3.0, 5.0]]))
    assert float(grads["scale"]) == 5.5
    assert float(moments["scale"].m2) == 12.5
    summary, _ = gm.summarize(moments, gm.init_temporal(params))
    assert summary.columns["variance_trace"].tolist() == [12.5, 1.625]


def test_coverage_is_known_after_the_first_trace() -> None:
    model = MODELS["counter and None"]
    fn = gm.value_and_grad(model.loss_fn)
    assert fn.coverage is None
    jax.eval_shape(fn, model.params, model.batch)
    elements = sum(leaf.size for leaf in jax.tree.leaves(MODELS["mlp"].params))
    assert (fn.coverage.num_params, fn.coverage.num_params_measured) == (elements, elements)
    assert list(fn.coverage.uncovered) == []


def test_check_passes_a_loss_whose_rows_are_apart() -> None:
    for name in ("tied attention", "nnx mlp"):  # with a gradient that is 0, and with a State
        model = MODELS[name]
        gm.value_and_grad(model.loss_fn).check(cast(model.params, jnp.float32), cast(model.batch, jnp.float32))


def centred(params: Any, batch: Any) -> jax.Array:
    x = batch["x"] - jnp.mean(batch["x"], axis=0, keepdims=True)
    return MODELS["mlp"].loss_fn(params, {"x": x, "y": batch["y"]})


def test_check_finds_rows_that_are_coupled() -> None:
    model = MODELS["mlp"]
    with pytest.raises(UnsupportedModel, match=r"mean of its rows' losses, got relative difference=.* in 'hidden.*'"):
        gm.value_and_grad(centred).check(model.params, model.batch)


def test_check_finds_a_wrong_reduction() -> None:
    model = MODELS["mlp"]
    with pytest.raises(UnsupportedModel, match=r"sum of its rows' losses.*set loss_reduction"):
        gm.value_and_grad(model.loss_fn, loss_reduction="sum").check(model.params, model.batch)


def test_check_counts_nan_as_a_difference() -> None:
    model = MODELS["mlp"]
    with pytest.raises(UnsupportedModel, match="difference=nan"):
        gm.value_and_grad(lambda w, x: jnp.mean(w * x) / jnp.sum(x[:1] * 0)).check(jnp.ones(()), jnp.ones(3))
    gm.value_and_grad(model.loss_fn).check(jax.tree.map(np.zeros_like, model.params), model.batch)


def test_check_needs_a_loss_without_randomness() -> None:
    with pytest.raises(ValueError, match=r"without randomness, got rng_argnums=\(2,\); check the same loss with dropo"):
        gm.value_and_grad(lambda p, x, key: jnp.mean(p * x), rng_argnums=2).check(jnp.ones(()), jnp.ones(3), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "surgery"}, r"needs engine in \('auto', 'vmap', 'microbatch'\) in this release, got .*'surgery'"),
        ({"unit": "token"}, r"needs unit in \('example',\) in this release, got unit='token'"),
        ({"segments_argnum": 2}, r"needs segments_argnum in \(None,\) in this release, got segments_argnum=2"),
        ({"statistics": "fuller"}, r"needs tiers in \('light', 'default', 'full'\) or names .*'fuller'"),
        ({"loss_reduction": "max"}, r"needs loss_reduction in \('mean', 'sum', 'per_example'\).*got .*'max'"),
        ({"microbatch_size": 0}, "needs microbatch_size of at least 1, got microbatch_size=0"),
        ({"engine": "microbatch"}, "needs microbatch_size with engine='microbatch'.*microbatch_size=None"),
        ({"engine": "vmap", "microbatch_size": 4}, "got engine='vmap', microbatch_size=4; leave engine at 'auto'"),
        ({"batch_argnums": 0}, "different positions from 0 on.*argnums=0, batch_argnums=0.*one role"),
        ({"batch_argnums": ()}, r"parameters and batch at least, got argnums=0, batch_argnums=\(\)"),
        ({"argnums": -1}, "different positions from 0 on, .*argnums=-1"),
    ],
)
def test_an_option_of_another_release_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gm.value_and_grad(MODELS["mlp"].loss_fn, **options)


def test_gradiometer_disable_leaves_the_plain_gradient(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRADIOMETER_DISABLE", "1")
    model = MODELS["mlp"]
    fn = gm.value_and_grad(model.loss_fn)
    for _ in range(2):
        _, grads, moments = fn(model.params, model.batch)
    assert float(moments["out"]["kernel"].count) == 0
    np.testing.assert_allclose(grads["temperature"], jax.grad(model.loss_fn)(model.params, model.batch)["temperature"])
    assert len([r for r in caplog.records if "GRADIOMETER_DISABLE" in r.message]) == 1


def test_importing_the_collector_imports_neither_optax_nor_flax() -> None:
    code = (
        "import sys, gradiometer as gm; gm.value_and_grad, gm.summarize; "
        "sys.exit(', '.join({'optax', 'flax', 'torch', 'grpc'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_directions_and_signs_are_measured_where_a_statistic_needs_them() -> None:
    rng = np.random.default_rng(0)
    x, params = rng.standard_normal((6, 4)).astype(np.float32), {"w": np.array([0.5, -1.0, 2.0, 0.1], np.float32)}

    def loss_fn(params: Any, x: Any, weights: Any) -> Any:
        return jnp.sum(weights * jnp.tanh(x @ params["w"]) ** 2) / jnp.sum(weights)

    weights = np.array([1, 2, 0, 1, 3, 1], np.float32)  # one row is padding
    rows = np.asarray(jax.vmap(jax.grad(lambda w, row: jnp.tanh(row @ w) ** 2), (None, 0))(params["w"], x), np.float64)
    share = weights / weights.sum()
    for measure in (True, jnp.asarray(True)):
        fn = gm.value_and_grad(loss_fn, weights_argnum=2, statistics=["conflicting_share", "sign_snr"])
        _, _, moments = jax.jit(fn)(params, x, weights, measure=measure)
        np.testing.assert_allclose(moments["w"].dots, (rows @ (share @ rows)) * (weights > 0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(moments["w"].sign_mean, share @ np.sign(rows), rtol=1e-6, atol=1e-6)
    _, _, plain = gm.value_and_grad(loss_fn, weights_argnum=2)(params, x, weights)
    assert (plain["w"].dots, plain["w"].sign_mean) == (None, None)
    # By chunks the mean is known too late for the dots; signs merge.
    fn = gm.value_and_grad(loss_fn, weights_argnum=2, statistics="full", microbatch_size=4)
    _, _, chunked = jax.jit(fn)(params, x, weights)
    assert chunked["w"].dots is None
    np.testing.assert_allclose(chunked["w"].sign_mean, share @ np.sign(rows), rtol=1e-6, atol=1e-6)
