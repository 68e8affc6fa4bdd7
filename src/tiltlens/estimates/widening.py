"""By how much wider than the bootstrap's an error must be, for 1.96 of it to cover: weights are skewed.

The mean of n weights w >= 0 with a long upper tail is skewed, and so is its t-statistic, the other way: who missed the
tail has both mean and spread too small, and his interval ends below the truth. Johnson (Modified t tests and confidence
intervals for asymmetrical populations, 1978): where the mean has skewness g, the quantile of t that matters moves from z
to z + g (2 z^2 + 1) / 6. The skewness of n weights is itself not to be had from them, for the same reason. So they
are taken for log-normal with the trusted effective sample size e of `importance`: with R = n / e = E[w^2] / E[w]^2,

    g = (R + 2) sqrt((R - 1) / n),    factor = [1 + g (2 z^2 + 1) / (6 z)] t_{e - 1} / z,    z = 1.96

with Student's quantile for e draws. KL and m(s) are moments of the same tail, and take the same factor. No constant
here was fitted; docs/estimates.md has the coverage.
"""

from functools import lru_cache

import numpy as np
from scipy.stats import t as student

from tiltlens.estimates import mbar
from tiltlens.estimates.importance import lineages, reweight, trusted_ess
from tiltlens.estimates.pool import Pool
from tiltlens.estimates.samples import Samples

Z = 1.959964


def widening(n: float, effective: float) -> float:
    """The factor for n draws that are worth `effective`; at least 1.

    >>> [round(widening(128, e), 2) for e in (128, 100, 64, 32)]
    [1.01, 1.13, 1.29, 1.75]
    """
    effective = min(max(effective, 2.0), n)
    ratio = n / effective
    skewness = (ratio + 2) * np.sqrt((ratio - 1) / n)
    return float((1 + skewness * (2 * Z**2 + 1) / (6 * Z)) * _student(effective))


def of_run(run: Samples, strength: float) -> float:
    """Of a run's weights for q_s; of particles, of their lineages."""
    log_w = reweight(run, strength)
    effective = trusted_ess(log_w)
    if run.groups is not None:
        effective = min(effective, lineages(log_w, run.ancestor))
    return widening(len(run), effective)


def of_pool(pool: Pool, strength: float, samples: list[Samples]) -> float:
    """Of MBAR's draws for q_s; independent are the seeds."""
    return widening(*mbar.seeds_behind(pool, strength, samples))


@lru_cache(1024)
def _student(effective: float) -> float:
    return float(student.ppf(0.975, effective - 1) / Z)
