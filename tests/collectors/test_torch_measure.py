"""The numbers of a measured step, and their way to the host."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradiometer as gm
from gradiometer.collectors import torch_handover
from gradiometer.optimizers.torch_api import MAdam
from gradiometer.stats_core import catalog, maxva, selection
from gradiometer.stats_core.maxva import TemporalMoments
from tests.reference import loop_layer, loop_moments
from tests.torch_models import case, cross_entropy, example_grads, squared, train
from tests.torch_recording import Recorder, recorder  # noqa: F401 - a fixture

MLP = case("mlp")
LIGHT = ("count", "effective_count", "mean_sq_norm", "sq_norm_mean", "batch_variance", "grad_sq_norm", "variance_trace")


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt-positions-per-row", "partly-frozen", "gpt"])
def test_light_columns_equal_the_loop_summed_over_the_parameters_of_each_layer(
    recorder: Recorder,  # noqa: F811
    name: str,
) -> None:
    chosen = case(name)
    model = chosen.make(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = chosen.draw(5, torch.float64)
    grads = example_grads(chosen, model, x, y)
    with gm.attach(model, optimizer, statistics="light"):
        chosen.losses(model(x), y).mean().backward()
        optimizer.step()
    columns = recorder.steps[0]
    assert tuple(columns) == selection.columns("light")
    for number, layer in enumerate(recorder.run.layers):
        if not all(chosen.covers(parameter) for parameter in layer.parameters):
            assert all(math.isnan(column[number]) for column in columns.values())
            continue
        wanted = loop_layer([grads[parameter] for parameter in layer.parameters])
        for statistic in LIGHT:
            assert columns[statistic][number] == pytest.approx(wanted[statistic], rel=1e-6), (layer.name, statistic)
        assert columns["nonfinite_examples"][number] == 0
    assert recorder.scalars[0]["examples"] == 5
    assert recorder.scalars[0]["skipped"] == 0


def test_a_layer_is_summed_over_all_of_its_parameters_or_over_none(recorder: Recorder) -> None:  # noqa: F811
    model = MLP.make()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gm.attach(model, optimizer) as collector:
        train(model, optimizer, 1)
        uncovered = {u.parameter for u in collector.coverage.uncovered}
    assert all("parametrizations" in name for name in uncovered)
    assert len(uncovered) == 2
    assert list(recorder.run.layers[recorder.layer("0")].parameters) == ["0.bias"]
    assert recorder.steps[0]["mean_sq_norm"][recorder.layer("0")] > 0


def previous_means(grads: list[dict[str, list[np.ndarray]]]) -> list[dict[str, np.ndarray]]:
    return [{name: loop_moments(each).mean for name, each in step.items()} for step in grads]


def test_step_to_step_columns_are_those_of_successive_differences(recorder: Recorder) -> None:  # noqa: F811
    model = MLP.make(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with gm.attach(model, optimizer, every=2):
        for step in range(5):
            x, y = MLP.draw(4, torch.float64, seed=step)
            if step % 2 == 0:
                seen.append(example_grads(MLP, model, x, y))
            optimizer.zero_grad()
            squared(model(x), y).mean().backward()
            optimizer.step()
    means = previous_means(seen)
    for number, layer in enumerate(recorder.run.layers):
        assert math.isnan(recorder.steps[0]["step_variance"][number])
        for index, step in ((1, 2), (2, 4)):
            names = layer.parameters
            wanted = sum(0.5 * ((means[index][n] - means[index - 1][n]) ** 2).sum() for n in names)
            assert recorder.steps[step]["step_variance"][number] == pytest.approx(wanted, rel=1e-5)
            noise = [loop_layer([s[n] for n in names])["batch_variance"] for s in (seen[index - 1], seen[index])]
            assert recorder.steps[step]["step_variance_expected"][number] == pytest.approx(sum(noise) / 2, rel=1e-5)


def columns_by_rule(
    states: dict[str, TemporalMoments], grads: dict[str, torch.Tensor], within: dict[str, torch.Tensor] | None = None
) -> dict[str, dict[str, float]]:
    """MaxVA's columns of one step by parameter, from the rule itself; the states move on."""
    found = {}
    for name, grad in grads.items():
        before = states.setdefault(name, TemporalMoments.zeros_like(grad))
        after, _ = maxva.update(before, grad, 0.0 if within is None else within[name])
        found[name] = {
            "temporal_variance": float(after.s.sum()),
            "temporal_variance_prior": float(before.s.sum()),
            "deviation_sq": float(((grad - before.u) ** 2).sum()),
        }
        states[name] = after
    return found


