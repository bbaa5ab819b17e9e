"""What is kept through time."""

import numpy as np
import pytest
import torch

import gradiometer as gm
from tests.torch_models import case, squared, train
from tests.torch_recording import Recorder, recorder  # noqa: F401 - a fixture

MLP = case("mlp")


def test_state_is_restored_by_name_and_training_goes_on_as_if_it_had_not_stopped(recorder: Recorder) -> None:  # noqa: F811
    published = []
    for interrupted in (False, True):
        recorder.steps.clear()
        recorder.scalars.clear()
        model = MLP.make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        collector = gm.attach(model, optimizer)
        train(model, optimizer, 3)
        if interrupted:
            state = collector.state_dict()
            collector.detach()
            collector = gm.attach(model, optimizer)
            collector.load_state_dict(state)
            assert collector.step == 3
        x, y = MLP.draw(4, seed=7)
        optimizer.zero_grad()
        squared(model(x), y).mean().backward()
        optimizer.step()
        collector.detach()
        published.append((recorder.steps[3], recorder.scalars[3]["clock_steps"]))
    (columns, clock), (columns_after, clock_after) = published
    assert clock == clock_after
    for name, column in columns.items():
        np.testing.assert_array_equal(column, columns_after[name], err_msg=name)


def test_state_of_another_model_is_refused() -> None:
    model = MLP.make()
    with gm.attach(model, endpoint="off") as collector:
        state = collector.state_dict()
        state["temporal"]["0.weight"] = {part: torch.zeros(2, 2) for part in ("u", "s", "w")}
        with pytest.raises(
            ValueError, match=r"needs the state of this model, got parameter='0.weight' of shape \(2, 2\)"
        ):
            collector.load_state_dict(state)


def test_own_state_survives_a_step_that_is_not_a_number(recorder: Recorder) -> None:  # noqa: F811
    model = MLP.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gm.attach(model, optimizer):
        for step in range(5):
            x, y = MLP.draw(4, seed=step)
            if step == 2:
                y[0, 0] = float("nan")
            optimizer.zero_grad()
            squared(model(x), y).mean().backward()
            for parameter in model.parameters():
                parameter.grad.nan_to_num_(nan=0.0)  # as a careful user would
            optimizer.step()
    assert recorder.steps[2]["nonfinite_examples"].tolist() == [1, 1, 1]
    assert np.isfinite(recorder.steps[4]["temporal_variance"]).all()
    assert np.isfinite(recorder.steps[4]["step_variance"]).all()
