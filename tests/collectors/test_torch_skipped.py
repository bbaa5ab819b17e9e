"""Steps that are not taken, in loops that clear the gradients between the forward and the backward pass."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gradiometer as gm
from gradiometer.collectors.torch_collector import TorchCollector
from tests.reference import relative_error
from tests.torch_models import case, squared
from tests.torch_recording import Recorder, recorder  # noqa: F401 - a fixture

MLP = case("mlp")


def start() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = MLP.make()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def cleared_between(
    model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, *, set_to_none: bool = True
) -> torch.Tensor:
    x, y = MLP.draw(6, seed=seed)
    loss = squared(model(x), y).mean()
    optimizer.zero_grad(set_to_none=set_to_none)
    loss.backward()
    return loss


def assert_of_one_pass(collector: TorchCollector, model: nn.Module, passes: int = 1) -> None:
    for name, parameter in model.named_parameters():
        moments = collector.moments[name]
        assert moments.count == 6 * passes
        # The loss of a pass was not divided by their number here.
        assert relative_error(moments.mean, parameter.grad) < 1e-5


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_the_user_leaves_out_is_closed_as_skipped(
    recorder: Recorder,  # noqa: F811
    set_to_none: bool,
) -> None:
    model, optimizer = start()
    with gm.attach(model, optimizer) as collector:
        for number in range(6):
            loss = cleared_between(model, optimizer, number, set_to_none=set_to_none)
            assert collector.step == number
            assert_of_one_pass(collector, model)
            collector.log(loss=loss)
            if number not in (2, 3):
                optimizer.step()
    assert list(recorder.steps) == list(range(6))
    assert [recorder.scalars[step]["skipped"] for step in range(6)] == [0, 0, 1, 1, 0, 0]
    assert all(recorder.scalars[step]["examples"] == 6 for step in range(6))


def test_a_step_that_a_grad_scaler_skips_is_closed_as_skipped(recorder: Recorder) -> None:  # noqa: F811
    model, optimizer = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with gm.attach(model, optimizer) as collector:
        for number in range(4):
            x, y = MLP.draw(6, seed=number)
            if number == 1:
                y[0, 0] = float("inf")
            loss = squared(model(x), y).mean()
            collector.log(loss_scale=scaler.get_scale())  # before the backward pass shows that the step is a new one
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if number != 1:
                assert_of_one_pass(collector, model)
            scaler.step(optimizer)
            scaler.update()
    assert [recorder.scalars[step]["skipped"] for step in range(4)] == [0, 1, 0, 0]


def test_an_exception_between_the_backward_pass_and_the_step_leaves_the_pass_out() -> None:
    model, optimizer = start()
    with gm.attach(model, optimizer, endpoint="off") as collector:
        for number in range(4):
            try:
                cleared_between(model, optimizer, number)
                if number == 1:
                    raise KeyError(number)
                assert_of_one_pass(collector, model)
                optimizer.step()
            except KeyError:
                continue


def test_a_closure_that_clears_between_is_the_step_of_its_last_evaluation() -> None:
    model = MLP.make()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)

    with gm.attach(model, optimizer, endpoint="off") as collector:
        for number in range(2):
            closure: Callable[[], torch.Tensor] = lambda seed=number: cleared_between(model, optimizer, seed)  # noqa: E731
            optimizer.step(closure)
            assert collector.step == number + 1
            assert_of_one_pass(collector, model)


def test_passes_that_were_begun_in_a_step_that_is_closed_late_belong_to_the_next() -> None:
    model, optimizer = start()
    with gm.attach(model, optimizer, endpoint="off") as collector:
        cleared_between(model, optimizer, 0)  # and no step
        losses = [squared(model(x), y).mean() / 2 for x, y in (MLP.draw(6, seed=1), MLP.draw(6, seed=2))]
        optimizer.zero_grad()
        for loss in losses:
            loss.backward()
        assert collector.step == 1
        assert_of_one_pass(collector, model, passes=2)
        optimizer.step()
        assert collector.step == 2


@pytest.mark.parametrize("clip", [False, True])
def test_gradients_that_were_not_cleared_are_accumulated(clip: bool) -> None:
    model, optimizer = start()
    with gm.attach(model, optimizer, endpoint="off") as collector:
        for number in range(2):
            for seed in range(3):
                x, y = MLP.draw(6, seed=seed)
                loss = squared(model(x), y).mean() / 3
                if seed == 0:
                    optimizer.zero_grad()
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            assert collector.step == number
            assert collector.moments["0.weight"].count == 18
            optimizer.step()
