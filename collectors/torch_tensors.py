"""Finding tensors in what a model is given and what it returns."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["leading_size", "tensors_in"]

_DEEPEST = 8


def tensors_in(value: Any, depth: int = 0) -> list[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses, in order.

    Example:
        >>> import torch
        >>> [tuple(t.shape) for t in tensors_in({"x": torch.zeros(2, 3), "more": [torch.zeros(2), "text"]})]
        [(2, 3), (2,)]
    """
    if isinstance(value, Tensor):
        return [value]
    if depth == _DEEPEST or isinstance(value, str | bytes):
        return []
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [tensor for part in parts for tensor in tensors_in(part, depth + 1)]


def leading_size(tensors: list[Tensor]) -> int | None:
    """Number of rows of the first tensor that has rows: the batch. None where there is none."""
    return next((tensor.shape[0] for tensor in tensors if tensor.ndim and tensor.shape[0]), None)
