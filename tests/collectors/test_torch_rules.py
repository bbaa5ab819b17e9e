"""Which layers have a sampler that is right, and what is said of the others."""

import numpy as np
import pytest
import torch
from torch import nn

import gradiometer as gm
from gradiometer.collectors.torch_rules import batch_norms, couples, plan_model
from tests.torch_models import Case, assert_agrees, padded_tokens, reference_moments, signals, squared, tokens, vectors


class Doubled(nn.Linear):
    """Computes something else than the class that it is made from."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


class Renamed(nn.Linear):
    """Computes what the class that it is made from computes."""


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.Embedding(5, 4, scale_grad_by_freq=True), "depend on the others of its batch"),
        (nn.Embedding(5, 4, sparse=True), "sparse gradients are not measured"),
        (nn.EmbeddingBag(5, 4), "ignores its weights and modes"),
        (nn.GRU(4, 4), r"use opacus.layers.DPGRU"),
        (nn.MultiheadAttention(4, 2), "by function"),
        (nn.BatchNorm1d(4).eval(), "no sampler, also in eval mode"),
        (nn.Bilinear(4, 4, 4), "no sampler for parameters that Bilinear holds"),
        (nn.ConvTranspose1d(4, 4, 3), "no sampler for parameters that ConvTranspose1d holds"),
        (Doubled(4, 4), "no sampler for parameters that Doubled holds"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_that_no_sampler_takes_apart_rightly_are_refused_with_a_reason(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(layer, nn.Linear(4, 4))
    plan = plan_model(model)
    assert {name for parameter, name in plan.names.items() if parameter not in plan.refused} == {"1.weight", "1.bias"}
    assert plan.refused
    assert all(reason in text for text in plan.refused.values())


def test_a_parameter_is_refused_where_one_of_its_owners_has_no_sampler() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4))
    model[1].weight = model[0].weight
    plan = plan_model(model)
    assert {plan.names[parameter] for parameter in plan.refused} == {"0.weight", "1.bias"}
    assert plan.owners[model[0].weight] == [model[0], model[1]]


@pytest.mark.parametrize(
    "chosen",
    [
        Case("renamed", lambda: nn.Sequential(Renamed(6, 8), nn.Tanh(), Renamed(8, 3)), vectors),
        Case(
            "last-padding-row",
            lambda: nn.Sequential(nn.Embedding(11, 6, padding_idx=-1), nn.Linear(6, 3)),
            padded_tokens,
        ),
        Case(
            "instance-norm",
            lambda: nn.Sequential(
                nn.Conv1d(2, 4, 3, padding="same", dilation=2),
                nn.InstanceNorm1d(4, affine=True),
                nn.Flatten(),
                nn.Linear(36, 3),
            ),
            signals,
        ),
        Case(
            "norms",
            lambda: nn.Sequential(nn.LayerNorm(6, bias=False), nn.Tanh(), nn.RMSNorm(6), nn.Linear(6, 3)),
            vectors,
        ),
    ],
    ids=lambda chosen: chosen.name,
)
def test_layers_at_the_edge_of_a_sampler_equal_the_loop(chosen: Case) -> None:
    model = chosen.make(torch.float64)
    x, y = chosen.draw(5, torch.float64)
    wanted = reference_moments(chosen, model, x, y)
    with gm.attach(model, endpoint="off") as collector:
        squared(model(x), y).mean().backward()
        found = collector.moments
    assert set(found) == set(wanted)
    for name, moments in found.items():
        if np.linalg.norm(wanted[name].mean) < 1e-12:  # a bias before a norm: nothing but rounding
            assert moments.mean.norm() < 1e-12
        else:
            assert_agrees(moments, wanted[name], 1e-12, name)


def test_one_index_a_row_is_a_batch_of_indices() -> None:
    chosen = Case("labels", lambda: nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 3)), tokens)
    model = chosen.make(torch.float64)
    x, y = torch.tensor([3, 3, 1, 7]), torch.randn(4, 3, dtype=torch.float64)
    wanted = reference_moments(chosen, model, x, y)
    with gm.attach(model, endpoint="off") as collector:
        squared(model(x), y).mean().backward()
        for name, moments in collector.moments.items():
            assert_agrees(moments, wanted[name], 1e-12, name)
        assert set(collector.moments) == set(wanted)


def test_modules_that_normalise_over_the_batch_are_told_from_those_that_do_not() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.SyncBatchNorm(3).eval(), nn.InstanceNorm1d(3))
    assert [(name, couples(module)) for name, module in batch_norms(model)] == [("0", True), ("2", False)]


def test_modules_of_a_sequence_first_transformer_are_refused_by_name() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False)
    plan = plan_model(nn.ModuleDict({"block": layer, "head": nn.Linear(8, 2)}))
    refused = {plan.names[parameter]: reason for parameter, reason in plan.refused.items()}
    assert "batch_first=True" in refused["block.linear1.weight"]
    assert "batch_first=True" in refused["block.norm2.bias"]
    assert not any(name.startswith("head") for name in refused)
    first = plan_model(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert "linear1.weight" not in {first.names[parameter] for parameter in first.refused}
