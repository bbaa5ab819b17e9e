import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from gradiometer.collectors.torch_state import AdamState, OptimizerState, is_adam, never_adaptive_warning
from gradiometer.optimizers.torch_api import MAdam
from gradiometer.stats_core.adam import AdamStep, adam_sums
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.radam import rectify

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.7), amsgrad=True),
    "Adam maximize": lambda p: torch.optim.Adam(p, lr=0.01, maximize=True),
    "Adam coupled decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.3),
    "Adam coupled decay, maximize": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.3, maximize=True),
    "Adam, large eps": lambda p: torch.optim.Adam(p, lr=0.01, eps=0.1),
    "Adam without momentum": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.9)),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "Adam fused amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, fused=True, amsgrad=True),
    "Adam, rate in a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "AdamW decay": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "RAdam foreach": lambda p: torch.optim.RAdam(p, lr=0.01, foreach=True),
    "RAdam, large eps": lambda p: torch.optim.RAdam(p, lr=0.01, betas=(0.9, 0.9), eps=0.1),
    "RAdam that never adapts": lambda p: torch.optim.RAdam(p, lr=0.01, betas=(0.9, 0.5)),
    "RAdam maximize": lambda p: torch.optim.RAdam(p, lr=0.01, maximize=True),
    "RAdam decoupled decay": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.3, decoupled_weight_decay=True),
    "RAdam coupled decay": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "NAdam foreach": lambda p: torch.optim.NAdam(p, lr=0.01, foreach=True),
    "NAdam decoupled decay": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.3, decoupled_weight_decay=True),
    "MAdam": lambda p: MAdam(p, lr=0.01),
    "MAdam, the paper's eps": lambda p: MAdam(p, lr=0.01, eps=0.1, eps_mode="paper"),
    "MAdam amsgrad": lambda p: MAdam(p, lr=0.01, betas=(0.9, 0.9), amsgrad=True),
    "MAdam decay": lambda p: MAdam(p, lr=0.01, weight_decay=0.3),
}


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in ((3, 2), (4,))
    ]


