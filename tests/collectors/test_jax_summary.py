import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradiometer as gm
from gradiometer.collectors.jax_summary import gradient_scale
from gradiometer.collectors.optax_state import AdamRule
from gradiometer.optimizers.optax_api import madam
from gradiometer.stats_core import Moments, TemporalMoments, catalog, maxva, selection
from gradiometer.stats_core.histogram import sketch_fixed
from gradiometer.stats_core.selection import Selection
from gradiometer.stats_core.successive import Previous, step_sums
from gradiometer.stats_core.summary import Part, batch_sums, summarized
from gradiometer.stats_core.temporal import FIXED_BETA, FixedMoments, fixed_sums, maxva_sums
from tests.jax_models import MODELS, cast
from tests.reference import loop_layer, loop_moments, maxva_naive

MAXVA = ("temporal_variance", "temporal_variance_prior", "deviation_sq", "deviation_share", "maxva_beta")


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def per_example(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "a": {"w": rng.standard_normal((6, 3, 2)) + 1, "b": rng.standard_normal((6, 2))},
        "c": rng.standard_normal((6, 4)),
    }


def moments_of(grads: Any, weights: Any = None) -> Any:
    def one(leaf: Any) -> Moments:
        m = Moments.from_per_example(jnp.asarray(leaf, jnp.float32), weights)
        return m._replace(count=jnp.float32(m.count))

    return jax.tree.map(one, grads)


PARAMS = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), per_example(0))
LAYERS = {"a": ("b", "w"), "c": None}  # in the order of jax


def layer_leaves(tree: Any, layer: str) -> list[np.ndarray]:
    keys = LAYERS[layer]
    return [tree[layer]] if keys is None else [tree[layer][key] for key in keys]


def column(summary: Any, name: str) -> list[float]:
    return np.asarray(summary.columns[name], np.float64).tolist()


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0, 1.0, 1.0]])
def test_light_columns_are_those_of_the_float64_loop(weights: Any) -> None:
    grads = per_example(1)
    given = None if weights is None else jnp.asarray(weights)
    summary, temporal = jax.jit(gm.summarize, static_argnames="statistics")(
        moments_of(grads, given), None, statistics="light"
    )
    assert temporal is None
    assert set(summary.columns) == set(selection.columns("light"))
    for index, layer in enumerate(LAYERS):
        parts = [list(leaf) for leaf in layer_leaves(grads, layer)]
        for name, want in loop_layer(parts, weights).items():
            assert column(summary, name)[index] == pytest.approx(want, rel=1e-4), (layer, name)
    assert column(summary, "nonfinite_examples") == [0.0, 0.0]
    assert {c.dtype for c in summary.columns.values()} == {jnp.dtype(jnp.float32)}


def test_columns_through_time_are_those_of_the_float64_loop() -> None:
    step = jax.jit(gm.summarize)
    temporal: Any = gm.init_temporal(PARAMS)
    steps = [per_example(seed) for seed in range(4)]
    for index, grads in enumerate(steps):
        summary, temporal = step(moments_of(grads), temporal)
        assert set(summary.columns) == set(selection.columns("default"))
        for place, layer in enumerate(LAYERS):
            history = [[leaf.mean(0) for leaf in layer_leaves(tree, layer)] for tree in steps[: index + 1]]
            naive = [maxva_naive([means[k] for means in history]) for k in range(len(history[0]))]
            want = sum(state["s"].sum() for state in naive)
            assert column(summary, "temporal_variance")[place] == pytest.approx(want, rel=1e-4, abs=1e-6)
            if index == 0:
                assert np.isnan(column(summary, "step_variance")[place])
                assert np.isnan(column(summary, "deviation_sq")[place])
                continue
            d = sum(0.5 * ((now - old) ** 2).sum() for now, old in zip(history[-1], history[-2], strict=True))
            assert column(summary, "step_variance")[place] == pytest.approx(d, rel=1e-4)
            both = [
                loop_layer([list(leaf) for leaf in layer_leaves(tree, layer)])["batch_variance"]
                for tree in steps[index - 1 : index + 1]
            ]
            assert column(summary, "step_variance_expected")[place] == pytest.approx(np.mean(both), rel=1e-4)
            elements = [state["beta"].size for state in naive]
            beta = np.average([state["beta"].mean() for state in naive], weights=elements)
            if index > 1:  # where a variance existed before the step
                assert column(summary, "maxva_beta")[place] == pytest.approx(beta, abs=2e-3)


