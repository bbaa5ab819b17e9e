"""``gradiometer.attach``: one line that puts a collector on a PyTorch model."""

import logging
import os
from typing import Any, Literal, get_args

import torch
from torch import nn

from gradiometer.collectors.cadence import Cadence
from gradiometer.collectors.endpoint import is_disabled
from gradiometer.collectors.registration import complete
from gradiometer.collectors.torch_collector import TorchCollector
from gradiometer.collectors.torch_engine import LossReduction
from gradiometer.collectors.torch_layers import coverage_of, layers_of
from gradiometer.collectors.torch_measure import StepMeasurer
from gradiometer.collectors.torch_memory import OwnMemory
from gradiometer.collectors.torch_reporter import Reporter
from gradiometer.collectors.torch_rules import Plan, batch_norms, couples, plan_model
from gradiometer.collectors.torch_state import AdamState, OptimizerState, is_adam, is_maxva, never_adaptive_warning
from gradiometer.collectors.torch_steps import Settings, attached
from gradiometer.protos import run_pb2
from gradiometer.protos.run_pb2 import LossNormalization, Run, World
from gradiometer.stats_core.errors import UnsupportedModel
from gradiometer.stats_core.selection import Selection, Statistics
from gradiometer.stats_core.source import TakesMoments

__all__ = ["attach"]

_log = logging.getLogger("gradiometer")

# What this release takes of each argument that a later one takes more of, and what a later one will.
_TAKEN: dict[str, tuple[Any, ...]] = {
    "unit": ("example",),
    "batch_dim": (0,),
    "engine": ("auto", "opacus"),
    "mirror": (None,),
    "gradient": ("auto", "observe"),
    "loss_reduction": get_args(LossReduction),
    "temporal": ("auto", None),
}
_REDUCTIONS = {
    "mean": run_pb2.LOSS_REDUCTION_MEAN,
    "sum": run_pb2.LOSS_REDUCTION_SUM,
    "weighted": run_pb2.LOSS_REDUCTION_WEIGHTED,
}


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    run: str | None = None,
    endpoint: str | None = None,
    every: int | Literal["auto"] = 1,
    budget: float = 0.03,
    accumulation: int = 1,
    unit: Literal["example", "token"] = "example",
    loss_reduction: LossReduction = "mean",
    batch_dim: int = 0,
    statistics: Statistics = "default",
    temporal: Literal["auto"] | None = "auto",
    engine: Literal["auto", "fast", "opacus", "functional"] = "auto",
    mirror: str | None = None,
    gradient: Literal["auto", "replace", "observe"] = "auto",
) -> TorchCollector:
    r"""Measure the per-example gradients of a model in training, and publish their statistics.

    The model is the user's own and stays it: hooks are put on its modules, its loss and gradients keep every
    bit, and ``detach()`` takes the hooks off again. Measured are forward passes of the model itself, in
    training mode and with gradients; an example is a row of the first tensor that the model is given.

    What was done to the loss is undone, so that :math:`g_i = \nabla \ell_i`: its reduction over the batch,
    and, over a step of k backward passes, a division of each pass's loss by k (for ``"mean"``). A loss scale is
    undone where ``collector.log(loss_scale=...)`` says it before the optimizer's step.

    An optimizer that takes Moments (``MAdam(..., variance="per_example")``) is bound to the collector.

    Args:
        model: a model in training mode, not compiled.
        optimizer: its optimizer: a step closes where it has made one, a state of MaxVA's is read from it.
        run: name of the run; None: script name, date and four hex digits.
        endpoint: ``"HOST:PORT"`` of a server, ``"off"`` to publish nothing, None for ``GRADIOMETER_ENDPOINT``,
            else 127.0.0.1:50051.
        every: measure steps 0, k, 2k, ...; ``"auto"``: as often as the budget allows.
        budget: share of the steps' time, for ``every="auto"``.
        accumulation: without an optimizer, so many backward passes are a step.
        unit: ``"example"``.
        loss_reduction: ``"mean"`` or ``"sum"`` over the examples of a backward pass, or ``"weighted"``:
            :math:`L = \sum a_i \ell_i / \sum a_i` over the whole step, with the weights given by
            ``collector.batch(weights=a)``.
        batch_dim: 0: the batch is the leading axis of what the model is given and returns.
        statistics: ``"light"``, ``"default"`` or ``"full"``, the tiers of the catalogue; or names of its statistics,
            or both: ``["default", "conflicting_share"]``. No more is computed than they need.
        temporal: ``"auto"``: MaxVA's moments are the optimizer's own, or else kept here (three copies of the
            parameters, and one of the last gradient); None: absent, with the step-to-step variance.
        engine: ``"opacus"``: Opacus's per-layer samplers (``"auto"`` is that in this release).
        mirror: None.
        gradient: ``"observe"``: the gradient is not touched (``"auto"`` is that in this release).

    Returns:
        The collector, a context manager.

    Raises:
        UnsupportedModel: if the model normalises over the batch, as BatchNorm does in training mode, or no
            parameter of it can be measured.
        ValueError: if an argument is out of range or belongs to a later release, the endpoint is malformed,
            the model has a collector already, or the optimizer has other parameters.
        MissingDependency: if Opacus is not installed.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with attach(model, optimizer, endpoint="off") as collector:
        ...     model(torch.ones(4, 3)).mean().backward()
        ...     collector.moments["weight"].sq_norms
        tensor([3., 3., 3., 3.], dtype=torch.float64)
    """
    given = {
        "unit": unit,
        "batch_dim": batch_dim,
        "engine": engine,
        "mirror": mirror,
        "gradient": gradient,
        "loss_reduction": loss_reduction,
        "temporal": temporal,
    }
    for name, value in given.items():
        if value not in _TAKEN[name]:
            raise ValueError(
                f"attach needs {name} in {_TAKEN[name]} in this release, got {name}={value!r}; choose one of them"
            )
    if isinstance(accumulation, bool) or not isinstance(accumulation, int) or accumulation < 1:
        raise ValueError(f"attach needs accumulation of at least 1, got accumulation={accumulation!r}; pass 1 for none")
    if optimizer is not None and accumulation != 1:
        raise ValueError(
            f"attach needs accumulation=1 with an optimizer, got accumulation={accumulation}; the optimizer's own "
            "steps say which backward passes belong together"
        )
    Cadence(every, budget)
    _check_model(model)
    _check_optimizer(model, optimizer, every)
    wanted = Selection.of(statistics)
    settings = Settings(every, budget, accumulation, loss_reduction, wanted.ingredients)
    plan = plan_model(model)
    if len(plan.refused) == len(plan.names):
        reasons = "; ".join(f"{plan.names[parameter]}: {reason}" for parameter, reason in [*plan.refused.items()][:3])
        raise UnsupportedModel(
            f"attach needs a trained parameter in a layer with a sampler, got parameters={len(plan.names)} of which "
            f"none has ({reasons or 'all are frozen'}); train one in a layer such as Linear, Conv2d or Embedding"
        )
    reads_optimizer = temporal == "auto" and "temporal" in wanted.ingredients and is_maxva(optimizer)
    message = _describe(
        model, optimizer, plan, run, wanted, loss_reduction,
        temporal="" if temporal is None else ("optimizer" if reads_optimizer else "collector"),
    )  # fmt: skip
    device = next(iter(plan.names)).device
    reporter = Reporter(message, endpoint, device)
    measurer = StepMeasurer(
        model,
        optimizer,
        plan,
        reporter,
        wanted=wanted,
        own=None if temporal is None else OwnMemory(plan.names, wanted, maxva=not reads_optimizer),
        optimizer_state=OptimizerState(optimizer) if reads_optimizer and optimizer is not None else None,
        adam=AdamState(optimizer) if "adam" in wanted.ingredients and is_adam(optimizer) else None,
    )
    if (warning := never_adaptive_warning(optimizer)) is not None:
        _log.warning("%s", warning)
    collector = TorchCollector(model, optimizer, plan, settings, measurer, reporter)
    if is_disabled(os.environ):
        _log.info("GRADIOMETER_DISABLE is set: nothing is measured or published")
        collector.disable("GRADIOMETER_DISABLE is set")
        return collector
    collector.install()
    return collector


