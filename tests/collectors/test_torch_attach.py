"""What attach takes and refuses, and that it leaves no trace."""

import pytest
import torch
from torch import nn

import gradiometer as gm
from gradiometer.optimizers.torch_api import MAdam
from gradiometer.stats_core import MomentsSource
from gradiometer.stats_core.errors import UnsupportedModel
from tests.torch_models import case, squared
from tests.torch_recording import Recorder, recorder  # noqa: F401 - a fixture


def model_and_optimizer(**options) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = case("mlp").make()
    return model, MAdam(model.parameters(), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "token"}, r"needs unit in \('example',\) in this release, got unit='token'"),
        ({"batch_dim": 1}, "needs batch_dim in"),
        ({"engine": "fast"}, "needs engine in .*'opacus'.* got engine='fast'"),
        ({"engine": "functional"}, "needs engine in"),
        ({"mirror": "wandb"}, "needs mirror in"),
        ({"gradient": "replace"}, "needs gradient in"),
        ({"loss_reduction": "none"}, "needs loss_reduction in .*'weighted'"),
        ({"statistics": ["default", "gsnrr"]}, "needs tiers in .*got statistics='gsnrr'"),
        ({"temporal": "own"}, "needs temporal in"),
        ({"accumulation": 0}, "needs accumulation of at least 1"),
        ({"every": 0}, "needs every"),
        ({"budget": 0.0}, "needs a budget"),
        ({"endpoint": "http://somewhere"}, "needs endpoint of the form HOST:PORT"),
        ({"run": "../up"}, "needs run_id of letters"),
        ({"run": ""}, "needs run as a name or None"),
    ],
)
def test_arguments_out_of_range_or_of_a_later_release_are_refused(arguments, message: str) -> None:
    model = case("mlp").make()
    before = trace(model)
    with pytest.raises(ValueError, match=message):
        gm.attach(model, **arguments)
    assert trace(model) == before
    gm.attach(model, endpoint="off").detach()


def test_batch_norm_in_training_mode_is_refused_by_name_and_taken_in_eval_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(UnsupportedModel, match=r"BatchNorm in training mode in modules=\['1'\]; use GroupNorm"):
        gm.attach(model)
    model[1].eval()
    x, y = case("cnn").draw(4)
    with gm.attach(model, endpoint="off") as collector:
        squared(model(x), y).mean().backward()
        assert set(collector.moments) == {"0.weight", "0.bias", "3.weight", "3.bias"}
        assert {uncovered.parameter for uncovered in collector.coverage.uncovered} == {"1.weight", "1.bias"}


def test_batch_norm_without_running_statistics_is_refused_in_eval_mode_too() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(UnsupportedModel, match="BatchNorm"):
        gm.attach(model)


def test_a_model_that_nothing_can_be_measured_of_is_refused_with_reasons() -> None:
    with pytest.raises(UnsupportedModel, match=r"weight_ih_l0: LSTM runs its whole sequence"):
        gm.attach(nn.LSTM(3, 3))
    with pytest.raises(UnsupportedModel, match="all are frozen"):
        gm.attach(nn.Linear(3, 3).requires_grad_(False))


def test_two_collectors_on_one_model_or_a_part_of_it_are_refused() -> None:
    model = case("mlp").make()
    with gm.attach(model, endpoint="off"):
        with pytest.raises(ValueError, match=r"needs a model without a collector.*call detach"):
            gm.attach(model, endpoint="off")
        with pytest.raises(ValueError, match="needs a model without a collector"):
            gm.attach(nn.Sequential(model, nn.Linear(3, 3)), endpoint="off")
        with pytest.raises(ValueError, match="needs a model without a collector"):
            gm.attach(model[0], endpoint="off")
    gm.attach(model, endpoint="off").detach()


def test_what_is_no_model_or_no_optimizer_of_it_is_refused() -> None:
    model = case("mlp").make()
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module, got model=list"):
        gm.attach([model])
    with pytest.raises(TypeError, match=r"needs a torch.optim.Optimizer or None, got optimizer=float"):
        gm.attach(model, 0.1)
    with pytest.raises(ValueError, match="needs the optimizer of this model"):
        gm.attach(model, torch.optim.SGD(nn.Linear(2, 2).parameters()))
    with pytest.raises(ValueError, match="needs initialised parameters"):
        gm.attach(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="not compiled"):
        gm.attach(torch.compile(model, backend="eager"))
    with pytest.raises(ValueError, match="accumulation=1 with an optimizer"):
        gm.attach(model, torch.optim.SGD(model.parameters()), accumulation=2)


def test_a_job_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    with pytest.raises(ValueError, match="needs a job of one process in this release, got world_size=8"):
        gm.attach(case("mlp").make())


@pytest.mark.parametrize("every", [2, "auto"])
def test_a_per_example_optimizer_needs_every_step(every) -> None:
    model, optimizer = model_and_optimizer(variance="per_example")
    with pytest.raises(
        ValueError, match=f"needs every=1 for an optimizer with variance='per_example', got every={every!r}"
    ):
        gm.attach(model, optimizer, every=every)