def watched(
    optimizer: torch.optim.Optimizer, mine: list[nn.Parameter], steps: int = 12, factor: float = 1.0
) -> Iterator[tuple[dict[nn.Parameter, AdamStep], dict[nn.Parameter, Tensor]]]:
    """What the reader says just before each step, and what the step did to the parameters beside decoupled decay."""
    generator = torch.Generator().manual_seed(1)
    reader = AdamState(optimizer)
    for _ in range(steps):
        for parameter in mine:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = (drawn * factor).to(parameter.dtype)
        said = dict(reader.steps())
        done = {}
        for group in optimizer.param_groups:
            decoupled = group.get("decoupled_weight_decay", "eps_mode" in group)
            for parameter in group["params"]:
                kept = 1 - float(group["lr"]) * group["weight_decay"] if decoupled else 1.0
                done[parameter] = parameter.detach() * kept
        optimizer.step()
        yield said, {parameter: before - parameter.detach() for parameter, before in done.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_that_is_read_is_the_step_that_is_made(name: str) -> None:
    mine = parameters()
    # The difference of the parameters, about 2, holds 4 roundings of 2.2e-16 each; torch's 1 - beta^t loses 3 digits.
    # NAdam keeps its product of momenta in float32, a tensor of the learning rate is one.
    relative = 3e-7 if "NAdam" in name or "tensor" in name else 1e-12
    for said, done in watched(OPTIMIZERS[name](mine), mine):
        assert set(said) == set(mine)
        for parameter, step in said.items():
            torch.testing.assert_close(step.step, done[parameter], rtol=relative, atol=2e-15)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_divisor_before_a_step_is_that_after_the_step_before(name: str) -> None:
    mine = parameters()
    run = [said for said, _ in watched(OPTIMIZERS[name](mine), mine)]
    assert all(torch.isnan(step.divisor).all() and torch.isnan(step.momentum).all() for step in run[0].values())
    for before, now in itertools.pairwise(run):
        for parameter in mine:
            torch.testing.assert_close(now[parameter].divisor, before[parameter].divisor_after, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("amsgrad", "field"), [(False, "exp_avg_sq"), (True, "max_exp_avg_sq")])
def test_adam_s_divisor_after_the_step_is_that_of_the_state_which_the_step_leaves(amsgrad: bool, field: str) -> None:
    mine = parameters()
    optimizer = torch.optim.Adam(mine, betas=(0.9, 0.7), amsgrad=amsgrad)
    for said, _ in watched(optimizer, mine):
        for parameter, step in said.items():
            state = optimizer.state[parameter]
            want = (state[field] / (1 - 0.7 ** float(state["step"]))).sqrt() + 1e-8
            torch.testing.assert_close(step.divisor_after, want, rtol=1e-13, atol=0.0)


def test_radam_s_divisor_after_the_step_is_that_of_the_state_which_the_step_leaves() -> None:
    mine = parameters()
    optimizer = torch.optim.RAdam(mine, betas=(0.9, 0.7), eps=0.1)
    for said, _ in watched(optimizer, mine):
        for parameter, step in said.items():
            state = optimizer.state[parameter]
            want = (state["exp_avg_sq"].sqrt() + 0.1) / math.sqrt(1 - 0.7 ** float(state["step"]))
            torch.testing.assert_close(step.divisor_after, want, rtol=1e-13, atol=0.0)


def test_madam_s_divisor_after_the_step_is_that_of_the_state_which_the_step_leaves() -> None:
    mine = parameters()
    optimizer = MAdam(mine, eps=0.1, amsgrad=True)
    for said, _ in watched(optimizer, mine):
        for parameter, step in said.items():
            torch.testing.assert_close(step.divisor_after, optimizer.state[parameter]["max_denominator"])


@pytest.mark.parametrize("maximize", [False, True])
def test_momentum_points_as_the_gradients_did(maximize: bool) -> None:
    mine = [nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.Adam(mine, maximize=maximize)
    for _ in range(2):
        mine[0].grad = torch.tensor([1.0, -1.0])
        said = dict(AdamState(optimizer).steps())
        optimizer.step()
    assert torch.sign(said[mine[0]].momentum).tolist() == [1.0, -1.0]


@pytest.mark.parametrize("variance", ["mean", "full"])
def test_madam_s_step_with_the_examples_variance_is_the_step_that_is_made(variance: str) -> None:
    mine = parameters()
    optimizer = MAdam(mine, lr=0.01, variance="per_example", within=variance)
    generator = torch.Generator().manual_seed(2)

    class Source:
        def moments_of(self, parameter: nn.Parameter) -> Moments:
            return found[parameter]

    optimizer.bind(Source())
    for _ in range(5):
        found = {
            p: Moments.from_per_example(torch.randn(6, *p.shape, generator=generator, dtype=torch.float64))
            for p in mine
        }
        for parameter in mine:
            parameter.grad = 0.5 * found[parameter].mean
        said = dict(AdamState(optimizer).steps(found))
        before = [p.detach().clone() for p in mine]
        optimizer.step()
        for parameter, old in zip(mine, before, strict=True):
            torch.testing.assert_close(said[parameter].step, old - parameter.detach(), rtol=1e-12, atol=2e-15)


def test_groups_have_rates_of_their_own_and_a_schedule_is_followed() -> None:
    mine = parameters()
    optimizer = torch.optim.Adam([{"params": mine[:1], "lr": 0.1, "betas": (0.5, 0.6)}, {"params": mine[1:]}], lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for said, done in watched(optimizer, mine, 5):
        for parameter, step in said.items():
            torch.testing.assert_close(step.step, done[parameter], rtol=1e-12, atol=2e-15)
        schedule.step()


def test_a_state_that_was_loaded_is_read_on() -> None:
    mine = parameters()
    for optimizer in (torch.optim.Adam(mine), torch.optim.RAdam(mine, betas=(0.9, 0.9)), MAdam(mine)):
        list(watched(optimizer, mine, 7))
        other = type(optimizer)(mine)
        other.load_state_dict(optimizer.state_dict())
        for said, done in watched(other, mine, 2):
            for parameter, step in said.items():
                torch.testing.assert_close(step.step, done[parameter], rtol=1e-12, atol=2e-15)


def test_a_gradient_that_a_fused_optimizer_unscales_itself_is_unscaled() -> None:
    mine = parameters(torch.float32)
    optimizer = torch.optim.Adam(mine, lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    said: list[dict[nn.Parameter, AdamStep]] = []
    optimizer.register_step_pre_hook(lambda *_: said.append(dict(AdamState(optimizer).steps())))
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(sum((p**2).sum() for p in mine)).backward()
        before = [p.detach().clone() for p in mine]
        scaler.step(optimizer)
        scaler.update()
        for parameter, old in zip(mine, before, strict=True):
            step = said[-1][parameter]
            torch.testing.assert_close(step.step, old - parameter.detach(), rtol=1e-4, atol=4e-7)  # float32 near 2
            torch.testing.assert_close(step.divisor_after, 2 * old.abs(), rtol=0.0, atol=5e-4)  # moved by 2e-4 a step


def test_a_state_in_half_precision_is_read_in_float32() -> None:
    mine = parameters(torch.bfloat16)
    for said, done in watched(torch.optim.Adam(mine, lr=0.1, foreach=False), mine, 6):
        for parameter, step in said.items():
            assert step.step.dtype == step.divisor_after.dtype == torch.float32
            # bfloat16 rounds the parameter, about 2, by 2^-8 at most, and each of a dozen operations by 2^-9.
            torch.testing.assert_close(step.step, done[parameter].float(), rtol=12 * 2**-9, atol=2**-7)


def test_parameters_without_a_gradient_and_sparse_or_complex_ones_are_passed_over() -> None:
    dense, idle, complex_one = (nn.Parameter(torch.ones(2, dtype=t)) for t in (torch.float32,) * 2 + (torch.complex64,))
    sparse = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.Adam([dense, idle, complex_one, sparse])
    dense.grad, complex_one.grad = torch.ones(2), torch.ones(2, dtype=torch.complex64)
    sparse.grad = torch.sparse_coo_tensor([[1]], [[1.0, 2.0]], (3, 2), check_invariants=True)
    assert [p is dense for p, _ in AdamState(optimizer).steps()] == [True]


class Subclass(torch.optim.Adam):
    pass


class OwnStep(torch.optim.Adam):
    def step(self, closure: object = None) -> None:
        """Not Adam's."""


class LikeMAdam(MAdam):
    def step(self, closure: object = None) -> None:
        """Not MAdam's."""


def test_a_subclass_is_known_by_the_step_that_it_runs() -> None:
    mine = parameters()
    assert is_adam(Subclass(mine))
    assert not is_adam(OwnStep(mine))
    assert not is_adam(LikeMAdam(mine))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        torch.optim.Adagrad,
        torch.optim.Adamax,
        torch.optim.LBFGS,
        OwnStep,
        lambda _: None,
        lambda _: object(),
    ],
)
def test_of_an_optimizer_that_is_not_known_nothing_is_read(make: Make) -> None:
    mine = parameters()
    for parameter in mine:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make(mine)
    reader = AdamState(optimizer)
    moments = {p: Moments.from_per_example(torch.ones(2, *p.shape)) for p in mine}
    assert (list(reader.steps()), reader.sums(moments), reader.radam_scalars()) == ([], {}, {})
    assert never_adaptive_warning(optimizer) is None


def test_a_state_of_another_make_is_not_read() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.Adam([parameter])
    optimizer.state[parameter] = {"state1": torch.ones(2), "step": 3}
    assert list(AdamState(optimizer).steps()) == []


def test_the_sums_are_those_of_the_measured_parameters() -> None:
    mine = parameters()
    optimizer = torch.optim.AdamW(mine)
    list(watched(optimizer, mine, 3))
    moments = {mine[0]: Moments.from_per_example(torch.randn(5, 3, 2, dtype=torch.float64))}
    reader = AdamState(optimizer)
    got = reader.sums(moments, scale=0.25)
    want = adam_sums(dict(reader.steps())[mine[0]], moments[mine[0]], 0.25)
    assert set(got) == {mine[0]}
    assert {name: float(value) for name, value in got[mine[0]].items()} == {
        name: float(value) for name, value in want.items()
    }
    assert not any(value.requires_grad for value in got[mine[0]].values())


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam, torch.optim.NAdam])
def test_a_step_count_on_an_accelerator_is_not_looked_at(kind: type[torch.optim.Optimizer]) -> None:
    """The meta device has no values: whoever looks at one raises."""
    with torch.device("meta"):
        parameter = nn.Parameter(torch.empty(3, 2))
        parameter.grad = torch.empty(3, 2)
        optimizer = kind([parameter], foreach=False, weight_decay=0.1)
        optimizer.param_groups[0]["lr"] = torch.empty(())
        fields = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        optimizer.state[parameter] = {name: torch.empty(3, 2) for name in fields}
        optimizer.state[parameter].update(step=torch.empty(()), mu_product=torch.empty(()))
        moments = {parameter: Moments.from_per_example(torch.empty(4, 3, 2))}
    reader = AdamState(optimizer)
    assert all(value.device.type == "meta" for value in reader.sums(moments)[parameter].values())
    assert all(value.device.type == "meta" for value in reader.radam_scalars().values())


