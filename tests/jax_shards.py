"""Run as a script on two CPU devices: value_and_grad inside shard_map and pmap; writes what it finds to a file."""

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gradiometer as gm
from gradiometer.stats_core import Moments

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
Y = np.arange(8, dtype=np.float32)
WEIGHTS = np.array([1, 2, 0, 4, 1, 0, 3, 1], np.float32)
PADDED = np.array([1, 2, 1, 4, 0, 0, 0, 0], np.float32)  # the second shard is nothing but padding
PARAMS = {"a": {"w": np.array([0.5, -1.0, 2.0], np.float32)}, "b": np.float32(0.25) * np.ones((), np.float32)}
CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "chunks": {"microbatch_size": 3},
    "sum": {"loss_reduction": "sum"},
    "weights": {"weights_argnum": 2},
    "padding": {"weights_argnum": 2},
}


def loss_fn(reduction: str, params: Any, batch: Any, weights: Any) -> jax.Array:
    x, y = batch
    losses = weights * (jnp.tanh(x @ params["a"]["w"]) * params["b"] - y) ** 2
    return jnp.sum(losses) / (1.0 if reduction == "sum" else jnp.sum(weights))


def function(case: str, **more: Any) -> Any:
    options = {"statistics": "full", **CASES[case]}
    return gm.value_and_grad(functools.partial(loss_fn, options.get("loss_reduction", "mean")), **(options | more))


def arguments(case: str) -> tuple[Any, ...]:
    return PARAMS, (X, Y), {"weights": WEIGHTS, "padding": PADDED}.get(case, np.ones(8, np.float32))


def sharded_moments(case: str) -> Moments:
    dots = None if case == "chunks" else P("data")
    return Moments(P(), P(), P(), P(), P(), P("data"), P("data"), dots, P())


def found_in_shard_map(case: str, mesh: Mesh, *, check_vma: bool, measure: bool) -> dict[str, np.ndarray]:
    fn = function(case, axis_name="data")
    if case not in ("weights", "padding"):  # a mean of its own over ones, on each shard
        fn = function(case, axis_name="data", batch_argnums=(1, 2))

    def step(params: Any, temporal: Any, batch: Any, weights: Any, flag: Any) -> Any:
        value, grads, moments = fn(params, batch, weights, measure=flag)
        summary, temporal = gm.summarize(moments, temporal, axis_name="data")
        return value, grads, moments, summary, temporal

    replicated_moments = jax.tree.map(lambda _: sharded_moments(case), PARAMS)
    specs = (P(), P(), P("data"), P("data"), P())
    sharded = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=specs, out_specs=(P(), P(), replicated_moments, P(), P()), check_vma=check_vma
        )
    )
    params, batch, weights = arguments(case)
    value, grads, moments, summary, _ = sharded(params, gm.init_temporal(params), batch, weights, measure)
    return flat(value, grads, moments) | {
        f"column {name}": np.asarray(column) for name, column in summary.columns.items()
    }


def flat(value: Any, grads: Any, moments: Any) -> dict[str, np.ndarray]:
    found = {"value": np.asarray(value)}
    for name, grad, one in (("w", grads["a"]["w"], moments["a"]["w"]), ("b", grads["b"], moments["b"])):
        found[f"grad {name}"] = np.asarray(grad)
        for field, value in one._asdict().items():
            if value is not None:
                found[f"{field} {name}"] = np.asarray(value)
    return found


def found_in_pmap() -> dict[str, np.ndarray]:
    fn = function("weights", axis_name="data")
    params, (x, y), weights = arguments("weights")
    halves = ((x.reshape(2, 4, 3), y.reshape(2, 4)), weights.reshape(2, 4))
    value, grads, moments = jax.pmap(fn, axis_name="data", in_axes=(None, 0, 0))(params, *halves)
    first = flat(*jax.tree.map(lambda leaf: leaf[0], (value, grads, moments)))
    local = flat(value, grads, moments)
    own = ("sq_norms", "weights", "dots")
    return {name: local[name].reshape(-1) if name.startswith(own) else first[name] for name in first}


def found_under_jit(mesh: Mesh) -> dict[str, np.ndarray]:
    params, batch, weights = arguments("weights")
    batch, weights = jax.device_put((batch, weights), NamedSharding(mesh, P("data")))
    return flat(*jax.jit(function("weights"))(params, batch, weights))


def main(path: Path) -> None:
    assert jax.device_count() == 2
    mesh = Mesh(np.array(jax.devices()), ("data",))
    found = {"pmap": found_in_pmap(), "jit": found_under_jit(mesh)}
    for case in CASES:
        for check_vma in (True, False):
            found[f"{case} {check_vma}"] = found_in_shard_map(case, mesh, check_vma=check_vma, measure=True)
    found["unmeasured"] = found_in_shard_map("weights", mesh, check_vma=True, measure=False)
    np.savez(path, **{f"{case}/{name}": array for case, arrays in found.items() for name, array in arrays.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
