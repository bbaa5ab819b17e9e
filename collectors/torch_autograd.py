"""The few things about autograd that the collector leans on, in one place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Hook", "below", "guarded", "in_backward", "is_transformed", "under_saved_tensor_hooks"]


def no_hook(*_args: Any, **_kwargs: Any) -> None:
    """What a copied model has in place of a collector's hook."""


class Hook:
    """A hook that stays behind when its model is copied or saved: it is about that one model."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the function."""
        self._function(*args, **kwargs)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Callable[..., None]:
        return no_hook

    def __reduce__(self) -> tuple[Any, ...]:
        return (_get_no_hook, ())


def _get_no_hook() -> Callable[..., None]:
    return no_hook


def in_backward() -> bool:
    """True inside a backward pass, as when a checkpointed block is computed again."""
    return torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """True where what runs is no training step: compiled, traced by torch.jit, or under torch.func's transforms."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def guarded(device: torch.device) -> Any:
    """No gradients and no autocast, whatever the user's code around a hook has switched on."""
    stack = torch.no_grad()
    if torch.is_autocast_enabled(device.type):
        return _Both(stack, torch.autocast(device.type, enabled=False))
    return stack


class _Both:
    """Two contexts as one; cheaper than an ExitStack in a hook."""

    def __init__(self, outer: Any, inner: Any) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(self, *error: object) -> None:
        self._inner.__exit__(*error)
        self._outer.__exit__(*error)


def below(output: Tensor) -> Any:
    """The tensor to hook: an operation in place gives a view a new history, only what lies below keeps the old one."""
    base = output._base if output._is_view() else None
    if base is not None and base.requires_grad and base.grad_fn is not None and base.numel() == output.numel():
        return base
    return output


def under_saved_tensor_hooks() -> bool:
    """True where saved tensors are replaced, as inside a non-reentrant activation checkpoint."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(False) is not None