def trace(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Everything that hooks and attributes could be left in."""
    found = {}
    for name, module in model.named_modules():
        state = dict(module.__dict__)
        found[name] = {
            key: list(value) if isinstance(value, dict) else value
            for key, value in state.items()
            if key not in ("_parameters", "_modules", "_buffers")
        }
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = (dict(parameter.__dict__), parameter._backward_hooks, parameter.grad_fn)
    if optimizer is not None:
        found["optimizer"] = {
            key: list(value) if isinstance(value, dict) else value
            for key, value in optimizer.__dict__.items()
            if key not in ("state", "param_groups")
        }
    return found


@pytest.mark.parametrize("where", ["unused", "after a step", "before backward", "in the middle of a step"])
def test_detaching_leaves_no_hook_and_no_attribute_behind_and_the_step_goes_on(where: str) -> None:
    chosen = case("cnn")
    x, y = chosen.draw(4)
    results = []
    for attached in (True, False):
        model = chosen.make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = trace(model, optimizer)
        collector = gm.attach(model, optimizer, endpoint="off") if attached else None
        steps = 1 if where == "after a step" else 0
        for _ in range(steps):
            squared(model(x), y).mean().backward()
            optimizer.step()
        if where in ("before backward", "in the middle of a step"):
            loss = squared(model(x), y).mean()
            if where == "in the middle of a step":
                (loss / 2).backward()
                loss = squared(model(x), y).mean() / 2
            if collector is not None:
                collector.detach()
            loss.backward()
            optimizer.step()
        if collector is not None:
            collector.detach()
            assert trace(model, optimizer) == before
            assert collector.moments == {}
        squared(model(x), y).mean().backward()
        optimizer.step()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_collector_is_bound_to_an_optimizer_that_takes_moments_and_shares_their_storage() -> None:
    chosen = case("mlp")
    model, optimizer = model_and_optimizer(variance="per_example")
    x, y = chosen.draw(4)
    with gm.attach(model, optimizer, endpoint="off") as collector:
        assert isinstance(collector, MomentsSource)
        squared(model(x), y).mean().backward()
        for name, parameter in model.named_parameters():
            seen = optimizer._source.moments_of(parameter)
            mine = collector.moments[name]
            for part in ("mean", "m2", "sq_norms"):
                assert getattr(seen, part).data_ptr() == getattr(mine, part).data_ptr()
            assert mine.mean.untyped_storage().data_ptr() != parameter.grad.untyped_storage().data_ptr()
        optimizer.step()
        assert optimizer.moments_missing == 0


def test_a_mean_handed_out_does_not_change_when_gradients_are_changed_in_place() -> None:
    chosen = case("mlp")
    model = chosen.make()
    x, y = chosen.draw(4)
    with gm.attach(model, endpoint="off") as collector:
        squared(model(x), y).mean().backward()
        before = {name: moments.mean.clone() for name, moments in collector.moments.items()}
        for parameter in model.parameters():
            parameter.grad.zero_()
        for name, moments in collector.moments.items():
            assert torch.equal(moments.mean, before[name])


def test_disabled_by_the_environment_nothing_is_left_in_the_users_path(
    monkeypatch: pytest.MonkeyPatch,
    recorder: Recorder,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("GRADIOMETER_DISABLE", "1")
    chosen = case("mlp")
    model, optimizer = model_and_optimizer(variance="per_example", lr=0.01)
    plain_model, plain = model_and_optimizer(lr=0.01)
    before = trace(model)
    x, y = chosen.draw(4)
    collector = gm.attach(model, optimizer)
    assert trace(model) == before
    for _ in range(3):
        for each, its_optimizer in ((model, optimizer), (plain_model, plain)):
            its_optimizer.zero_grad()
            squared(each(x), y).mean().backward()
            its_optimizer.step()
        with collector.batch(ids=[1, 2, 3, 4]):
            collector.log(loss=1.0)
        collector.event("note")
    assert collector.moments == {}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain_model.parameters(), strict=True))
    assert optimizer.moments_missing == 5
    assert sum("found no Moments" in record.message for record in caplog.records) == 1
    collector.detach()
    assert recorder.run is None


def test_the_run_is_registered_with_its_layers_and_with_what_was_undone(recorder: Recorder) -> None:  # noqa: F811
    chosen = case("gpt-tied")
    model = chosen.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = chosen.draw(4)
    with gm.attach(model, optimizer, run="a-run", loss_reduction="mean") as collector:
        assert collector.run_id == "a-run"
        for _ in range(2):
            (chosen.losses(model(x), y).mean() / 2).backward()
        optimizer.step()
    run = recorder.run
    assert run.run_id == "a-run"
    assert [layer.name for layer in run.layers][:3] == ["tokens", "positions", "norm1"]
    assert "head" not in [layer.name for layer in run.layers]
    assert run.layers[0].kind == "Embedding"
    assert list(run.layers[2].parameters) == ["norm1.weight", "norm1.bias"]
    assert run.layers[2].num_params == 16
    assert (run.engine, run.optimizer, run.temporal, run.tier, run.unit) == (
        "opacus", "SGD", "collector", "default", "example",
    )  # fmt: skip
    assert run.world.framework == "torch"
    assert run.loss.accumulation == 2
    assert [uncovered.parameter for uncovered in run.coverage.uncovered] == ["positions.weight"]
    assert recorder.closed == 1


def test_a_disabled_collector_covers_nothing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIOMETER_DISABLE", "1")
    coverage = gm.attach(torch.nn.Linear(3, 2), endpoint="off").coverage
    assert (coverage.num_params, coverage.num_params_measured) == (8, 0)
    assert {item.reason for item in coverage.uncovered} == {"GRADIOMETER_DISABLE is set"}


def test_a_run_that_is_no_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"attach needs run as a name or None, got run=5; pass a string"):
        gm.attach(torch.nn.Linear(3, 2), endpoint="off", run=5)  # type: ignore[arg-type]
