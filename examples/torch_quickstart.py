"""Per-example gradient statistics of a PyTorch model: one line to attach, nothing else changes."""

import torch
from torch import nn

import gradiometer as gm
from gradiometer.stats_core import noise_sums

torch.manual_seed(0)
inputs = torch.randn(512, 20)
targets = inputs[:, :1].sin() + 0.1 * torch.randn(512, 1)
model = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

with gm.attach(model, optimizer, run="torch-quickstart") as collector:
    for _ in range(50):
        rows = torch.randint(len(inputs), (32,))
        loss = nn.functional.mse_loss(model(inputs[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        collector.log(loss=loss)
        optimizer.step()

    print(collector.coverage)
    for name, moments in collector.moments.items():
        noise = noise_sums(moments)
        print(f"{name:10} variance of the mean {float(noise.batch_variance):.2e} over {moments.count} examples")
