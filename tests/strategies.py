"""Hypothesis strategies: batches of per-example gradients with wild shapes and scales."""

import numpy as np
from hypothesis import strategies as st


@st.composite
def gradient_batches(draw: st.DrawFn, *, min_examples: int = 2, max_examples: int = 9) -> np.ndarray:
    """Float64 gradients of shape (batch, *param), of any scale from 1e-18 to 1e18, some with a large mean."""
    batch = draw(st.integers(min_examples, max_examples))
    shape = draw(st.sampled_from([(1,), (4,), (3, 2), (2, 1, 3)]))
    seed = draw(st.integers(0, 2**32 - 1))
    scale = 10.0 ** draw(st.integers(-18, 18))
    ratio = draw(st.sampled_from([0.0, 1.0, 100.0]))
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((batch, *shape)) + ratio * rng.standard_normal(shape)) * scale
