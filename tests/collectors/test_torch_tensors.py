"""Finding tensors in what models take and give."""

from collections import OrderedDict
from dataclasses import dataclass

import torch

from gradiometer.collectors.torch_tensors import leading_size, tensors_in


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


def test_tensors_are_found_in_nested_containers_in_order() -> None:
    a, b, c = torch.zeros(3), torch.zeros(2, 2), torch.zeros(())
    found = tensors_in((a, OrderedDict(x=[b, "text", 3]), Output(logits=c)))
    assert [id(tensor) for tensor in found] == [id(a), id(b), id(c)]


def test_endless_nesting_ends() -> None:
    endless: list = []
    endless.append(endless)
    assert tensors_in(endless) == []


def test_the_batch_is_the_leading_axis_of_the_first_tensor_that_has_one() -> None:
    assert leading_size([torch.zeros(()), torch.zeros(4, 2), torch.zeros(9)]) == 4
    assert leading_size([torch.zeros(())]) is None
    assert leading_size([]) is None