def test_temporal_columns_are_kept_whatever_the_optimizer(recorder: Recorder) -> None:  # noqa: F811
    model = MLP.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states: dict[str, TemporalMoments] = {}
    wanted = []
    with gm.attach(model, optimizer) as collector:
        for step in range(4):
            x, y = MLP.draw(4, seed=step)
            optimizer.zero_grad()
            squared(model(x), y).mean().backward()
            wanted.append(columns_by_rule(states, {name: m.mean for name, m in collector.moments.items()}))
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)  # what is kept is unclipped
            optimizer.step()
    assert recorder.run.temporal == "collector"
    for step in (1, 2, 3):
        for number, layer in enumerate(recorder.run.layers):
            for name in ("temporal_variance", "temporal_variance_prior", "deviation_sq"):
                if step == 1 and name != "temporal_variance":
                    assert math.isnan(recorder.steps[step][name][number])  # no variance existed before
                else:
                    total = sum(wanted[step][parameter][name] for parameter in layer.parameters)
                    assert recorder.steps[step][name][number] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("variance", ["minibatch", "per_example"])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["unclipped", "clipped"])
def test_temporal_columns_are_the_optimizers_own_state_before_and_after_its_step(
    recorder: Recorder,  # noqa: F811
    variance: str,
    clip: float | None,
) -> None:
    model = MLP.make()
    optimizer = MAdam(model.parameters(), lr=0.01, variance=variance)
    names = {parameter: name for name, parameter in model.named_parameters()}
    before_after = []

    def sums() -> dict[str, float]:
        return {names[p]: float(state["s"].double().sum()) for p, state in optimizer.state.items()}

    with gm.attach(model, optimizer):
        for step in range(4):
            before = sums()
            x, y = MLP.draw(4, seed=step)
            optimizer.zero_grad()
            squared(model(x), y).mean().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            before_after.append((before, sums()))
    assert recorder.run.temporal == "optimizer"
    for step in (2, 3):
        before, after = before_after[step]
        for number, layer in enumerate(recorder.run.layers):
            columns = recorder.steps[step]
            assert columns["temporal_variance"][number] == pytest.approx(
                sum(after[p] for p in layer.parameters), rel=1e-5
            )
            assert columns["temporal_variance_prior"][number] == pytest.approx(
                sum(before[p] for p in layer.parameters), rel=1e-5
            )
            assert 0 <= columns["deviation_share"][number] <= 1
            assert 0.5 - 1e-6 <= columns["maxva_beta"][number] <= 1
    if variance == "per_example":
        # s is at least the variance of the mean, in the units of the gradient that the optimizer saw.
        scale = recorder.scalars[0]["gradient_scale"]
        batch_variance = recorder.steps[0]["batch_variance"]
        np.testing.assert_allclose(recorder.steps[0]["temporal_variance"], batch_variance * scale, rtol=1e-4)


def test_without_temporal_state_what_needs_it_is_absent_and_never_zero(recorder: Recorder) -> None:  # noqa: F811
    model = MLP.make()
    optimizer = MAdam(model.parameters(), lr=0.01)
    with gm.attach(model, optimizer, temporal=None) as collector:
        train(model, optimizer, 3)
        assert collector.state_dict()["temporal"] == {}
    assert recorder.run.temporal == ""
    for row in catalog.STATISTICS:
        if row.travels and row.tier == "default" and {"previous", "temporal"} & set(row.needs):
            assert np.isnan(recorder.steps[2][row.name]).all()
    assert not np.isnan(recorder.steps[2]["variance_trace"]).any()