def test_a_step_that_was_not_measured_changes_nothing() -> None:
    model = MODELS["mlp"]
    fn = gm.value_and_grad(model.loss_fn)
    temporal: Any = gm.init_temporal(model.params)

    @jax.jit
    def step(temporal: Any, measure: Any) -> Any:
        return gm.summarize(fn(model.params, model.batch, measure=measure)[2], temporal)

    _, temporal = step(temporal, True)
    summary, after = step(temporal, False)
    assert float(summary.count) == 0
    assert all(np.isnan(values).all() for values in summary.columns.values())
    jax.tree.map(np.testing.assert_array_equal, temporal, after)
    assert step._cache_size() == 1


def test_without_temporal_state_columns_through_time_are_absent() -> None:
    summary, temporal = gm.summarize(moments_of(per_example(0)), None)
    assert temporal is None
    for name in ("step_variance", "step_variance_expected", *MAXVA):
        assert np.isnan(column(summary, name)).all(), name
    assert np.isfinite(column(summary, "variance_trace")).all()


def test_one_example_has_no_variance() -> None:
    one = jax.tree.map(lambda leaf: leaf[:1], per_example(0))
    summary, _ = jax.jit(gm.summarize)(moments_of(one), gm.init_temporal(PARAMS))
    for name in ("variance_trace", "batch_variance", "grad_sq_norm"):
        assert np.isnan(column(summary, name)).all(), name
    assert np.isfinite(column(summary, "mean_sq_norm")).all()


def test_a_nan_is_counted_and_does_not_stay() -> None:
    step = jax.jit(gm.summarize)
    _, temporal = step(moments_of(per_example(0)), gm.init_temporal(PARAMS))
    bad = per_example(1)
    bad["c"][2, 1] = np.nan
    summary, temporal = step(moments_of(bad), temporal)
    assert column(summary, "nonfinite_examples") == [0.0, 1.0]
    assert np.isnan(column(summary, "variance_trace")).tolist() == [False, True]
    summary, temporal = step(moments_of(per_example(2)), temporal)
    assert np.isfinite(column(summary, "temporal_variance")).all()
    summary, _ = step(moments_of(per_example(3)), temporal)
    assert all(np.isfinite(values).all() for values in summary.columns.values())


@pytest.mark.parametrize(
    "options",
    [{}, {"b2": 0.9, "b2_min": 0.7}, {"variance": "per_example"}, {"variance": "per_example", "within": "full"}],
)
def test_an_optimizer_s_own_moments_are_shown_as_its_step_will_have_them(options: Any) -> None:
    clip = 0.25
    optimizer = optax.chain(optax.scale(1.0), madam(0.1, weight_decay=0.01, **options))
    opt_state = optimizer.init(PARAMS)
    temporal = gm.init_temporal(PARAMS, opt_state)
    assert temporal.moments is None

    @jax.jit
    def step(grads: Any, opt_state: Any, temporal: Any) -> Any:
        moments = moments_of(grads)
        seen = jax.tree.map(lambda m: m.mean * clip, moments, is_leaf=lambda node: isinstance(node, Moments))
        summary, temporal = gm.summarize(moments, temporal, opt_state=opt_state, grads=seen)
        _, opt_state = optimizer.update(seen, opt_state, PARAMS, moments=moments)
        return summary, opt_state, temporal, gradient_scale(seen, moments)

    for seed in range(3):
        summary, opt_state, temporal, scale = step(per_example(seed), opt_state, temporal)
    state = opt_state[1][0]
    for index, layer in enumerate(LAYERS):
        want = sum(float(jnp.sum(leaf)) for leaf in layer_leaves(state.s, layer))
        assert column(summary, "temporal_variance")[index] == pytest.approx(want, rel=1e-4)
    assert float(scale) == pytest.approx(clip**2, rel=1e-5)


def test_a_parameter_of_another_optimizer_makes_its_layer_absent() -> None:
    labels = {"a": {"w": "ours", "b": "theirs"}, "c": "ours"}
    optimizer = optax.multi_transform({"ours": madam(0.1), "theirs": optax.sgd(0.1)}, labels)
    opt_state = optimizer.init(PARAMS)
    summary, _ = jax.jit(gm.summarize)(moments_of(per_example(0)), gm.init_temporal(PARAMS), opt_state=opt_state)
    assert np.isnan(column(summary, "temporal_variance")).tolist() == [True, False]


