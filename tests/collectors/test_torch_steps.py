"""When a step begins and ends, what it is made of, and that nothing of ours reaches the user's step."""

import logging

import pytest
import torch
from torch import nn

import gradiometer as gm
from gradiometer.collectors import torch_engine
from gradiometer.optimizers.torch_api import MAdam
from tests.reference import relative_error
from tests.torch_models import Case, Checkpointed, FunctionalUse, case, reference_moments, squared
from tests.torch_recording import Recorder, recorder  # noqa: F401 - a fixture

MLP = case("mlp")


def start(lr: float = 0.1) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = MLP.make()
    return model, torch.optim.SGD(model.parameters(), lr=lr)


def backward(model: nn.Module, seed: int = 1, batch: int = 4) -> None:
    x, y = MLP.draw(batch, seed=seed)
    squared(model(x), y).mean().backward()


def test_steps_0_k_2k_are_measured_and_their_moments_live_until_the_next_steps_first_forward(
    recorder: Recorder,  # noqa: F811
) -> None:
    model, optimizer = start()
    with gm.attach(model, optimizer, every=3) as collector:
        for step in range(7):
            assert collector.step == step
            optimizer.zero_grad()
            x, y = MLP.draw(4, seed=step)
            loss = squared(model(x), y).mean()
            assert not collector.moments
            loss.backward()
            assert bool(collector.moments) == (step % 3 == 0)
            optimizer.step()
            assert bool(collector.moments) == (step % 3 == 0)
            collector.log(loss=loss)
            with torch.no_grad():
                model(x)
            assert bool(collector.moments) == (step % 3 == 0)
    assert list(recorder.steps) == [0, 3, 6]
    assert recorder.scalars[3]["clock_steps"] == 3
    assert "clock_steps" not in recorder.scalars[0]
    assert all("loss" in scalars for scalars in recorder.scalars.values())


def test_without_an_optimizer_so_many_backward_passes_are_a_step(recorder: Recorder) -> None:  # noqa: F811
    model = MLP.make()
    with gm.attach(model, accumulation=2) as collector:
        for number in range(6):
            x, y = MLP.draw(4, seed=number)
            (squared(model(x), y).mean() / 2).backward()
            assert collector.step == (number + 1) // 2
            assert collector.moments["0.weight"].count == (8 if number % 2 else 4)
    assert list(recorder.steps) == [0, 1, 2]
    assert recorder.steps[1]["count"].tolist() == [8, 8, 8]


def test_forwards_in_eval_mode_or_without_gradients_are_ignored(recorder: Recorder) -> None:  # noqa: F811
    model, optimizer = start()
    x, y = MLP.draw(4)
    with gm.attach(model, optimizer) as collector:
        model.eval()
        squared(model(x), y).mean().backward()
        model.train()
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
        assert collector.moments == {}
        optimizer.zero_grad()
        backward(model)
        with torch.no_grad():  # between backward and step
            model(x[:2])
        assert collector.moments["0.weight"].count == 4
        optimizer.step()
    assert list(recorder.steps) == [0]


def test_a_forward_without_a_backward_leaves_the_step_as_it_was() -> None:
    model, optimizer = start()
    x, y = MLP.draw(4)
    wanted = reference_moments(MLP, model, x, y)
    with gm.attach(model, optimizer, endpoint="off") as collector:
        model(MLP.draw(3, seed=9)[0])
        backward(model)
        model(MLP.draw(3, seed=9)[0])
        assert relative_error(collector.moments["0.weight"].m2, wanted["0.weight"].m2) < 1e-5
        assert collector.moments["0.weight"].count == 4
        optimizer.step()


