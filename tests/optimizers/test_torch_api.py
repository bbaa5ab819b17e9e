"""MAdam in PyTorch: one table of common checks, and its figures."""

import copy
import io
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from gradiometer.optimizers.torch_api import MAdam
from gradiometer.stats_core import Moments, TakesMoments, maxva
from tests.reference import maxva_naive


class Source:
    """Moments by parameter."""

    def __init__(self, moments: dict[torch.Tensor, Moments]) -> None:
        self.moments = moments

    def moments_of(self, parameter: torch.Tensor) -> Moments | None:
        return self.moments.get(parameter)


def parameter(*values: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def run(optimizer: torch.optim.Optimizer, theta: nn.Parameter, grads: list[torch.Tensor]) -> torch.Tensor:
    for grad in grads:
        theta.grad = grad.clone()
        optimizer.step()
    return theta.detach().clone()


def noise(steps: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=dtype) + 0.3 for _ in range(steps)]


OPTIONS = {
    "default": {},
    "paper": {"eps_mode": "paper"},
    "amsgrad": {"amsgrad": True},
    "decay": {"weight_decay": 0.1},
    "beta-max-1": {"betas": (0.9, 1.0)},
    "no-momentum": {"betas": (0.0, 0.98)},
}
options = pytest.mark.parametrize("chosen", OPTIONS.values(), ids=OPTIONS)


def test_state_and_step_are_those_of_the_rule_by_brute_force() -> None:
    grads = noise(12, 5)
    theta = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = MAdam([theta], lr=0.1, betas=(0.9, 0.98))
    moved = run(optimizer, theta, grads)
    state = optimizer.state[theta]
    wanted = maxva_naive([g.numpy() for g in grads], beta_max=0.98)
    np.testing.assert_allclose(state["u"], wanted["u"], atol=1e-4)
    np.testing.assert_allclose(state["s"], wanted["s"], atol=1e-4)
    np.testing.assert_allclose(state["w"], wanted["w"], atol=1e-4)
    # The step, from the states of a naive run at every step.
    position, momentum = np.zeros(5), np.zeros(5)
    for step in range(1, 13):
        at = maxva_naive([g.numpy() for g in grads[:step]], beta_max=0.98)
        momentum = 0.9 * momentum + 0.1 * grads[step - 1].numpy()
        root = np.sqrt(at["s"] + at["u"] ** 2)
        position -= 0.1 * momentum / (1 - 0.9**step) / (root + 1e-8)
    np.testing.assert_allclose(moved, position, atol=1e-4)


def test_first_two_steps_have_their_known_values() -> None:
    theta = parameter(0.0)
    optimizer = MAdam([theta], lr=1.0, betas=(0.0, 0.9), eps=0.0)
    run(optimizer, theta, [torch.tensor([2.0], dtype=torch.float64)])
    assert theta.item() == pytest.approx(-1.0)
    state = optimizer.state[theta]
    assert (state["u"].item(), state["s"].item(), state["w"].item()) == pytest.approx((2.0, 0.0, 0.1))
    run(optimizer, theta, [torch.tensor([6.0], dtype=torch.float64)])
    q = 0.1 / (0.9 * 0.1 + 0.1)  # R is infinite: 1/2, clipped to what beta_max allows
    assert state["u"].item() == pytest.approx(2 + 4 * q)
    assert state["s"].item() == pytest.approx(q * (1 - q) * 16)


def test_where_both_betas_are_equal_it_is_adam() -> None:
    grads = noise(50, 7)
    results = []
    for make in (
        lambda p: MAdam(p, lr=0.01, betas=(0.9, 0.99), beta_min=0.99),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99)),
    ):
        theta = nn.Parameter(torch.zeros(7, dtype=torch.float64))
        results.append(run(make([theta]), theta, grads))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_eps_counts_for_more_in_early_steps_in_the_papers_form() -> None:
    moved = []
    for eps_mode in ("outside", "paper"):
        theta = parameter(0.0)
        optimizer = MAdam([theta], lr=1.0, betas=(0.0, 0.99), eps=0.5, eps_mode=eps_mode)
        moved.append(run(optimizer, theta, [torch.ones(1, dtype=torch.float64)]).item())
    assert moved == pytest.approx([-1 / 1.5, -1 / (1 + 0.5 / np.sqrt(0.01))])


