"""What was done to the loss of a step, undone."""

import numpy as np
import torch

import gradiometer as gm
from tests.reference import relative_error
from tests.torch_models import (
    assert_agrees,
    case,
    reference_moments,
    squared,
)
from tests.torch_recording import Recorder, recorder  # noqa: F401 - a fixture


def test_a_sum_over_examples_is_undone() -> None:
    chosen = case("cnn")
    model = chosen.make(torch.float64)
    x, y = chosen.draw(4, torch.float64)
    wanted = reference_moments(chosen, model, x, y)
    with gm.attach(model, endpoint="off", loss_reduction="sum") as collector:
        chosen.losses(model(x), y).sum().backward()
        for name, moments in collector.moments.items():
            assert_agrees(moments, wanted[name], 1e-12, name)
        assert len(collector.moments) == len(wanted)


def test_weights_are_undone_over_the_whole_step() -> None:
    chosen = case("gpt-positions-per-row")
    model = chosen.make(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = chosen.draw(6, torch.float64)
    weights = torch.tensor([1.0, 7.0, 3.0, 2.0, 0.0, 5.0], dtype=torch.float64)
    wanted = reference_moments(chosen, model, x, y, weights)
    wanted_norms = {name: np.where(weights.numpy() == 0, 0, moments.sq_norms) for name, moments in wanted.items()}
    with gm.attach(model, optimizer, endpoint="off", loss_reduction="weighted") as collector:
        for rows in (slice(0, 4), slice(4, 6)):
            with collector.batch(weights=weights[rows]):
                ((chosen.losses(model(x[rows]), y[rows]) * weights[rows]).sum() / weights.sum()).backward()
        for name, moments in collector.moments.items():
            # An example of weight 0 leaves no gradient behind.
            wanted[name].sq_norms = wanted_norms[name]
            assert_agrees(moments, wanted[name], 1e-12, name)
            assert relative_error(moments.mean, dict(model.named_parameters())[name].grad) <= 1e-12
        assert len(collector.moments) == len(wanted)


def test_accumulated_passes_give_what_one_pass_gives() -> None:
    chosen = case("cnn")
    model = chosen.make(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = chosen.draw(6, torch.float64)
    wanted = reference_moments(chosen, model, x, y)
    with gm.attach(model, optimizer, endpoint="off") as collector:
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
            (chosen.losses(model(x[rows]), y[rows]).mean() / 3).backward()
        for name, moments in collector.moments.items():
            assert_agrees(moments, wanted[name], 1e-12, name)
        assert len(collector.moments) == len(wanted)


def test_examples_of_a_small_pass_weigh_as_much_as_they_do_in_the_gradient() -> None:
    chosen = case("mlp")
    model = chosen.make(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = chosen.draw(6, torch.float64)
    wanted = reference_moments(chosen, model, x, y, torch.tensor([1.0] * 4 + [2.0] * 2))
    with gm.attach(model, optimizer, endpoint="off") as collector:
        for rows in (slice(0, 4), slice(4, 6)):
            (chosen.losses(model(x[rows]), y[rows]).mean() / 2).backward()
        for name, parameter in model.named_parameters():
            assert_agrees(collector.moments[name], wanted[name], 1e-12, name)
            assert relative_error(collector.moments[name].mean, parameter.grad) <= 1e-12


def test_a_loss_scale_that_is_said_is_divided_out(recorder: Recorder) -> None:  # noqa: F811
    model = case("mlp").make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = case("mlp").draw(4)
    wanted = reference_moments(case("mlp"), model, x, y)
    with gm.attach(model, optimizer) as collector:
        (squared(model(x), y).mean() * 1024).backward()
        collector.log(loss_scale=torch.tensor(1024.0))
        for name, moments in collector.moments.items():
            assert relative_error(moments.mean, wanted[name].mean) < 1e-5
            assert relative_error(moments.m2, wanted[name].m2) < 1e-5
        optimizer.step()
    assert recorder.run.loss.loss_scale_undone
    assert recorder.scalars[0]["loss_scale"] == 1024