def test_an_exception_in_the_users_forward_is_the_users_and_the_next_step_is_measured() -> None:
    class Raises(nn.Sequential):
        fails = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            if self.fails:
                raise KeyError("the user's own")
            return out

    model = Raises(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = MLP.draw(4)
    with gm.attach(model, optimizer, endpoint="off") as collector:
        with pytest.raises(KeyError, match="the user's own"):
            model(x)
        model[0](x).sum().backward()  # a part alone, outside of the model
        optimizer.zero_grad()
        model.fails = False
        wanted = reference_moments(Case("raises", None, None), model, x, y)
        squared(model(x), y).mean().backward()
        for name, moments in collector.moments.items():
            assert relative_error(moments.m2, wanted[name].m2) < 1e-5
        assert len(collector.moments) == 4


def test_an_error_of_ours_turns_the_collector_off_is_said_once_and_does_not_reach_the_step(
    monkeypatch: pytest.MonkeyPatch,
    recorder: Recorder,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, optimizer = start()
    collector = gm.attach(model, optimizer)
    backward(model)
    optimizer.step()

    def broken(*_args, **_kwargs):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(torch_engine.Engine, "_sample", broken)
    with caplog.at_level(logging.WARNING, "gradiometer"):
        for seed in range(3):
            backward(model, seed)
            optimizer.step()
    assert collector.moments == {}
    said = [record for record in caplog.records if "turned itself off" in record.message]
    assert len(said) == 1
    assert ("collector-off", "RuntimeError") in recorder.events  # what it says may hold values: it stays in the log
    assert collector.coverage.num_params_measured == 0
    assert "turned itself off: RuntimeError" in collector.coverage.uncovered[0].reason
    assert not model._forward_hooks
    collector.detach()


def test_batch_norm_that_starts_training_later_turns_the_collector_off(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    model[1].eval()
    x, y = MLP.draw(4)
    collector = gm.attach(model, endpoint="off")
    squared(model(x), y).mean().backward()
    assert collector.moments
    model.train()
    squared(model(x), y).mean().backward()
    squared(model(x), y).mean().backward()
    assert collector.moments == {}
    (said,) = [record.message for record in caplog.records if "turned itself off" in record.message]
    assert said.endswith("1 normalises over the batch, so that no example has a gradient of its own")
    collector.detach()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_a_grad_scaler_skips_is_closed_as_skipped(
    recorder: Recorder,  # noqa: F811
    set_to_none: bool,
) -> None:
    model, optimizer = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with gm.attach(model, optimizer) as collector:
        for number in range(4):
            x, y = MLP.draw(4, seed=number)
            if number == 1:
                y[0, 0] = float("inf")
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = squared(model(x), y).mean()
            scaler.scale(loss).backward()
            collector.log(loss_scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
    assert list(recorder.steps) == [0, 1, 2, 3]
    assert [recorder.scalars[step]["skipped"] for step in range(4)] == [0, 1, 0, 0]
    assert recorder.steps[1]["nonfinite_examples"].tolist() == [1, 1, 1]
    # What is kept through time did not take the skipped step in.
    assert all(torch.isfinite(torch.tensor(recorder.steps[3]["temporal_variance"])))


def test_a_closure_is_measured_at_its_last_evaluation_and_the_optimizers_own_state_is_absent(
    recorder: Recorder,  # noqa: F811
) -> None:
    model = MLP.make()
    optimizer = MAdam(model.parameters(), lr=0.01, variance="per_example")
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = squared(model(MLP.draw(4, seed=len(calls))[0]), MLP.draw(4, seed=len(calls))[1]).mean()
        loss.backward()
        return loss

    with gm.attach(model, optimizer):
        for _ in range(3):
            optimizer.step(closure)
            assert optimizer.moments_missing == 0
    assert list(recorder.steps) == [0, 1, 2]
    assert all(value != value for value in recorder.steps[2]["temporal_variance"])
    assert all(recorder.steps[2]["step_variance"] > 0)
    assert all(recorder.steps[2]["batch_variance"] > 0)


def test_lbfgs_that_evaluates_its_closure_many_times_is_one_step_of_the_last_evaluation() -> None:
    model = MLP.make()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    x, y = MLP.draw(4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = squared(model(x), y).mean()
        loss.backward()
        return loss

    with gm.attach(model, optimizer, endpoint="off") as collector:
        optimizer.step(closure)
        assert collector.step == 1
        assert collector.moments["0.weight"].count == 4
        assert relative_error(collector.moments["0.weight"].mean, model[0].weight.grad) < 1e-5


@pytest.mark.parametrize(
    "use", ["two forwards, one backward", "two backwards through one forward"], ids=lambda use: use.replace(" ", "-")
)
def test_passes_that_have_no_single_reading_spoil_their_step_and_no_other(
    use: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = start()
    x, y = MLP.draw(4)
    with gm.attach(model, optimizer, endpoint="off") as collector:
        for _ in range(2):
            loss = squared(model(x), y).mean()
            if use == "two forwards, one backward":
                (loss + squared(model(x + 1), y).mean()).backward()
            else:
                loss.backward(retain_graph=True)
                loss.backward()
            assert collector.moments == {}
            assert collector.coverage.num_params_measured == 0
            optimizer.step()
            optimizer.zero_grad()
            backward(model)
            assert collector.moments["0.weight"].count == 4
            assert collector.coverage.num_params_measured == collector.coverage.num_params
            optimizer.step()
            optimizer.zero_grad()
    assert sum("is not measured" in record.message for record in caplog.records) == 1


def test_a_gradient_penalty_spoils_the_step() -> None:
    model, optimizer = start()
    x, y = MLP.draw(4)
    x.requires_grad_()
    with gm.attach(model, optimizer, endpoint="off") as collector:
        output = model(x)
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        (squared(output, y).mean() + slope.square().mean()).backward()
        assert collector.moments == {}
        optimizer.step()


def test_a_reentrant_checkpoint_is_measured_around_or_not_at_all() -> None:
    model = Checkpointed(reentrant=True)
    x, y = MLP.draw(4)
    with gm.attach(model, endpoint="off") as collector:
        squared(model(x), y).mean().backward()
        reasons = {uncovered.parameter: uncovered.reason for uncovered in collector.coverage.uncovered}
        assert {"block.0.weight", "block.2.bias"} <= set(reasons)
        assert "reentrant checkpoint" in reasons["block.0.weight"]
        assert set(collector.moments).isdisjoint(reasons)


def test_paused_passes_are_not_measured_and_their_steps_are_counted(
    recorder: Recorder,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, optimizer = start()
    with gm.attach(model, optimizer) as collector:
        backward(model)
        with collector.paused():
            backward(model, batch=3)
        assert collector.moments["0.weight"].count == 4
        optimizer.step()
        with collector.paused():
            backward(model)
            optimizer.step()
        assert collector.step == 2
        backward(model)
        optimizer.step()
        assert not caplog.records  # a pause that was asked for is nothing to warn of
        optimizer.step()
    assert list(recorder.steps) == [0, 2]
    assert ["no forward pass" in record.message for record in caplog.records] == [True]


def test_a_batch_of_one_example_has_no_variance_and_says_so_once(
    recorder: Recorder,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, optimizer = start()
    with gm.attach(model, optimizer):
        for seed in range(3):
            backward(model, seed, batch=1)
            optimizer.step()
    assert sum("a batch of one example" in record.message for record in caplog.records) == 1
    for step in range(3):
        columns = recorder.steps[step]
        assert columns["count"].tolist() == [1, 1, 1]
        assert all(columns["mean_sq_norm"] > 0)
        for name in ("variance_trace", "batch_variance", "grad_sq_norm", "step_variance_expected"):
            assert all(value != value for value in columns[name])


def test_examples_that_are_not_numbers_are_counted_and_nothing_raises(recorder: Recorder) -> None:  # noqa: F811
    model, optimizer = start()
    optimizer = MAdam(model.parameters(), lr=1e-3, variance="per_example")
    with gm.attach(model, optimizer):
        for seed in range(3):
            x, y = MLP.draw(4, seed=seed)
            if seed == 1:
                x[2, 0], y[3, 1] = float("nan"), float("inf")
            optimizer.zero_grad()
            squared(model(x), y).mean().backward()
            optimizer.step()
    assert recorder.steps[0]["nonfinite_examples"].tolist() == [0, 0, 0]
    assert recorder.steps[1]["nonfinite_examples"].tolist() == [2, 2, 2]
    assert recorder.steps[2]["nonfinite_examples"].tolist() == [4, 4, 4]  # the parameters themselves are gone


def test_weights_and_ids_that_do_not_fit_are_refused_where_they_are_given() -> None:
    model, optimizer = start()
    with gm.attach(model, optimizer, endpoint="off") as collector:
        with (
            pytest.raises(ValueError, match="needs loss_reduction='weighted' for weights"),
            collector.batch(weights=[1]),
        ):
            pass
        with pytest.raises(ValueError, match="segments=None in this release"), collector.batch(segments=[[0]]):
            pass
    collector = gm.attach(model, optimizer, endpoint="off", loss_reduction="weighted")
    with pytest.raises(ValueError, match="one weight an example"), collector.batch(ids=[1, 2], weights=[1.0]):
        pass
    collector.detach()


def test_a_weighted_loss_without_weights_is_not_measured_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = start()
    with gm.attach(model, optimizer, endpoint="off", loss_reduction="weighted") as collector:
        for _ in range(2):
            backward(model)
            assert collector.moments == {}
            optimizer.step()
        assert "takes one weight an example" in collector.coverage.uncovered[0].reason
    assert sum("takes one weight an example" in record.message for record in caplog.records) == 1


def test_a_number_of_ids_that_is_not_the_batch_spoils_the_step() -> None:
    model, optimizer = start()
    with gm.attach(model, optimizer, endpoint="off") as collector:
        with collector.batch(ids=["a", "b"]):
            backward(model)
        assert collector.moments == {}
        optimizer.step()
        with collector.batch(ids=["a", "b", "c", "d"]):
            backward(model)
        assert collector.moments


def test_every_auto_measures_less_often_where_measuring_costs_more_than_the_budget(recorder: Recorder) -> None:  # noqa: F811
    model, optimizer = start()
    with gm.attach(model, optimizer, every="auto", budget=1e-6) as collector:
        for step in range(80):
            backward(model, step)
            optimizer.step()
        assert collector._cadence.every > 16
    assert list(recorder.steps)[:3] == [0, 16, 32]


def test_a_parameter_that_stops_adding_up_is_told_as_an_event(recorder: Recorder) -> None:  # noqa: F811
    class Later(FunctionalUse):
        by_function = False

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            if self.by_function:
                return super().forward(index)
            return torch.tanh(self.middle(self.tokens(index)))

    model = Later()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, _ = case("gpt").draw(4)
    with gm.attach(model, optimizer) as collector:
        model(x).square().sum((1, 2)).mean().backward()
        optimizer.step()
        assert not collector.coverage.uncovered
        model.middle.requires_grad_(False)
        model(x).square().sum((1, 2)).mean().backward()
        optimizer.step()
    assert recorder.events[-1][0] == "coverage"
    assert "middle.weight" in recorder.events[-1][1]
    middle = recorder.layer("middle")
    assert recorder.steps[0]["mean_sq_norm"][middle] > 0
    assert recorder.steps[1]["mean_sq_norm"][middle] != recorder.steps[1]["mean_sq_norm"][middle]


def test_unfrozen_parameters_are_uncovered_until_attached_again() -> None:
    chosen = case("partly-frozen")
    model = chosen.make()
    x, y = chosen.draw(4)
    with gm.attach(model, endpoint="off") as collector:
        model.requires_grad_(True)
        squared(model(x), y).mean().backward()
        assert {u.parameter for u in collector.coverage.uncovered} == {"0.weight", "0.bias", "2.bias"}
        assert "attach again" in collector.coverage.uncovered[0].reason


def test_the_server_is_told_of_parameters_that_are_unfrozen(recorder: Recorder) -> None:  # noqa: F811
    chosen = case("partly-frozen")
    model = chosen.make()
    x, y = chosen.draw(4)
    with gm.attach(model):
        for step in range(4):
            if step == 1:
                model.requires_grad_(True)
            squared(model(x), y).mean().backward()
    assert sorted(recorder.steps) == [0, 1, 2, 3]
    ((kind, text),) = recorder.events
    assert kind == "coverage"
    assert "0.weight: it was frozen when the collector was attached; attach again" in text


def test_ids_without_a_length_are_refused_where_they_are_given() -> None:
    model, optimizer = start()
    with gm.attach(model, optimizer, endpoint="off") as collector:
        given = (number for number in range(4))
        with (
            pytest.raises(ValueError, match=r"needs ids as a sequence.*ids=generator; pass list"),
            collector.batch(ids=given),  # type: ignore[arg-type]
        ):
            backward(model)
        backward(model)
        assert collector.moments
