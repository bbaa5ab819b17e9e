"""Layers of a module tree."""

from torch import nn

from gradiometer.collectors.torch_layers import coverage_of, layers_of
from tests.torch_models import GPT, RawParameter, case


def test_layers_are_modules_in_the_models_order_and_tied_parameters_belong_to_their_first_name() -> None:
    model = GPT(tied=True)
    layers = layers_of(model, list(model.parameters()))
    assert [layer.message.name for layer in layers] == [
        "tokens", "positions", "norm1", "attention.qkv", "attention.out", "norm2", "mlp.0", "mlp.2",
    ]  # fmt: skip
    assert sum(layer.message.num_params for layer in layers) == sum(p.numel() for p in model.parameters())
    qkv = layers[3]
    assert list(qkv.message.parameters) == ["attention.qkv.weight", "attention.qkv.bias"]
    assert qkv.parameters == (model.attention.qkv.weight, model.attention.qkv.bias)
    assert (qkv.message.kind, qkv.message.dtype) == ("Linear", "float32")


def test_a_parameter_of_the_model_itself_is_a_layer_of_its_own() -> None:
    model = RawParameter()
    layers = layers_of(model, list(model.parameters()))
    assert [(layer.message.name, layer.message.kind) for layer in layers] == [
        ("scale", "Parameter"),
        ("last", "Linear"),
    ]


def test_only_wanted_parameters_are_in_a_layer() -> None:
    model = nn.Linear(2, 3)
    (layer,) = layers_of(model, [model.bias])
    assert (layer.message.name, list(layer.message.parameters), layer.message.num_params) == ("bias", ["bias"], 3)


def test_coverage_counts_trained_elements_and_names_the_rest() -> None:
    model = case("partly-frozen").make()
    known = {p: name for name, p in model.named_parameters() if p.requires_grad}
    coverage = coverage_of(model, known, {model[4].bias: "a reason"})
    assert coverage.num_params == 36 + 18 + 3
    assert coverage.num_params_measured == 36 + 18
    assert [(u.parameter, u.num_params, u.reason) for u in coverage.uncovered] == [("4.bias", 3, "a reason")]
