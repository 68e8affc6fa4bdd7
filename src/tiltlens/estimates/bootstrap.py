"""Standard errors by the bootstrap, resampling whole seeds.

Samples of one seed share their noise at every strength, so the unit of resampling is the seed: a replicate
draws seeds with replacement and takes *all* samples of each, at all strengths, which carries every
correlation (between log Z and path_kl in a gap, between neighbouring strengths in an integral) into the
error. Of particles it is the group. The pilot's seeds are a stratum of their own. A replicate is a vector of counts, and an estimator a
function of counts, so all replicates are one matrix product. (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapters 6 and 8.)

The bootstrap reshuffles what was drawn: of collapsed weights it knows nothing that ESS does not, and its
error is then too small. `tiltlens.estimates.sweep` withholds the estimate there. Of a handful of groups the
spread is itself uncertain: errors carry the factor by which Student's 95 % interval is wider than the normal one, so
that value +- 1.96 se covers in 95 % of runs for four groups as for a hundred.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

REPLICATES = 400  # the error of a standard error is then 1 / sqrt(2 * 400) = 3.5 %
SEED = 20260517
CHUNK = 2**23  # counts held at once (64 MiB)


class Replicates(NamedTuple):
    """A statistic of all samples and of their replicates.

    values (1 + B, m): the first row is the estimate itself, so that a function of rows gives the estimate of what it
    computes, and its replicates. strata: clusters of each stratum, the plan's last.
    """

    values: np.ndarray
    strata: tuple[int, ...]

    def se(self, values: np.ndarray | None = None) -> np.ndarray:
        """Standard errors (...) of values (1 + B, ...), by default all. NaN where most replicates have no value, or
        where a stratum has one cluster."""
        drawn = (self.values if values is None else values)[1:]
        drawn = np.where(np.isfinite(drawn), drawn, np.nan)
        out = np.full(drawn.shape[1:], np.nan)
        if min(self.strata, default=0) < 2:
            return out
        found = np.isfinite(drawn).sum(0) > len(drawn) // 2
        # n draws from n have (n - 1)/n of the variance; the plan's stratum, where there is one, is the smaller
        n = self.strata[-1]
        unbiased = np.sqrt(n / (n - 1)) * small_sample(n)
        out[found] = np.nanstd(drawn[:, found], axis=0, ddof=1) * unbiased
        return out


def replicate(
    statistic: Callable[[list[np.ndarray]], np.ndarray],
    clusters: Sequence[np.ndarray],
    replicates: int = REPLICATES,
) -> Replicates:
    """A statistic of several groups of samples, and its bootstrap replicates.

    clusters: one int array (n_k,) a group; equal numbers are resampled together, across groups; numbers below
    zero are a stratum apart. statistic: takes [counts_k (B, n_k)], returns (B, m). The same input, in any order of
    samples, gives the same answer.
    """
    seeds = np.unique(np.concatenate(clusters)) if len(clusters) else np.empty(0, int)
    plan = int((seeds >= 0).sum())
    strata = tuple(size for size in (len(seeds) - plan, plan) if size)
    where = [np.searchsorted(seeds, c) for c in clusters]
    rngs = [np.random.default_rng([SEED, k]) for k in range(len(strata))]
    chunk = max(1, min(replicates, CHUNK // max(1, len(seeds) + sum(map(len, clusters)))))
    values = [statistic([np.ones((1, len(c))) for c in clusters])]
    for start in range(0, replicates, chunk):
        size = min(chunk, replicates - start)
        counts = np.concatenate([_multinomial(rng, n, size) for rng, n in zip(rngs, strata)], 1)
        values.append(statistic([counts[:, w] for w in where]))
    return Replicates(np.concatenate(values), strata)


@lru_cache(64)
def small_sample(n: int) -> float:
    """How much wider Student's 95 % interval of n clusters is than the normal one; 1 from 30 on.

    >>> [round(small_sample(n), 2) for n in (4, 8, 30)]
    [1.62, 1.21, 1.0]
    """
    return float(student.ppf(0.975, n - 1) / 1.96) if 1 < n < 30 else 1.0


def _multinomial(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    """Counts (size, n) of n draws with replacement from n seeds."""
    draws = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(draws.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
