import numpy as np

from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_sums
from gradiometer.stats_core.successive import Previous, step_sums


def previous(moments: Moments) -> Previous:
    sums = noise_sums(moments)
    return Previous(moments.mean, sums.batch_variance, sums.mean_sq_norm)


def test_the_step_to_step_variance_is_absent_on_the_first_step() -> None:
    sums = step_sums(Previous.zeros_like(np.ones(2)), Previous(np.ones(2), np.float64(0.0), np.float64(2.0)))
    assert np.isnan([float(v) for v in sums.values()]).all()


def test_independent_steps_have_a_variance_ratio_of_one() -> None:
    # 400 pairs of steps, B = 16, 50 elements: rho has sd about sqrt(3/(2*400*50)) + noise of P; bound 4 sd = .035.
    rng = np.random.default_rng(1)
    before, top, bottom = None, 0.0, 0.0
    for _ in range(401):
        moments = Moments.from_per_example(rng.standard_normal((16, 50)) + 3)
        now = previous(moments)
        if before is not None:
            sums = step_sums(before, now)
            top, bottom = top + float(sums["step_variance"]), bottom + float(sums["step_variance_expected"])
        before = now
    assert abs(top / bottom - 1) < 0.035
