"""The PyTorch job of the demo: a small decoder-only transformer learns the text of Python's standard library.

Run by ``gradiometer demo`` in a process of its own; it can be run alone, too::

    python -m gradiometer.demo.torch_gpt --steps 200
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradiometer as gm
from gradiometer.optimizers.torch_api import MAdam

CONTEXT, BATCH, WIDTH, HEADS, DEPTH = 128, 16, 128, 4, 4


class Block(nn.Module):
    """Attention, then a perceptron; each behind a LayerNorm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, time, width) to the same."""
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_attention(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class ByteGPT(nn.Module):
    """A language model over bytes: logits of the next byte at every place of a (batch, time) text."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, depth: int = DEPTH, context: int = CONTEXT) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """From (batch, time) bytes to (batch, time, 256) logits."""
        places = torch.arange(text.shape[1], device=text.device).expand_as(text)
        x = self.bytes(text) + self.places(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def standard_library() -> Tensor:
    """The source text of Python's own standard library as bytes, one after another."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(p.parts)]
    return torch.frombuffer(bytearray(b"\n".join(p.read_bytes() for p in files)), dtype=torch.uint8)


def train(steps: int, *, run: str | None = None, endpoint: str | None = None, seed: int = 0) -> None:
    """Train, measured at every step."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    text, model = standard_library(), ByteGPT()
    optimizer = MAdam(model.parameters(), lr=1e-3, betas=(0.9, 0.99), variance="per_example", weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    with gm.attach(model, optimizer, run=run, endpoint=endpoint) as collector:
        for _ in range(steps):
            starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,))
            rows = text[starts[:, None] + torch.arange(CONTEXT + 1)].long()
            logits = model(rows[:, :-1])
            loss = F.cross_entropy(logits.reshape(-1, 256), rows[:, 1:].reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            collector.log(loss=loss, tokens=BATCH * CONTEXT)
            optimizer.step()
            schedule.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a byte-level transformer, measured by gradiometer.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--run", default=None)
    parser.add_argument("--endpoint", default=None)
    options = parser.parse_args()
    train(options.steps, run=options.run, endpoint=options.endpoint)