def test_with_any_other_optimizer_the_collector_keeps_its_own() -> None:
    opt_state = optax.adam(0.1).init(PARAMS)
    temporal = gm.init_temporal(PARAMS, opt_state)
    summary, temporal = gm.summarize(moments_of(per_example(0)), temporal, opt_state=opt_state)
    means = {name: loop_moments(list(leaf)).mean for name, leaf in per_example(0)["a"].items()}
    np.testing.assert_allclose(temporal.moments["a"]["w"].u, means["w"], rtol=1e-5)
    assert np.isfinite(column(summary, "temporal_variance")).all()


def test_temporal_state_is_in_float32_for_half_precision() -> None:
    temporal = gm.init_temporal(cast(PARAMS, jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(temporal._replace(exponent=None))} == {jnp.dtype(jnp.float32)}


def test_columns_stand_in_the_order_of_the_layers() -> None:
    model = MODELS["nnx mlp"]
    _, _, moments = jax.jit(gm.value_and_grad(model.loss_fn))(model.params, model.batch)
    summary, _ = jax.jit(gm.summarize)(moments, gm.init_temporal(model.params))
    assert column(summary, "mean_sq_norm")[2] == pytest.approx(
        sum(float(jnp.sum(moments["out"][name].get_value().mean ** 2)) for name in ("bias", "kernel")), rel=1e-5
    )


def test_temporal_state_of_other_parameters_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"temporal made from the same parameters, got temporal of \['v'\] for moments"
    ):
        gm.summarize(moments_of(per_example(0)), gm.init_temporal({"v": jnp.ones(2)}))


def test_an_unknown_tier_is_refused() -> None:
    with pytest.raises(ValueError, match="needs tiers in"):
        gm.summarize(moments_of(per_example(0)), None, statistics="heavy")  # type: ignore[arg-type]


FULL = "full,outliers"


def with_directions(grads: Any, weights: Any = None) -> Any:
    def one(leaf: Any) -> Moments:
        m = Moments.from_per_example(jnp.asarray(leaf, jnp.float32), weights, dots=True, sign_mean=True)
        return m._replace(count=jnp.float32(m.count))

    return jax.tree.map(one, grads)


def test_the_full_tier_is_that_of_numpy_in_float64() -> None:
    temporal: Any = gm.init_temporal(PARAMS, statistics=FULL)
    step = jax.jit(functools.partial(gm.summarize, statistics=FULL))
    summary: Any = None
    wanted = Selection.of(FULL)
    state = TemporalMoments.zeros_like(np.zeros(4))
    fixed, previous = FixedMoments.zeros_like(np.zeros(4)), Previous.zeros_like(np.zeros(4))
    spread = np.zeros(4)
    for number in range(4):
        summary, temporal = step(with_directions(per_example(number)), temporal)
        moments = Moments.from_per_example(per_example(number)["c"], dots=True, sign_mean=True)
        of_batch = batch_sums([moments], wanted)
        now = Previous(moments.mean, of_batch["batch_variance"][0], of_batch["mean_sq_norm"][0])
        sums = step_sums(previous, now)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = maxva.deviation_ratio(state, moments.mean)
        found = maxva_sums(state, moments.mean, kish=spread)
        more, fixed = fixed_sums(fixed, moments.mean, FIXED_BETA)
        sketch = sketch_fixed(ratio, state.s > 0)
        previous, state, spread = now, found.after, found.kish
    part = Part(moments, 4, sums | found.sums | more, {"element_deviation_ratio": sketch})
    want = summarized([[part]], of_batch, wanted._replace(sketches=("element_deviation_ratio",)))
    of_adam = {row.name for row in catalog.STATISTICS if "adam" in row.needs}
    assert set(summary.columns) == set(wanted.columns)
    for name, values in want.columns.items():
        got = float(summary.columns[name][1])
        assert got == pytest.approx(float(values[0]), rel=2e-4, abs=1e-6, nan_ok=name in of_adam), name
    assert set(summary.sketches) == {"example_norm", "element_deviation_ratio", "element_t_sq"}
    assert np.asarray(summary.sketches["element_deviation_ratio"].counts[1]).tolist() == (
        want.sketches["element_deviation_ratio"].counts[0].tolist()
    )
    everything = np.concatenate([np.asarray(leaf).reshape(6, -1) for leaf in jax.tree.leaves(per_example(3))], axis=1)
    norms = (everything**2).sum(axis=1)
    assert float(summary.scalars["norm_max"]) == pytest.approx(float(np.sqrt(norms.max())), rel=1e-5)
    assert int(summary.outliers.rows[0]) == int(norms.argmax())


