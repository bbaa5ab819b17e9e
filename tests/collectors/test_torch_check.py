"""First sight: rows that are no batch, and examples that do not add up."""

import torch
from torch import nn

import gradiometer as gm
from tests.torch_models import (
    Case,
    OnlyLoss,
    OwnBatchNorm,
    TimeFirst,
    assert_agrees,
    case,
    reference_moments,
    squared,
    tokens,
)
from tests.torch_recording import Recorder, recorder  # noqa: F401 - a fixture


def test_positions_looked_up_once_are_uncovered_also_where_their_number_is_the_batch_size() -> None:
    chosen = case("gpt")
    model = chosen.make()
    x, y = tokens(7, torch.Generator().manual_seed(1), length=7)
    wanted = reference_moments(chosen, model, x, y)
    with gm.attach(model, endpoint="off") as collector:
        chosen.losses(model(x), y).mean().backward()
        found = collector.moments
        assert set(wanted) - set(found) == {"positions.weight"}
        for name, moments in found.items():
            assert_agrees(moments, wanted[name], 1e-5, name)
        (uncovered,) = collector.coverage.uncovered
        assert "its leading axis of 7 is not the batch" in uncovered.reason


def test_layers_that_work_time_first_are_uncovered_also_where_time_is_as_long_as_the_batch() -> None:
    model = TimeFirst()
    x, y = torch.randn(4, 4, 6), torch.randn(4, 4, 3)
    with gm.attach(model, endpoint="off") as collector:
        squared(model(x), y).mean().backward()
        assert not collector.moments
        assert all("is not the batch" in uncovered.reason for uncovered in collector.coverage.uncovered)


def test_examples_that_depend_on_one_another_are_uncovered() -> None:
    model = OwnBatchNorm()
    x, y = torch.randn(5, 6), torch.randn(5, 3)
    with gm.attach(model, endpoint="off") as collector:
        squared(model(x), y).mean().backward()
        assert set(collector.moments) == {"last.weight", "last.bias"}
        assert all("keep examples apart" in uncovered.reason for uncovered in collector.coverage.uncovered)


def test_a_model_that_returns_only_its_loss_is_measured() -> None:
    model = OnlyLoss()
    x, y = torch.randn(5, 6), torch.randn(5, 3)

    chosen = Case("only-loss", lambda: model, None, lambda output, target: squared(output, target))
    plain = nn.Sequential(model.first, nn.Tanh(), model.last)
    wanted = reference_moments(chosen, plain, x, y)
    with gm.attach(model, endpoint="off") as collector:
        model(x, y).backward()
        found = collector.moments
        for name, there in (("first.weight", "0.weight"), ("last.weight", "2.weight"), ("last.bias", "2.bias")):
            assert_agrees(found[name], wanted[there], 1e-5, name)


def test_layers_that_nothing_flows_through_at_first_are_covered_from_the_step_at_which_something_does() -> None:
    chosen = case("mlp")
    model = chosen.make()
    nn.init.zeros_(model[-1].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = chosen.draw(5)
    with gm.attach(model, optimizer, endpoint="off") as collector:
        chosen.losses(model(x), y).mean().backward()
        assert set(collector.moments) == {"3.weight", "3.bias"}
        assert "not known yet" in collector.coverage.uncovered[0].reason
        optimizer.step()
        optimizer.zero_grad()
        wanted = reference_moments(chosen, model, x, y)
        chosen.losses(model(x), y).mean().backward()
        assert not collector.coverage.uncovered
        for name, moments in collector.moments.items():
            assert_agrees(moments, wanted[name], 1e-5, name)


def test_a_penalty_on_a_weight_in_the_loss_uncovers_that_weight_only() -> None:
    model = case("mlp").make()
    x, y = case("mlp").draw(5)
    with gm.attach(model, endpoint="off") as collector:
        (squared(model(x), y).mean() + 10.0 * model[2].weight.square().sum()).backward()
        assert [uncovered.parameter for uncovered in collector.coverage.uncovered] == ["2.weight"]
        assert "a penalty on it is in the loss" in collector.coverage.uncovered[0].reason
        squared(model(x), y).mean().backward()  # and stays so: it has been seen once
        assert "2.weight" not in collector.moments


def test_gradients_that_are_nothing_but_rounding_are_not_taken_for_sums_that_fail() -> None:
    class KeysWithBias(nn.Module):
        """The bias of the keys adds the same to all scores of a query: softmax takes it out again."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))

    model = KeysWithBias()
    with gm.attach(model, endpoint="off") as collector:
        model(torch.randn(5, 4, 6)).square().sum((1, 2)).mean().backward()
        assert not collector.coverage.uncovered


def test_a_check_that_fails_leaves_its_layers_uncovered_and_the_step_alone() -> None:
    class NoSecondBackward(torch.autograd.Function):
        passes = 0

        @staticmethod
        def forward(_context, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(_context, grad: torch.Tensor) -> torch.Tensor:
            NoSecondBackward.passes += 1
            if NoSecondBackward.passes == 1:
                raise RuntimeError("once is too often")
            return grad

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(NoSecondBackward.apply(self.first(x)))

    model = Model()
    x, y = case("mlp").draw(5)
    with gm.attach(model, endpoint="off") as collector:
        squared(model(x), y).mean().backward()
        assert collector.coverage.uncovered[0].reason.endswith("the check failed with RuntimeError")  # not what it says
        assert not collector.moments
        squared(model(x), y).mean().backward()
        assert not collector.coverage.uncovered


def test_the_check_draws_no_random_number_of_the_users_and_reaches_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    x, y = case("mlp").draw(5)
    seen = []
    model[2].weight.register_hook(lambda grad: seen.append(grad.clone()))
    drawn = []
    for attached in (False, True):
        torch.manual_seed(0)
        collector = gm.attach(model, endpoint="off") if attached else None
        for _ in range(2):
            squared(model(x), y).mean().backward()
        drawn.append(torch.rand(3))
        if collector is not None:
            assert not collector.coverage.uncovered
            collector.detach()
    assert torch.equal(*drawn)
    assert len(seen) == 4
