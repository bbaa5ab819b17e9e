"""The MaxVA family as ``torch.optim`` optimizers.

The rule is `gradiometer.stats_core.maxva`; here is only what PyTorch asks of an optimizer. With
``variance="per_example"`` an optimizer reads the Moments that a collector left on the device, where
they lie: ``gm.attach(model, optimizer)`` binds the two.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch.optim.optimizer import Optimizer

from gradiometer.stats_core import maxva
from gradiometer.stats_core.arrays import widened
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.source import MomentsSource

__all__ = ["MAdam"]

_log = logging.getLogger("gradiometer")

EpsMode = Literal["outside", "paper"]
Variance = Literal["minibatch", "per_example"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "eps_mode": ("outside", "paper"),
    "variance": ("minibatch", "per_example"),
    "within": ("mean", "full"),
}


class MAdam(Optimizer):
    r"""Adam whose second moment is averaged with the weights that maximise the variance it sees.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = s_t + u_t^2, \qquad
        \theta_t = \theta_{t-1} - \eta \, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t} + \epsilon}

    with u and s by `gradiometer.stats_core.maxva.update`: where a gradient deviates from the mean so
    far by more than the spread so far, the rule listens to it, so that v follows a change of the noise
    within a few steps. v is larger than Adam's by design (2.4 times the root on normal noise at the
    default ``betas``): learning rates are larger by about that factor.

    With ``variance="per_example"`` the rule also knows how far the examples of the batch disagree: each
    gradient is taken as a distribution of variance :math:`\tau^2`. This form is this project's own; no
    paper has it. :math:`\tau^2` is rescaled by what was done to the whole gradient since it was measured
    (clipping by global norm, the loss's reduction, a loss scale); a clip by value, or of each parameter
    group by itself, is not undone.

    The state of a parameter is ``m``, ``u``, ``s`` and ``w`` (with ``amsgrad`` also ``max_denominator``),
    in float32 or wider whatever the parameter's type.

    Args:
        params: parameters or parameter groups.
        lr: step size :math:`\eta`.
        betas: coefficient of the momentum, and the largest coefficient of the second moment.
        beta_min: the smallest coefficient of the second moment. Where it equals ``betas[1]`` the
            optimizer is Adam.
        beta_init: coefficient of the first step; None for ``betas[1]``, or .9 if that is 1.
        eps: :math:`\epsilon`, added to the root.
        eps_mode: ``"outside"``: to the root of the normalised v, as in Adam and in the authors' code;
            ``"paper"``: to the root of the unnormalised one, as in their Algorithm 1, which makes it
            :math:`\epsilon / \sqrt w`, larger in early steps.
        weight_decay: decoupled, scaled by the learning rate, applied before the step.
        amsgrad: divide by the largest denominator so far.
        variance: ``"minibatch"`` for the paper's rule, ``"per_example"`` to use a collector's Moments.
        within: which variance the examples give, as `gradiometer.stats_core.maxva.within_variance`.

    Raises:
        ValueError: if a value is out of range; at the first step, if ``variance="per_example"`` and
            nothing was ever bound; at a step, if a gradient is sparse.

    Example:
        >>> parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = MAdam([parameter], lr=0.1)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     (parameter**2).sum().backward()
        ...     optimizer.step()
        >>> bool((parameter.abs() < 0.1).all())
        True

    References:
        Zhu, Cheng, Gan, Huang, Liu and Goldstein, "Adaptive learning rates with maximum variation
        averaging", 2020, arXiv 2006.11918, algorithm 1.
    """

    # On the class, so that a copied or unpickled optimizer starts with nothing bound.
    _source: MomentsSource | None = None
    _bound = False
    _warned = False

    moments_missing: int = 0
    """Parameters that had a gradient but no Moments in the last step; for them τ² was 0."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta_min: float = 0.5,
        beta_init: float | None = None,
        eps: float = 1e-8,
        eps_mode: EpsMode = "outside",
        weight_decay: float = 0.0,
        amsgrad: bool = False,  # noqa: FBT001 - the place it has in torch.optim.Adam
        variance: Variance = "minibatch",
        within: maxva.Within = "mean",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "beta_min": beta_min,
            "beta_init": beta_init,
            "eps": eps,
            "eps_mode": eps_mode,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "variance": variance,
            "within": within,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`; its values are checked."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.is_complex():
                self.param_groups.pop()
                raise ValueError(
                    f"MAdam needs real parameters, got dtype={parameter.dtype}; pass torch.view_as_real(parameter)"
                )

    @property
    def wants_moments(self) -> bool:
        """True where some group takes the variance across examples."""
        return any(group["variance"] == "per_example" for group in self.param_groups)

    def bind(self, source: MomentsSource | None) -> None:
        """Take Moments from the source from now on; None: from nowhere, every τ² is 0."""
        self._source = source
        self._bound = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as `torch.optim.Optimizer.load_state_dict`, but keep the state's own precision.

        PyTorch casts state to the type of its parameter, which would round float32 state to half
        precision where the parameter is kept in half precision.
        """
        super().load_state_dict(state_dict)
        mine = [p for group in self.param_groups for p in group["params"]]
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        for parameter, key in zip(mine, saved, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if torch.is_tensor(value) and value.is_floating_point():
                    self.state[parameter][name] = value.detach().to(parameter.device, copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step.

        Args:
            closure: evaluates the model again and returns the loss; optional.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: if a gradient is sparse, or Moments are wanted and no source was ever bound.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        wants_moments = self.wants_moments
        if wants_moments and not self._bound:
            raise ValueError(
                "MAdam needs a bound collector for variance='per_example', got none; call "
                "gradiometer.attach(model, optimizer) before the first step, or use variance='minibatch'"
            )
        grads = {p: _dense_grad(p) for group in self.param_groups for p in group["params"] if p.grad is not None}
        within, scale = self._collect(grads) if wants_moments else ({}, 1.0)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in grads:
                    moments = within.get(parameter)
                    tau2 = 0.0 if moments is None else maxva.within_variance(moments, group["within"]) * scale
                    self._update(parameter, grads[parameter], tau2, group)
        return loss

    def _collect(self, grads: dict[Any, Any]) -> tuple[dict[Any, Moments], Any]:
        """The Moments of the parameters that want them, and what was done to the gradient since (a device scalar)."""
        found: dict[Any, Moments] = {}
        missing = 0
        for group in self.param_groups:
            if group["variance"] != "per_example":
                continue
            for parameter in group["params"]:
                if parameter not in grads:
                    continue
                moments = None if self._source is None else self._source.moments_of(parameter)
                if moments is None:
                    missing += 1
                else:
                    found[parameter] = moments
        self.moments_missing = missing
        if missing and not self._warned:
            self._warned = True
            _log.warning(
                "MAdam found no Moments for %d of %d parameters: their variance across examples is taken as 0 "
                "(the mini-batch rule); the collector's coverage says why. This is said once.",
                missing,
                missing + len(found),
            )
        if not found:
            return found, 1.0
        return found, maxva.gradient_scale([grads[p] for p in found], [m.mean for m in found.values()])

    def _update(self, parameter: Any, grad: Any, tau2: Any, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            zeros = TemporalMoments.zeros_like(grad)
            state.update(step=0, m=torch.zeros_like(grad), u=zeros.u, s=zeros.s, w=zeros.w)
        beta1, beta_max = group["betas"]
        lr = group["lr"]
        before = TemporalMoments(state["u"], state["s"], state["w"])
        after, _ = maxva.update(
            before, grad, tau2, beta_max=beta_max, beta_min=group["beta_min"], beta_init=group["beta_init"]
        )
        state["u"], state["s"], state["w"] = after
        state["step"] += 1
        state["m"].mul_(beta1).add_(grad, alpha=1.0 - beta1)
        eps = group["eps"] if group["eps_mode"] == "outside" else group["eps"] / after.w.sqrt()
        denominator = (after.s + after.u * after.u).sqrt_().add_(eps)
        if group["amsgrad"]:
            known = state.get("max_denominator")
            denominator = denominator if known is None else torch.maximum(known, denominator)
            state["max_denominator"] = denominator
        if group["weight_decay"]:
            parameter.mul_(1.0 - lr * group["weight_decay"])
        change = state["m"] / (1.0 - beta1 ** state["step"]) / denominator
        parameter.sub_((change * lr).to(parameter.dtype))


def _dense_grad(parameter: Any) -> Any:
    """The gradient in float32 or wider."""
    grad = parameter.grad
    if grad.is_sparse:
        raise ValueError(
            f"MAdam needs dense gradients, got grad of layout={grad.layout} and shape={tuple(grad.shape)}; "
            "use sparse=False in the embedding"
        )
    return widened(grad)


def _check(group: dict[str, Any]) -> None:
    """Refuse values out of range, with the names of the signature."""
    beta1, beta_max = group["betas"]
    rules = (
        (not group["lr"] >= 0, "lr >= 0", "lr", group["lr"]),
        (not 0 <= beta1 < 1, "betas[0] in [0, 1)", "betas", group["betas"]),
        (not 0 <= beta_max <= 1, "betas[1] in [0, 1]", "betas", group["betas"]),
        (not 0 <= group["beta_min"] <= beta_max, "beta_min in [0, betas[1]]", "beta_min", group["beta_min"]),
        (
            group["beta_init"] is not None and not 0 <= group["beta_init"] < 1,
            "beta_init in [0, 1) or None",
            "beta_init",
            group["beta_init"],
        ),
        (not group["eps"] >= 0, "eps >= 0", "eps", group["eps"]),
        (not group["weight_decay"] >= 0, "weight_decay >= 0", "weight_decay", group["weight_decay"]),
    )
    for broken, condition, name, value in rules:
        if broken:
            raise ValueError(f"MAdam needs {condition}, got {name}={value}; see its docstring for the range")
    for name, choices in _CHOICES.items():
        if group[name] not in choices:
            raise ValueError(f"MAdam needs {name} in {choices}, got {name}={group[name]!r}; choose one of them")
