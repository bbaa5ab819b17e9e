"""Moments over a mapped axis, on two devices (of the CPU, in a process of their own)."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gradiometer as gm
from tests.jax_shards import CASES, PARAMS, WEIGHTS, X, Y, arguments, flat, function

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    path = tmp_path_factory.mktemp("shards") / "found.npz"
    flags = "--xla_force_host_platform_device_count=2 " + os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.jax_shards", str(path)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(path) as arrays:
        return dict(arrays)


@functools.cache
def of_one_device(case: str) -> dict[str, np.ndarray]:
    options = {} if case in ("weights", "padding") else {"batch_argnums": (1, 2)}
    fn = jax.jit(function(case, **options))
    value, grads, moments = fn(*arguments(case))
    summary, _ = jax.jit(gm.summarize)(moments, gm.init_temporal(PARAMS))
    return flat(value, grads, moments) | {
        f"column {name}": np.asarray(column) for name, column in summary.columns.items()
    }


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_shards_of_shard_map_give_what_one_device_gives(found: Any, case: str, check_vma: bool) -> None:
    for name, want in of_one_device(case).items():
        np.testing.assert_allclose(found[f"{case} {check_vma}/{name}"], want, rtol=2e-5, atol=1e-6, err_msg=name)


def test_shards_of_pmap_give_what_one_device_gives(found: Any) -> None:
    for name, want in of_one_device("weights").items():
        if not name.startswith("column"):
            np.testing.assert_allclose(found[f"pmap/{name}"], want, rtol=2e-5, atol=1e-6, err_msg=name)


def test_a_batch_sharded_by_the_compiler_needs_nothing(found: Any) -> None:
    for name, want in of_one_device("weights").items():
        if not name.startswith("column"):
            np.testing.assert_allclose(found[f"jit/{name}"], want, rtol=2e-5, atol=1e-6, err_msg=name)


def test_an_unmeasured_step_has_the_gradient_of_all_shards(found: Any) -> None:
    want = of_one_device("weights")
    for name in ("value", "grad w", "grad b"):
        np.testing.assert_allclose(found[f"unmeasured/{name}"], want[name], rtol=2e-5)
    assert not found["unmeasured/count w"].any()
    assert np.isnan(found["unmeasured/column variance_trace"]).all()


def test_an_axis_of_vmap_is_merged_too() -> None:
    fn = function("weights", axis_name="data")
    halves = ((X.reshape(2, 4, 3), Y.reshape(2, 4)), WEIGHTS.reshape(2, 4))
    _, grads, moments = jax.jit(jax.vmap(fn, in_axes=(None, 0, 0), axis_name="data"))(PARAMS, *halves)
    want = of_one_device("weights")
    for half in range(2):
        np.testing.assert_allclose(grads["a"]["w"][half], want["grad w"], rtol=2e-5)
        np.testing.assert_allclose(moments["a"]["w"].m2[half], want["m2 w"], rtol=2e-5)


def test_shards_that_are_given_one_key_draw_other_masks() -> None:
    def loss_fn(params: Any, x: Any, key: jax.Array) -> jax.Array:
        return (x * jax.random.normal(key, x.shape)).mean() * params

    fn = gm.value_and_grad(loss_fn, rng_argnums=2, axis_name="data")
    x = np.ones((2, 4, 1), np.float32)
    run = jax.jit(jax.vmap(fn, in_axes=(None, 0, None), axis_name="data"))
    _, _, moments = run(np.float32(1) * np.ones(()), x, jax.random.key(0))
    assert len(set(np.asarray(moments.sq_norms).ravel().tolist())) == 8