def test_weight_decay_is_decoupled_and_scaled_by_the_learning_rate() -> None:
    theta = parameter(2.0)
    run(MAdam([theta], lr=0.1, weight_decay=0.5), theta, [torch.zeros(1, dtype=torch.float64)])
    assert theta.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))


def test_amsgrad_divides_by_the_largest_denominator_so_far() -> None:
    theta = parameter(0.0)
    optimizer = MAdam([theta], lr=1.0, betas=(0.0, 0.5), beta_min=0.5, amsgrad=True, eps=0.0)
    large, small = torch.tensor([10.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    run(optimizer, theta, [large])
    largest = optimizer.state[theta]["max_denominator"].item()
    assert largest == pytest.approx(10.0)
    run(optimizer, theta, [small])
    assert theta.item() == pytest.approx(-1.0 - 0.1)


@options
def test_it_converges(chosen: dict) -> None:
    theta = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = MAdam([theta], **{"lr": 0.05, **chosen})
    for _ in range(400):
        optimizer.zero_grad()
        (theta - torch.tensor([0.5, 0.0, -0.5])).square().sum().backward()
        optimizer.step()
    assert (theta - torch.tensor([0.5, 0.0, -0.5])).abs().max() < 0.1


@options
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy", "file"])
def test_a_restored_optimizer_goes_on_as_if_it_had_not_stopped(chosen: dict, way: str) -> None:
    grads = noise(6, 4)
    theta = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = MAdam([theta], lr=0.1, **chosen)
    run(optimizer, theta, grads[:3])
    if way in ("state_dict", "file"):
        twin_theta = nn.Parameter(theta.detach().clone())
        twin = MAdam([twin_theta], lr=0.7)
        state = optimizer.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file)
        twin.load_state_dict(state)
    else:
        twin = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        twin_theta = twin.param_groups[0]["params"][0]
    assert torch.equal(run(optimizer, theta, grads[3:]), run(twin, twin_theta, grads[3:]))


def test_a_loaded_state_keeps_its_precision_and_is_a_copy() -> None:
    theta = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MAdam([theta], lr=0.1)
    run(optimizer, theta, noise(3, 4, dtype=torch.bfloat16))
    twin_theta = nn.Parameter(theta.detach().clone())
    twin = MAdam([twin_theta])
    twin.load_state_dict(optimizer.state_dict())
    for name in ("m", "u", "s", "w"):
        mine, its = optimizer.state[theta][name], twin.state[twin_theta][name]
        assert its.dtype == torch.float32
        assert torch.equal(mine, its)
        assert mine.data_ptr() != its.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parameters_keep_their_type_and_state_is_float32_or_wider(dtype: torch.dtype) -> None:
    theta = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = MAdam([theta], lr=0.1, amsgrad=True)
    run(optimizer, theta, noise(3, 3, dtype=dtype))
    assert theta.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for value in optimizer.state[theta].values() if torch.is_tensor(value)} == {wide}


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_steps_do_not_depend_on_the_scale_of_the_gradients(scale: float) -> None:
    grads = noise(8, 5, dtype=torch.float32)
    results = []
    for factor in (1.0, scale):
        theta = nn.Parameter(torch.zeros(5))
        optimizer = MAdam([theta], lr=0.1, eps=0.0)
        results.append(run(optimizer, theta, [grad * factor for grad in grads]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_dead_elements_stay_where_they_are() -> None:
    theta = parameter(1.0, 1.0)
    optimizer = MAdam([theta], lr=0.1)
    run(optimizer, theta, [torch.tensor([0.0, 1.0], dtype=torch.float64)] * 5)
    assert theta[0].item() == 1.0
    assert torch.isfinite(theta).all()


def test_gradients_that_are_not_numbers_do_not_raise() -> None:
    theta = parameter(1.0, 1.0)
    optimizer = MAdam([theta], lr=0.1)
    run(optimizer, theta, [torch.tensor([float("nan"), 1.0], dtype=torch.float64)] * 2)
    assert torch.isnan(theta[0])
    assert theta[1].item() == pytest.approx(0.8)


def test_schedulers_groups_tensor_learning_rates_and_closures_work() -> None:
    first, second = parameter(1.0), parameter(1.0)
    optimizer = MAdam([{"params": [first], "lr": torch.tensor(0.1)}, {"params": [second], "beta_min": 0.9}], lr=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (first + second).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert (first.item(), second.item()) == pytest.approx((0.9, 0.8))
    scheduler.step()
    optimizer.step(closure)
    assert (first.item(), second.item()) == pytest.approx((0.85, 0.7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "needs lr >= 0, got lr=-1.0"),
        ({"betas": (1.0, 0.999)}, r"needs betas\[0\] in \[0, 1\)"),
        ({"betas": (0.9, 1.1)}, r"needs betas\[1\] in \[0, 1\]"),
        ({"beta_min": 0.9999}, "needs beta_min in"),
        ({"beta_init": 1.0}, "needs beta_init in"),
        ({"eps": -1e-8}, "needs eps >= 0"),
        ({"weight_decay": float("nan")}, "needs weight_decay >= 0"),
        ({"eps_mode": "inside"}, r"needs eps_mode in \('outside', 'paper'\), got eps_mode='inside'; choose one"),
        ({"variance": "example"}, "needs variance in .*'per_example'"),
        ({"within": "batch"}, "needs within in .*'mean'"),
    ],
)
def test_values_out_of_range_are_refused_by_their_names(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAdam([parameter(1.0)], **arguments)
    with pytest.raises(ValueError, match=message):
        MAdam([{"params": [parameter(1.0)], **arguments}])


def test_sparse_and_complex_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = MAdam(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"needs dense gradients.*sparse=False"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"needs real parameters, got dtype=torch\.complex64"):
        MAdam([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


# ---------------------------------------------------------------------- per-example variance


def examples(batch: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


@pytest.mark.parametrize("within", ["mean", "full"])
@pytest.mark.parametrize("factor", [1.0, 1e-3, 64.0], ids=["as-measured", "clipped", "summed"])
def test_the_examples_variance_is_taken_in_the_units_of_the_gradient(within: str, factor: float) -> None:
    theta = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = MAdam([theta], betas=(0.9, 0.98), variance="per_example", within=within)
    assert isinstance(optimizer, TakesMoments)
    assert optimizer.wants_moments
    grads, taus = [], []
    for step in range(6):
        drawn = examples(8, 5, step)
        moments = Moments.from_per_example(drawn)
        optimizer.bind(Source({theta: moments}))
        grads.append((moments.mean * factor).numpy())
        taus.append(maxva.within_variance(moments, within).numpy() * factor**2)
        run(optimizer, theta, [moments.mean * factor])
    wanted = maxva_naive(grads, taus, beta_max=0.98)
    np.testing.assert_allclose(optimizer.state[theta]["u"] / factor, wanted["u"] / factor, atol=1e-4)
    np.testing.assert_allclose(optimizer.state[theta]["s"] / factor**2, wanted["s"] / factor**2, atol=1e-4)


def test_with_no_variance_among_examples_it_is_the_papers_rule() -> None:
    grads = noise(6, 5)
    results = []
    for variance in ("minibatch", "per_example"):
        theta = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        optimizer = MAdam([theta], lr=0.1, variance=variance)
        for grad in grads:
            optimizer.bind(Source({theta: Moments.from_per_example(grad.expand(4, 5))}))
            run(optimizer, theta, [grad])
        results.append(theta.detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_stepping_with_nothing_bound_raises_and_a_copy_is_bound_to_nothing() -> None:
    theta = parameter(1.0)
    theta.grad = torch.ones_like(theta)
    optimizer = MAdam([theta], variance="per_example")
    with pytest.raises(ValueError, match=r"needs a bound collector for variance='per_example', got none; call"):
        optimizer.step()
    assert theta.item() == 1.0
    optimizer.bind(Source({}))
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs a bound collector"):
        twin.step()
    MAdam([theta]).step()


def test_parameters_without_moments_take_the_minibatch_rule_are_counted_and_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second, idle = parameter(1.0, 2.0), parameter(1.0, 2.0), parameter(1.0)
    optimizer = MAdam([first, second, idle], lr=0.1, variance="per_example")
    drawn = examples(4, 2)
    optimizer.bind(Source({first: Moments.from_per_example(drawn)}))
    with caplog.at_level(logging.WARNING, "gradiometer"):
        for _ in range(3):
            first.grad, second.grad = drawn.mean(0), drawn.mean(0)
            optimizer.step()
            assert optimizer.moments_missing == 1
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "MAdam found no Moments for 1 of 2 parameters"
    ]
    assert (optimizer.state[first]["s"] > 0).all()
    plain = parameter(1.0, 2.0)
    run(MAdam([plain], lr=0.1), plain, [drawn.mean(0)] * 3)
    assert torch.equal(second, plain)
    optimizer.bind(None)
    first.grad, second.grad = drawn.mean(0), drawn.mean(0)
    optimizer.step()
    assert optimizer.moments_missing == 2


def test_a_single_example_takes_the_minibatch_rule() -> None:
    theta, plain = parameter(1.0, 2.0), parameter(1.0, 2.0)
    optimizer = MAdam([theta], variance="per_example")
    grads = noise(4, 2)
    for grad in grads:
        optimizer.bind(Source({theta: Moments.from_per_example(grad[None])}))
        run(optimizer, theta, [grad])
    assert torch.equal(run(MAdam([plain]), plain, grads), theta.detach())


# ---------------------------------------------------------------------- stationary figures (+-3 %)


def stationary(optimizer: MAdam, theta: nn.Parameter, batch: int, steps: int, burn_in: int) -> float:
    """Mean of v over elements and steps, in units of the gradient's variance."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for step in range(steps):
        if batch:
            moments = Moments.from_per_example(torch.randn(batch, theta.numel(), generator=generator))
            optimizer.bind(Source({theta: moments}))
            theta.grad = moments.mean.clone()
        else:
            theta.grad = torch.randn(theta.numel(), generator=generator)
        optimizer.step()
        state = optimizer.state[theta]
        if step >= burn_in:
            total += float((state["s"] + state["u"] ** 2).mean())
    return total / (steps - burn_in) * max(batch, 1)


def test_stationary_second_moment_of_the_minibatch_rule_on_normal_noise() -> None:
    theta = nn.Parameter(torch.zeros(4000))
    found = stationary(MAdam([theta], lr=0.0, betas=(0.9, 0.98)), theta, 0, 900, 400)
    assert found == pytest.approx(2.83, rel=0.03)


def test_stationary_second_moment_of_the_mean_form_on_normal_noise() -> None:
    theta = nn.Parameter(torch.zeros(600))
    optimizer = MAdam([theta], lr=0.0, betas=(0.9, 0.98), variance="per_example")
    assert stationary(optimizer, theta, 64, 1200, 400) == pytest.approx(3.84, rel=0.03)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("beta_max", "variance", "within", "figure"),
    [
        (0.999, "minibatch", "mean", 5.74),
        (0.999, "per_example", "mean", 6.78),
        (0.98, "per_example", "full", 79.7),
        (0.999, "per_example", "full", 93.3),
    ],
)
def test_stationary_second_moment_of_the_other_forms(
    beta_max: float, variance: str, within: str, figure: float
) -> None:
    theta = nn.Parameter(torch.zeros(300))
    optimizer = MAdam([theta], lr=0.0, betas=(0.9, beta_max), variance=variance, within=within)
    steps, burn_in = (1500, 500) if beta_max < 0.99 else (16_000, 6_000)
    batch = 64 if variance == "per_example" else 0
    assert stationary(optimizer, theta, batch, steps, burn_in) == pytest.approx(figure, rel=0.03)