def test_radam_s_scalars_are_those_of_the_step_that_comes() -> None:
    mine = parameters()
    optimizer = torch.optim.RAdam(mine, betas=(0.9, 0.99))
    reader = AdamState(optimizer)
    mine[0].grad = mine[1].grad = None
    assert reader.radam_scalars() == {}
    for parameter in mine:
        parameter.grad = torch.ones_like(parameter)
    for step in range(1, 9):
        want = rectify(step, 0.99)
        assert reader.radam_scalars() == {
            "radam_length": want.length,
            "radam_rectification": want.rectification,
            "radam_rectified": float(step >= 6),
            "radam_multiplier": want.multiplier,
        }
        optimizer.step()
    assert AdamState(torch.optim.Adam(mine)).radam_scalars() == {}


def test_a_radam_that_never_adapts_is_warned_of() -> None:
    mine = parameters()
    assert never_adaptive_warning(torch.optim.RAdam(mine)) is None
    assert never_adaptive_warning(torch.optim.Adam(mine, betas=(0.9, 0.5))) is None
    groups = [{"params": mine[:1]}, {"params": mine[1:], "betas": (0.9, 2 / 3)}]
    said = never_adaptive_warning(torch.optim.RAdam(groups))
    assert "betas[1] > 2/3" in said
    assert "got betas[1]=0.666667 in parameter group 1" in said


