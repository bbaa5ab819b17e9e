"""A measured PyTorch step against the plain one: the demo's transformer, on one thread.

Nothing is published, so this is the collector alone: per-example gradients and their Moments. What the statistics
add to it is timed in `tiers.py`.
"""

import torch
from torch.nn import functional as F

import gradiometer as gm
from benchmarks.interleaved import interleaved, show
from gradiometer.demo.torch_gpt import BATCH, CONTEXT, ByteGPT
from gradiometer.optimizers.torch_api import MAdam


def trainer(kind: str):
    torch.manual_seed(0)
    model = ByteGPT()
    if kind.startswith("MAdam"):
        variance = "per_example" if "per_example" in kind else "minibatch"
        optimizer = MAdam(model.parameters(), lr=1e-3, variance=variance)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if "measured" in kind:
        gm.attach(model, optimizer, endpoint="off", every=1, temporal=None if "no temporal" in kind else "auto")
    rows = torch.randint(256, (BATCH, CONTEXT + 1))

    def step() -> None:
        loss = F.cross_entropy(model(rows[:, :-1]).reshape(-1, 256), rows[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    torch.set_num_threads(1)
    kinds = (
        "AdamW", "AdamW, plain again (control)", "AdamW, measured, no temporal state", "AdamW, measured",
        "MAdam", "MAdam per_example, measured",
    )  # fmt: skip
    show("PyTorch, 0.84 M parameters, B 16, T 128", interleaved({kind: trainer(kind) for kind in kinds}, repeats=11))
