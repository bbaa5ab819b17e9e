"""Which parameters Opacus can take apart by example, by which of its samplers, and why not the others.

A sampler of Opacus is a plain function ``(module, [input], output gradient) -> {parameter: (batch, *param)}``.
It is called from hooks of our own (`gradiometer.collectors.torch_engine`): Opacus's own hooks raise inside the
user's step, and leave attributes behind. What its samplers get wrong is put right or refused here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from gradiometer.stats_core.errors import MissingDependency

__all__ = ["Plan", "Rule", "batch_norms", "couples", "plan_model"]

Sampler = Callable[[Any, list[Tensor], Tensor], Mapping[Tensor, Tensor]]


@dataclass(frozen=True)
class Rule:
    """How one module's parameters are taken apart by example.

    Attributes:
        sample: the sampler.
        min_ndim: axes that the module's input has at least when its leading axis is the batch.
    """

    sample: Sampler
    min_ndim: int


@dataclass
class Plan:
    """What can be measured of a model, by its structure alone.

    Attributes:
        names: trained parameter → its full name (its first, where it is tied), in the model's order.
        owners: trained parameter → the modules that hold it.
        rules: module → its rule, for the modules that hold a coverable parameter.
        refused: trained parameter → why it can't be measured.
    """

    names: dict[nn.Parameter, str]
    owners: dict[nn.Parameter, list[nn.Module]]
    rules: dict[nn.Module, Rule] = field(default_factory=dict)
    refused: dict[nn.Parameter, str] = field(default_factory=dict)

    def parameters_of(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """The module's own parameters that are trained now and not refused."""
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter in self.names and parameter not in self.refused:
                yield parameter


def batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """The modules that can normalise over the batch, with their names."""
    return [(name or type(m).__name__, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]


def couples(module: _BatchNorm) -> bool:
    """True where the module, as it is set now, normalises over the batch: then no example has a gradient."""
    return module.training or module.running_mean is None


def plan_model(model: nn.Module) -> Plan:
    """Sort the model's trained parameters into those with a sampler and those without.

    Raises:
        MissingDependency: if Opacus is not installed.
    """
    samplers = _opacus_samplers()
    plan = Plan(names={p: name for name, p in model.named_parameters() if p.requires_grad}, owners={})
    inside_attention = {
        child for module in model.modules() if isinstance(module, nn.MultiheadAttention) for child in module.modules()
    }
    sequence_first = {
        child
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
        and not module.self_attn.batch_first
        for child in module.modules()
    }
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter in plan.names and module not in plan.owners.setdefault(parameter, []):
                plan.owners[parameter].append(module)
    for parameter, modules in plan.owners.items():
        for module in modules:
            reason = (
                _ATTENTION
                if module in inside_attention
                else _SEQUENCE_FIRST
                if module in sequence_first
                else _refusal(module, samplers)
            )
            if reason:
                plan.refused[parameter] = reason
    for parameter, modules in plan.owners.items():
        if parameter not in plan.refused:
            for module in modules:
                plan.rules[module] = _rule(module, samplers)
    return plan


_ATTENTION = (
    "MultiheadAttention uses its projections by function, which no sampler sees; "
    "use opacus.layers.DPMultiheadAttention or Linear layers of your own"
)


_SEQUENCE_FIRST = (
    "its Transformer layer is sequence-first (batch_first=False): its leading axis is not the batch; "
    "build the layer with batch_first=True"
)


def _opacus_samplers() -> Mapping[type, Sampler]:
    try:
        from opacus.grad_sample import GradSampleHooks
    except ImportError:
        raise MissingDependency(
            "attach needs opacus for engine='opacus', got none installed; pip install 'gradiometer[torch]'"
        ) from None
    samplers: Mapping[type, Sampler] = GradSampleHooks.GRAD_SAMPLERS
    return samplers


def _base(module: nn.Module, samplers: Mapping[type, Sampler]) -> type | None:
    """The class whose sampler fits: the module's own, or one whose ``forward`` it inherits unchanged."""
    for kind in type(module).__mro__:
        if kind in samplers and (kind is type(module) or type(module).forward is kind.forward):  # type: ignore[attr-defined]
            return kind
    return None


def _refusal(module: nn.Module, samplers: Mapping[type, Sampler]) -> str | None:
    """Why a module's own parameters can't be measured; None where they can."""
    kind = _base(module, samplers)
    name = type(module).__name__
    if isinstance(module, nn.RNNBase):
        return f"{name} runs its whole sequence in one call, which no sampler takes apart; use opacus.layers.DP{name}"
    if isinstance(module, _BatchNorm):
        return f"{name} has no sampler, also in eval mode; freeze its parameters or use GroupNorm"
    if isinstance(module, nn.EmbeddingBag):
        return "EmbeddingBag's sampler ignores its weights and modes; use Embedding and a sum"
    if kind is None:
        return f"no sampler for parameters that {name} holds; keep them in layers such as Linear, or register a sampler"
    if isinstance(module, nn.Embedding):
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq makes an example's gradient depend on the others of its batch"
        if module.sparse:
            return "sparse gradients are not measured; use Embedding(sparse=False)"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.padding_mode != "zeros":
        return f"the sampler pads with zeros, this layer has padding_mode={module.padding_mode!r}"
    return None


def _rule(module: nn.Module, samplers: Mapping[type, Sampler]) -> Rule:
    kind = _base(module, samplers)
    assert kind is not None
    sample = samplers[kind]
    if isinstance(module, nn.Embedding):
        return Rule(_padding_zeroed(sample), 1)
    if isinstance(module, nn.LayerNorm):
        return Rule(sample if module.bias is not None else _layer_norm_without_bias, len(module.normalized_shape) + 1)
    if isinstance(module, nn.RMSNorm):
        return Rule(sample, len(module.normalized_shape) + 1)
    for classes, ndim in _MIN_NDIM:
        if isinstance(module, classes):
            return Rule(sample, ndim)
    return Rule(sample, 1)


_MIN_NDIM: tuple[tuple[tuple[type, ...], int], ...] = (
    ((nn.Linear, nn.GroupNorm), 2),
    ((nn.Conv1d, nn.InstanceNorm1d), 3),
    ((nn.Conv2d, nn.InstanceNorm2d), 4),
    ((nn.Conv3d, nn.InstanceNorm3d), 5),
)


def _padding_zeroed(sample: Sampler) -> Sampler:
    """Opacus gives the padding row a gradient; PyTorch gives it none."""

    def sample_embedding(module: nn.Embedding, inputs: list[Tensor], grad: Tensor) -> Mapping[Tensor, Tensor]:
        samples = sample(module, inputs, grad)
        if module.padding_idx is not None:
            for rows in samples.values():
                rows[:, module.padding_idx] = 0
        return samples

    return sample_embedding


def _layer_norm_without_bias(module: nn.LayerNorm, inputs: list[Tensor], grad: Tensor) -> Mapping[Tensor, Tensor]:
    """Opacus's sampler asks the absent bias for its ``requires_grad``."""
    scaled = functional.layer_norm(inputs[0], module.normalized_shape, eps=module.eps) * grad
    between = list(range(1, scaled.ndim - module.weight.ndim))
    return {module.weight: torch.sum(scaled, dim=between) if between else scaled}
