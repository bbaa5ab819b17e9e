"""Small models for the PyTorch collector, the batches they take, and the float64 loop over single examples."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gradiometer.stats_core import Moments
from tests.reference import LoopMoments, loop_moments, relative_error

VOCABULARY = 11


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class GPT(nn.Module):
    """A decoder of one block. Positions are looked up once for all rows (``[T]``), or once a row."""

    def __init__(self, *, tied: bool = False, positions_per_row: bool = False, width: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(16, width)
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.positions_per_row = positions_per_row

    def forward(self, index: Tensor) -> Tensor:
        positions = torch.arange(index.shape[1])
        if self.positions_per_row:
            positions = positions.expand_as(index)
        x = self.tokens(index) + self.positions(positions)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x)


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(torch.tanh(self.shared(x))))


class InPlace(nn.Module):
    """Operations in place on the outputs of layers, which are views for three-dimensional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden.sigmoid_()
        out = self.last(hidden)
        out += 1.0
        return out


class RawParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(x * self.scale))


class PartsInEval(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)
        self.train()

    def train(self, mode: bool = True) -> "PartsInEval":
        super().train(mode)
        self.first.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.last = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, torch.tanh(self.first(x)), use_reentrant=self.reentrant))


class WithAttentionModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0])


class FunctionalUse(nn.Module):
    """The head uses the embedding's weight by function: a hook on the embedding sees half of its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 6)
        self.middle = nn.Linear(6, 6)

    def forward(self, index: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.middle(self.tokens(index))), self.tokens.weight)


class OwnBatchNorm(nn.Module):
    """Couples the examples in a way that no class name shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = (x - x.mean(0)) / x.std(0)
        return self.last(torch.tanh(x))


class TimeFirst(nn.Module):
    """The layers work on (T, B, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.transpose(0, 1)))).transpose(0, 1)


class OnlyLoss(nn.Module):
    """Returns its loss and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return ((self.last(torch.tanh(self.first(x))) - target) ** 2).sum(-1).mean()


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.GELU(),
        nn.Conv2d(8, 6, 3, stride=2, groups=2, bias=False),
        nn.InstanceNorm2d(6, affine=True),
        nn.GELU(),
        nn.Conv2d(6, 6, (1, 3), padding="same", dilation=(1, 2)),
        nn.Flatten(),
        nn.Linear(54, 3),
    )


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def padded_embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(VOCABULARY, 6, padding_idx=0), nn.RMSNorm(6), nn.Linear(6, 3))


def vectors(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 6, generator=generator), torch.randn(batch, 3, generator=generator)


def sequences(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4, 6, generator=generator), torch.randn(batch, 4, 3, generator=generator)


def images(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8, generator=generator), torch.randn(batch, 3, generator=generator)


def signals(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, 9, generator=generator), torch.randn(batch, 3, generator=generator)


def volumes(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, 4, 4, 4, generator=generator), torch.randn(batch, 3, generator=generator)


def tokens(batch: int, generator: torch.Generator, length: int = 7) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(VOCABULARY, (batch, length + 1), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]


def padded_tokens(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return tokens(batch, generator)[0], torch.randn(batch, 7, 3, generator=generator)


def squared(output: Tensor, target: Tensor) -> Tensor:
    """One loss an example, shape (batch,)."""
    return ((output - target) ** 2).flatten(1).sum(1)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """One loss an example: the mean over its tokens."""
    return functional.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1)


@dataclass(frozen=True)
class Case:
    """A model, its batches, its loss, and what of it this engine can't measure: name prefix → part of the reason."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    losses: Callable[[Tensor, Tensor], Tensor] = squared
    uncovered: dict[str, str] = field(default_factory=dict)

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The model, initialised as the seed says."""
        torch.manual_seed(seed)
        return self.build().to(dtype)

    def draw(self, batch: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor]:
        """A batch of that many rows."""
        drawn = self.batch(batch, torch.Generator().manual_seed(seed))
        x, y = (part.to(dtype) if part.is_floating_point() else part for part in drawn)
        return x, y

    def covers(self, name: str) -> bool:
        """True for a parameter that must be measured."""
        return not any(name.startswith(prefix) for prefix in self.uncovered)


