"""JAX, through the whole pipe: model, collector, gRPC, journal, query; against the float64 loop."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradiometer as gm
from gradiometer.demo.jax_digits import DigitNet, digits
from gradiometer.optimizers.optax_api import madam
from gradiometer.server.remote import RemoteStore
from gradiometer.server.report import report
from tests.reference import loop_layer, loop_moments
from tests.server_process import eventually, running_server

BATCH = 6


def named(tree: object) -> dict[str, np.ndarray]:
    """Leaves by their dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(key.key) for key in path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def test_what_the_store_holds_is_what_the_float64_loop_finds(tmp_path: Path) -> None:
    images, labels = digits()
    model = DigitNet(width=4)
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    optimizer = madam(1e-3)

    def loss_fn(params: optax.Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = model.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    measured = gm.value_and_grad(loss_fn)

    @jax.jit
    def step(params, opt_state, temporal, batch):  # type: ignore[no-untyped-def]
        loss, grads, moments = measured(params, batch)
        summary, temporal = gm.summarize(moments, temporal, opt_state=opt_state)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, temporal, summary, loss

    truth: list[dict[str, list[np.ndarray]]] = []
    opt_state, temporal = optimizer.init(params), gm.init_temporal(params)
    with running_server(tmp_path / "data") as server, RemoteStore(server.grpc) as store:
        with gm.Publisher("recorded", server.grpc, params=params) as publisher:
            for number in range(3):
                rows = slice(number * BATCH, (number + 1) * BATCH)
                batch = (images[rows], labels[rows])
                truth.append(loop_grads(loss_fn, params, batch))
                params, opt_state, temporal, summary, loss = step(params, opt_state, temporal, batch)
                publisher.record(number, summary, loss=loss)
        eventually(lambda: [s.stored_steps for s in store.list_runs()] == [3])
        (run,) = report(store, "recorded")
    assert run.steps.tolist() == [0, 1, 2]
    assert np.isfinite(run.scalars["loss"]).all()
    assert [layer.name for layer in run.status.run.layers][:1] != []
    previous: dict[str, list[np.ndarray]] = {}
    for index, grads in enumerate(truth):
        for column, layer in enumerate(run.status.run.layers):
            parts = [grads[name] for name in layer.parameters]
            want = loop_layer(parts)
            for name, value in want.items():
                got = float(run.columns[name][index, column])
                assert got == pytest.approx(value, rel=5e-5, abs=2e-5 * want["sq_norm_mean"]), (layer.name, name)
            means = [loop_moments(part).mean for part in parts]
            if index:
                pairs = zip(means, previous[layer.name], strict=True)
                change = sum(0.5 * float(((now - before) ** 2).sum()) for now, before in pairs)
                assert float(run.columns["step_variance"][index, column]) == pytest.approx(change, rel=1e-4)
            previous[layer.name] = means
    assert np.isnan(run.columns["step_variance"][0]).all()
    assert (run.columns["temporal_variance"][1:] > 0).all()


def loop_grads(loss_fn, params, batch) -> dict[str, list[np.ndarray]]:  # type: ignore[no-untyped-def]
    """Gradients of each row alone, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        found: dict[str, list[np.ndarray]] = {name: [] for name in named(params)}
        for row in range(len(batch[1])):
            one = (jnp.asarray(batch[0][row : row + 1], jnp.float64), jnp.asarray(batch[1][row : row + 1]))
            for name, grad in named(jax.grad(loss_fn)(wide, one)).items():
                found[name].append(grad)
    return found
