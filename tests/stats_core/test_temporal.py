import numpy as np
import pytest

from gradiometer.stats_core import maxva
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.temporal import maxva_sums


def test_maxvas_columns_are_those_of_the_optimizers_own_function() -> None:
    rng = np.random.default_rng(2)
    state = TemporalMoments.zeros_like(np.zeros(20))
    for step in range(5):
        g, tau2 = rng.standard_normal(20), rng.uniform(0, 1, 20)
        sums, after, _ = maxva_sums(state, g, tau2, beta_max=0.98)
        want, q = maxva.update(state, g, tau2, beta_max=0.98)
        assert (after.s == want.s).all()
        assert float(sums["temporal_variance"]) == pytest.approx(want.s.sum())
        if step == 0:
            assert np.isnan(float(sums["deviation_sq"]))
        else:
            assert float(sums["temporal_variance_prior"]) == pytest.approx(state.s.sum())
            assert float(sums["deviation_sq"]) == pytest.approx(((g - state.u) ** 2).sum())
            assert float(sums["deviation_share"]) == pytest.approx((maxva.deviation_ratio(state, g) > 1).mean())
            assert float(sums["maxva_beta"]) == pytest.approx(maxva.maxva_beta(state, q, beta_max=0.98).mean())
        state = after