CASES = (
    Case(
        "mlp", lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)), vectors
    ),
    Case("sequence-mlp", lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), sequences),
    Case("cnn", convolutional, images),
    Case(
        "conv1d",
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        signals,
    ),
    Case(
        "conv3d",
        lambda: nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(192, 3)),
        volumes,
    ),
    Case("gpt", GPT, tokens, cross_entropy, {"positions": "does not carry the batch"}),
    Case("gpt-tied", lambda: GPT(tied=True), tokens, cross_entropy, {"positions": "does not carry the batch"}),
    Case("gpt-positions-per-row", lambda: GPT(tied=True, positions_per_row=True), tokens, cross_entropy),
    Case("padding", padded_embedding, padded_tokens),
    Case("twice", Twice, vectors),
    Case("in-place", InPlace, sequences),
    Case("partly-frozen", partly_frozen, vectors),
    Case("raw-parameter", RawParameter, vectors, squared, {"scale": "no sampler for parameters that RawParameter"}),
    Case("eval-part", PartsInEval, vectors, squared, {"first": "eval mode"}),
    Case("checkpointed", Checkpointed, vectors, squared, {"block": "activation checkpoint"}),
    Case("attention-module", WithAttentionModule, sequences, squared, {"attention": "MultiheadAttention"}),
    Case("lstm", Recurrent, sequences, squared, {"lstm": "LSTM runs its whole sequence"}),
    Case("functional-use", FunctionalUse, tokens, cross_entropy, {"tokens": "do not add up"}),
    Case("time-first", TimeFirst, sequences, squared, {"first": "does not carry", "last": "does not carry"}),
)


def case(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


def example_grads(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, list[np.ndarray]]:
    """Gradient of each example's own loss in float64, one at a time, by parameter name."""
    exact = copy.deepcopy(model).double()
    names, parameters = zip(*((n, p) for n, p in exact.named_parameters() if p.requires_grad), strict=True)
    x, y = (part.double() if part.is_floating_point() else part for part in (x, y))
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for row in range(x.shape[0]):
        loss = case.losses(exact(x[row : row + 1]), y[row : row + 1]).sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for name, grad in zip(names, grads, strict=True):
            found[name].append(grad.numpy())
    return found


def reference_moments(
    case: Case, model: nn.Module, x: Tensor, y: Tensor, weights: Tensor | None = None
) -> dict[str, LoopMoments]:
    """What every engine must find, by parameter name."""
    grads = example_grads(case, model, x, y)
    raw = None if weights is None else weights.double().tolist()
    return {name: loop_moments(grads[name], raw) for name in grads}


def assert_agrees(found: Moments, wanted: LoopMoments, tolerance: float, name: str) -> None:
    """Fail where Moments are not those of the loop."""
    assert found.count == wanted.count
    assert float(found.weight_sum) == pytest.approx(wanted.weight_sum, rel=tolerance)
    assert float(found.weight_sq_sum) == pytest.approx(wanted.weight_sq_sum, rel=tolerance)
    assert relative_error(found.mean, wanted.mean) <= tolerance, name
    assert relative_error(found.sq_norms, wanted.sq_norms) <= tolerance, name
    assert relative_error(found.weights, wanted.weights) <= tolerance, name
    # As an absolute bound, which also holds where the variance is 0: the tolerance times kappa.
    total = float(wanted.m2.sum())
    scale = np.linalg.norm(wanted.m2) / total if total > 0 else 1.0
    error = np.linalg.norm(found.m2.double().numpy() - wanted.m2)
    assert error <= tolerance * scale * float(wanted.sq_norms.sum()), name
    assert float(found.m2.min()) >= 0


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    chosen: Case | None = None,
    clip: float | None = None,
) -> None:
    """Some plain training steps, each on its own batch of four."""
    chosen = chosen or case("mlp")
    for step in range(steps):
        x, y = chosen.draw(4, next(model.parameters()).dtype, seed=step)
        optimizer.zero_grad()
        chosen.losses(model(x), y).mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