def _check_model(model: nn.Module) -> None:
    ranks = torch.distributed.get_world_size() if _is_distributed() else 1
    if ranks > 1:
        raise ValueError(
            f"attach needs a job of one process in this release, got world_size={ranks}; its numbers would be those of "
            "one rank alone"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach needs a torch.nn.Module, got model={type(model).__name__}; pass the model itself")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"attach needs a model that is not compiled, got model={type(model).__name__}; attach to the model as it "
            "was before torch.compile, and train that"
        )
    if any(module in attached for module in model.modules()):
        raise ValueError(
            "attach needs a model without a collector, got one that has its own (or a part that has); "
            "call detach() on the other collector first"
        )
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"attach needs initialised parameters, got parameter={lazy[0]!r} uninitialised; run one batch before"
        )
    coupling = [name for name, module in batch_norms(model) if couples(module)]
    if coupling:
        raise UnsupportedModel(
            f"attach needs a model whose examples have gradients of their own, got BatchNorm in training mode in "
            f"modules={coupling}; use GroupNorm, or call eval() on these modules"
        )


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer | None, every: int | Literal["auto"]) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"attach needs a torch.optim.Optimizer or None, got optimizer={type(optimizer).__name__}; "
            "pass the optimizer whose step() is called"
        )
    its_own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if its_own.isdisjoint(model.parameters()):
        raise ValueError(
            "attach needs the optimizer of this model, got one that shares no parameter with it; "
            "make it from model.parameters(), after the model was moved or copied"
        )
    if isinstance(optimizer, TakesMoments) and optimizer.wants_moments and every != 1:
        raise ValueError(
            f"attach needs every=1 for an optimizer with variance='per_example', got every={every!r}; "
            "it takes the Moments of each step"
        )


def _describe(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    plan: Plan,
    run: str | None,
    wanted: Selection,
    loss_reduction: LossReduction,
    *,
    temporal: str,
) -> Run:
    """The run as it is known before the first step.

    Raises:
        ValueError: if its name can't be one.
    """
    if run is not None and not isinstance(run, str):
        raise TypeError(f"attach needs run as a name or None, got run={run!r}; pass a string")
    if run == "":
        raise ValueError("attach needs run as a name or None, got run=''; leave it out for a name of the script's")
    covered = [parameter for parameter in plan.names if parameter not in plan.refused]
    return complete(
        Run(
            run_id=run or "",
            layers=[layer.message for layer in layers_of(model, covered)],
            loss=LossNormalization(reduction=_REDUCTIONS[loss_reduction]),
            world=World(size=1, framework="torch", framework_version=torch.__version__, device=str(covered[0].device)),
            coverage=coverage_of(model, plan.names, plan.refused),
            unit="example",
            tier=wanted.spelled,
            engine="opacus",
            optimizer="" if optimizer is None else type(optimizer).__name__,
            temporal=temporal,
        )
    )
