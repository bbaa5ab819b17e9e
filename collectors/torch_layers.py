"""Layers of a module tree: which parameters are shown together, and under which name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from gradiometer.protos.run_pb2 import Coverage, Layer, Uncovered

__all__ = ["LayerParameters", "coverage_of", "layers_of"]


@dataclass(frozen=True)
class LayerParameters:
    """One layer: the message that registers it, and its parameters in the message's order."""

    message: Layer
    parameters: tuple[nn.Parameter, ...]


def layers_of(model: nn.Module, wanted: Iterable[nn.Parameter]) -> list[LayerParameters]:
    """The layers of the wanted parameters, in the model's order: the order of every column of a run.

    A layer is the module that owns the parameters, under its path ("blocks.0.attn.qkv"). A tied parameter
    belongs to the module where it is met first; a parameter of the model itself is a layer of its own.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False))
        >>> for layer in layers_of(model, set(model.parameters())):
        ...     print(layer.message.name, layer.message.kind, list(layer.message.parameters), layer.message.num_params)
        0 Linear ['0.weight', '0.bias'] 9
        2 Linear ['2.weight'] 3
    """
    wanted = set(wanted)
    grouped: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter in wanted:
            path, _, _ = name.rpartition(".")
            grouped.setdefault(path or name, []).append((name, parameter))
    return [
        LayerParameters(
            message=Layer(
                name=path,
                parameters=[name for name, _ in members],
                num_params=sum(parameter.numel() for _, parameter in members),
                kind=_kind(model, path),
                dtype=str(members[0][1].dtype).removeprefix("torch."),
            ),
            parameters=tuple(parameter for _, parameter in members),
        )
        for path, members in grouped.items()
    ]


def coverage_of(model: nn.Module, known: Mapping[nn.Parameter, str], missing: dict[nn.Parameter, str]) -> Coverage:
    """Which share of the trained parameters is measured, and why the rest is not.

    Args:
        model: the model.
        known: parameters that were trained when the collector was attached.
        missing: parameter → why it is not measured.
    """
    coverage = Coverage()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        reason = missing.get(parameter)
        if reason is None and parameter not in known:
            reason = "it was frozen when the collector was attached; attach again"
        coverage.num_params += parameter.numel()
        if reason is None:
            coverage.num_params_measured += parameter.numel()
        else:
            coverage.uncovered.append(Uncovered(parameter=name, num_params=parameter.numel(), reason=reason))
    return coverage


def _kind(model: nn.Module, path: str) -> str:
    try:
        return type(model.get_submodule(path)).__name__
    except AttributeError:  # a parameter of the model itself
        return "Parameter"
