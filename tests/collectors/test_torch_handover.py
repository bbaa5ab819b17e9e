"""Numbers on their way from the device to the host."""

import math

import numpy as np
import torch

from gradiometer.collectors import torch_handover


def test_steps_for_which_no_host_buffer_is_free_are_dropped_and_counted() -> None:
    rows = torch_handover.HostRows(2, torch.device("cpu"), slots=1)

    def numbers(step: int) -> torch_handover.StepNumbers:
        return torch_handover.StepNumbers(
            step,
            1,
            np.full((2, 1), np.nan, np.float32),
            [torch.tensor(step + 0.5)],
            [1],
            {"a": torch.tensor(2.0), "b": 3},
        )

    rows.send(numbers(0))
    rows.send(numbers(1))
    assert rows.dropped == 1
    (arrived,) = rows.arrived()
    assert (arrived.step, arrived.rows[1, 0], arrived.scalars) == (0, 0.5, {"a": 2.0, "b": 3.0})
    assert math.isnan(arrived.rows[0, 0])
    rows.send(numbers(2))
    assert [arrived.step for arrived in rows.arrived(wait=True)] == [2]