def test_an_unmeasured_step_has_the_shapes_of_a_measured_one_and_nothing_in_it() -> None:
    temporal: Any = gm.init_temporal(PARAMS, statistics=FULL)
    step = jax.jit(functools.partial(gm.summarize, statistics=FULL))
    moments = with_directions(per_example(0))
    nothing = jax.tree.map(jnp.zeros_like, moments)
    measured, _ = step(moments, temporal)
    absent, after = step(nothing, temporal)
    assert jax.tree.map(jnp.shape, absent) == jax.tree.map(jnp.shape, measured)
    assert absent.count == 0
    assert all(np.isnan(values).all() for values in absent.columns.values())
    jax.tree.map(np.testing.assert_array_equal, after, temporal)


@pytest.mark.parametrize("exponent", [-55, -50, 45, 60])
def test_gradients_of_extreme_scale_give_the_same_numbers_in_another_unit(exponent: int) -> None:
    step = jax.jit(functools.partial(gm.summarize, statistics=FULL))

    def run(scale: float) -> list[Any]:
        temporal: Any = gm.init_temporal(PARAMS, statistics=FULL)
        found = []
        for number in range(3):
            grads = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32) * np.float32(scale), per_example(number))
            summary, temporal = step(with_directions(grads), temporal)
            found.append(summary)
        return found

    powers = {row.name: row.power for row in catalog.STATISTICS}
    for plain, scaled in zip(run(1.0), run(2.0**exponent), strict=True):
        unit = float(scaled.scalars["unit_exponent"])
        assert unit != 0
        for name, values in plain.columns.items():
            got = np.ldexp(np.asarray(scaled.columns[name], np.float64), int(unit) * powers[name])
            want = np.ldexp(np.asarray(values, np.float64), exponent * powers[name])
            np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)
        for name in ("norm_max", "conflicting_share"):
            got = float(scaled.scalars[name]) * 2.0 ** (unit * powers[name])
            assert got == pytest.approx(float(plain.scalars[name]) * 2.0 ** (exponent * powers[name]), rel=1e-5)


def test_a_unit_may_change_from_step_to_step() -> None:
    step = jax.jit(gm.summarize)
    temporal: Any = gm.init_temporal(PARAMS)
    means = []
    for scale in (1.0, 2.0**50, 2.0**50):
        grads = jax.tree.map(
            lambda leaf, s=scale: np.asarray(leaf, np.float32) * np.float32(s), per_example(len(means))
        )
        means.append(loop_moments(list(np.asarray(grads["c"], np.float64))))
        summary, temporal = step(moments_of(grads), temporal)
    unit = float(summary.scalars["unit_exponent"])
    wanted = 0.5 * ((means[2].mean - means[1].mean) ** 2).sum()
    assert float(summary.columns["step_variance"][1]) * 4.0**unit == pytest.approx(wanted, rel=1e-5)


def test_what_an_adam_makes_of_it_is_shown_where_its_rule_is_told() -> None:
    moments = moments_of(per_example(0))
    grads = jax.tree.map(lambda m: m.mean, moments, is_leaf=lambda leaf: isinstance(leaf, Moments))
    temporal = gm.init_temporal(PARAMS, statistics="full")

    def shown(optimizer: Any, rule: AdamRule | None) -> tuple[Any, Any]:
        opt_state = optimizer.init(PARAMS)
        with jax.numpy_dtype_promotion("standard"):  # optax's own
            for _ in range(8):
                _, opt_state = optimizer.update(grads, opt_state)
            updates, _ = optimizer.update(grads, opt_state)
        step = functools.partial(gm.summarize, statistics="full", opt_state=opt_state, grads=grads, adam=rule)
        return jax.jit(step)(moments, temporal)[0], updates

    told, updates = shown(optax.adam(1e-2), AdamRule(1e-2))
    assert column(told, "step_size")[1] == pytest.approx(float(jnp.mean(jnp.abs(updates["c"]))), rel=1e-5)
    assert "radam_length" not in told.scalars
    told, _ = shown(optax.radam(1e-2), AdamRule(1e-2, threshold=5.0))
    assert float(told.scalars["radam_length"]) == pytest.approx(8.9873, rel=1e-4)  # just under t = 9
    untold, _ = shown(optax.radam(1e-2), None)
    assert np.isnan(column(untold, "step_size")).all()
    assert "radam_length" not in untold.scalars
