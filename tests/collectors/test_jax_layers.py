from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradiometer as gm
from gradiometer.collectors.jax_layers import layers_of
from tests.jax_models import MODELS


def names(params: Any) -> list[tuple[str, list[str]]]:
    return [(layer.name, list(layer.parameters)) for layer in layers_of(params)]


def test_a_layer_is_what_shares_a_path_but_for_the_last_key() -> None:
    assert names(MODELS["cnn with GroupNorm"].params) == [
        ("params.Conv_0", ["params.Conv_0.bias", "params.Conv_0.kernel"]),
        ("params.Dense_0", ["params.Dense_0.bias", "params.Dense_0.kernel"]),
        ("params.GroupNorm_0", ["params.GroupNorm_0.bias", "params.GroupNorm_0.scale"]),
    ]


def test_an_nnx_state_has_the_paths_that_users_typed() -> None:
    assert names(MODELS["nnx mlp"].params) == [
        ("hidden", ["hidden.bias", "hidden.kernel"]),
        ("norm", ["norm.bias", "norm.scale"]),
        ("out", ["out.bias", "out.kernel"]),
    ]


def test_a_leaf_at_the_top_is_its_own_layer() -> None:
    params = {"w": jnp.ones((2, 3)), "block": [{"w": jnp.ones(4)}, {"w": jnp.ones(5, jnp.bfloat16)}]}
    layers = layers_of(params)
    assert [(layer.name, layer.num_params, layer.dtype) for layer in layers] == [
        ("block.0", 4, "float32"),
        ("block.1", 5, "bfloat16"),
        ("w", 6, "float32"),
    ]
    assert names((jnp.ones(2), jnp.ones(3))) == [("0", ["0"]), ("1", ["1"])]
    assert names(jnp.ones(2)) == [("params", ["params"])]


def test_what_is_not_trained_is_no_layer() -> None:
    assert names({"steps": np.array(3), "key": jax.random.key(0), "none": None, "w": np.ones(2)}) == [("w", ["w"])]


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_moments_have_the_layers_of_their_parameters(name: str) -> None:
    model = MODELS[name]
    want = layers_of(model.params)
    assert layers_of(jax.eval_shape(lambda tree: tree, model.params)) == want
    _, _, moments = jax.eval_shape(gm.value_and_grad(model.loss_fn), model.params, model.batch)
    assert layers_of(moments) == want


def test_parameters_without_a_gradient_are_refused() -> None:
    with pytest.raises(ValueError, match="needs params with a floating-point leaf, got none; pass the trained"):
        layers_of({"steps": np.array(3)})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a.b": {"w": np.ones(1)}, "a": {"b": {"w": np.ones(1)}}}, "layers of unique names, got layer='a.b' twice"),
        ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, "parameters of unique names, got parameter='a.b' twice"),
    ],
)
def test_two_of_one_name_are_refused(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers_of(params)