def test_the_moments_of_maxva_are_read_as_before() -> None:
    mine = parameters()
    optimizer = MAdam(mine)
    list(watched(optimizer, mine, 3))
    read = OptimizerState(optimizer).reading({})
    for parameter in mine:
        state, found = optimizer.state[parameter], read(parameter)
        assert (found.before.u is state["u"], found.before.s is state["s"], found.before.w is state["w"]) == (True,) * 3
        assert torch.equal(found.grad, parameter.grad)
        assert found.betas == {"beta_max": 0.999, "beta_min": 0.5, "beta_init": None}
        assert found.within == 0.0
    mine[0].grad = None
    assert OptimizerState(optimizer).reading({})(mine[0]) is None


@pytest.mark.parametrize("said", [True, False])
def test_a_loss_scale_that_a_fused_optimizer_divides_by_is_not_in_adam_s_geometry(said: bool) -> None:
    drawn = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)) + 1
    found = {}
    for loss_scale in (1.0, 1024.0):
        parameter = nn.Parameter(torch.ones(4))
        optimizer = torch.optim.Adam([parameter], fused=True)
        for _ in range(2):
            parameter.grad = drawn.mean(0)
            optimizer.step()
        optimizer.grad_scale = torch.tensor(loss_scale)  # as GradScaler does just before the step
        parameter.grad = drawn.mean(0) * loss_scale
        told = 1.0 if said else loss_scale  # a scale that is said is undone in the moments
        moments = {parameter: Moments.from_per_example(drawn * told)}
        sums = AdamState(optimizer).sums(moments, (loss_scale / told) ** 2)
        found[loss_scale] = {name: float(value) for name, value in sums[parameter].items()}
    assert found[1024.0] == pytest.approx(found[1.0], rel=1e-5)