def test_gradient_scale_and_norm_tell_what_the_optimizer_was_given(recorder: Recorder) -> None:  # noqa: F811
    model = MLP.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gm.attach(model, optimizer):
        train(model, optimizer, 1)
        train(model, optimizer, 1, clip=0.25)
    assert recorder.scalars[0]["gradient_scale"] == pytest.approx(1.0, rel=1e-5)
    norm = recorder.scalars[0]["grad_norm"]
    assert norm == pytest.approx(math.sqrt(recorder.steps[0]["mean_sq_norm"].sum()), rel=1e-5)
    assert recorder.scalars[1]["grad_norm"] == pytest.approx(0.25, rel=1e-4)
    assert recorder.scalars[1]["gradient_scale"] == pytest.approx((0.25 / norm) ** 2, rel=1e-4)
    assert recorder.scalars[1]["learning_rate"] == 0.0
    assert recorder.scalars[1]["overhead_seconds"] > 0


class Watch(TorchDispatchMode):
    """Notes every operation that could take a value off the device, or wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []
        self.copied_to: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::item"):
            self.read.append(name)
        if name == "aten::_to_copy" and (kwargs or {}).get("device") is not None:
            self.read.append(name)
        if name == "aten::copy_":
            self.copied_to.append(args[0].untyped_storage().data_ptr())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("statistics", ["default", "full,outliers"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_nothing_leaves_the_device_but_the_one_copy_of_the_summary(
    recorder: Recorder,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    accumulation: int,
    statistics: str,
) -> None:
    chosen = case("gpt-positions-per-row")
    model = chosen.make()
    optimizer = MAdam(model.parameters(), lr=0.01, variance="per_example", weight_decay=0.1, amsgrad=True)
    x, y = chosen.draw(4)
    buffers: list[torch.Tensor] = []
    made = torch_handover.HostRows.__init__

    def remember(self, *args, **kwargs):
        made(self, *args, **kwargs)
        buffers.extend(self._free)

    monkeypatch.setattr(torch_handover.HostRows, "__init__", remember)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(accumulation):
            loss = cross_entropy(model(x), y).mean() / accumulation
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        collector.log(loss=loss)

    with gm.attach(model, optimizer, statistics=statistics) as collector:
        step()  # the first step checks the model
        with Watch() as plain:
            x + 1
        assert not plain.read
        with Watch() as watch:
            for _ in range(3):
                step()
        assert watch.read == []
        host = {buffer.untyped_storage().data_ptr() for buffer in buffers}
        copies = [address for address in watch.copied_to if address in host]
        assert len(copies) == 3  # one a step: of the steps before
        assert watch.copied_to == copies
    assert list(recorder.steps) == [0, 1, 2, 3]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("said", [False, True])
def test_a_loss_scale_that_the_optimizer_divides_by_is_not_in_what_it_saw(
    recorder: Recorder,  # noqa: F811
    *,
    fused: bool,
    said: bool,
) -> None:
    model = MLP.make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = MLP.draw(4)
    norm = math.sqrt(
        sum(float(loop_moments(each).mean.ravel() @ loop_moments(each).mean.ravel()) for each in
            example_grads(MLP, model, x, y).values())
    )  # fmt: skip
    with gm.attach(model, optimizer) as collector:
        scaler.scale(squared(model(x), y).mean()).backward()
        if said:
            collector.log(loss_scale=scaler.get_scale())
        scaler.step(optimizer)
    assert recorder.scalars[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    wanted = 1.0 if said else 1024.0**-2  # unsaid, the measured mean holds the scale
    assert recorder.scalars[0]["gradient_scale"] == pytest.approx(wanted, rel=1e-5)


def test_a_step_that_a_fused_optimizer_skips_itself_is_skipped_and_has_no_gradient_scale_of_its_own(
    recorder: Recorder,  # noqa: F811
) -> None:
    model = MLP.make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = MLP.draw(4)
    with gm.attach(model, optimizer) as collector:
        for step in range(3):
            optimizer.zero_grad()
            loss = squared(model(x), y).mean() * (math.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
            collector.log(loss_scale=scaler.get_scale())
            before = [parameter.clone() for parameter in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            assert all(map(torch.equal, before, model.parameters())) == (step == 1)
    assert [recorder.scalars[step]["skipped"] for step in range(3)] == [0, 1, 0]
    assert [recorder.scalars[step]["gradient_scale"] for step in range(3)] == pytest.approx([1.0] * 3, rel=1e-5)
    assert not math.isfinite(recorder.scalars[1]["grad_norm"])
