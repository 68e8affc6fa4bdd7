"""Standard errors by the bootstrap, resampling whole seeds.

Samples of one seed share their noise at every strength, so the unit of resampling is the seed: a replicate
draws seeds with replacement and takes *all* samples of each, at all strengths, which carries every
correlation (between log Z and path_kl in a gap, between neighbouring strengths in an integral) into the
error. The pilot's seeds are a stratum of their own. A replicate is a vector of counts, and an estimator a
function of counts, so all replicates are one matrix product. (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapters 6 and 8.)

The bootstrap reshuffles what was drawn: of collapsed weights it knows nothing that ESS does not, and its
error is then too small. `tiltlens.estimates.sweep` withholds the estimate there.
"""

from collections.abc import Callable, Sequence

import numpy as np

REPLICATES = 400  # the error of a standard error is then 1 / sqrt(2 * 400) = 3.5 %
SEED = 20260517
CHUNK = 2**23  # counts held at once (64 MiB)


def standard_errors(
    statistic: Callable[[list[np.ndarray]], np.ndarray], clusters: Sequence[np.ndarray]
) -> np.ndarray:
    """Standard errors (m,) of a statistic of several groups of samples.

    clusters: one int array (n_k,) a group; equal numbers are resampled together, across groups; numbers below
    zero are a stratum apart. statistic: takes [counts_k (B, n_k)], returns (B, m). NaN where a stratum it
    needs has one member, or where the statistic has no finite value. The same input, in any order of samples,
    gives the same answer.
    """
    seeds = np.unique(np.concatenate(clusters)) if len(clusters) else np.empty(0, int)
    plan = int((seeds >= 0).sum())
    strata = [size for size in (len(seeds) - plan, plan) if size]
    where = [np.searchsorted(seeds, c) for c in clusters]
    rngs = [np.random.default_rng([SEED, k]) for k in range(len(strata))]
    chunk = max(1, min(REPLICATES, CHUNK // max(1, len(seeds) + sum(map(len, clusters)))))
    values = []
    for start in range(0, REPLICATES, chunk):
        size = min(chunk, REPLICATES - start)
        counts = np.concatenate([_multinomial(rng, n, size) for rng, n in zip(rngs, strata)], 1)
        values.append(statistic([counts[:, w] for w in where]))
    values = np.concatenate(values)
    values = np.where(np.isfinite(values), values, np.nan)
    if min(strata) < 2:
        return np.full(values.shape[1], np.nan)
    found = np.isfinite(values).sum(0) > REPLICATES // 2
    # n draws from n have (n - 1)/n of the variance; the plan's stratum, where there is one, is the smaller
    unbiased = np.sqrt(strata[-1] / (strata[-1] - 1))
    se = np.full(values.shape[1], np.nan)
    se[found] = np.nanstd(values[:, found], axis=0, ddof=1) * unbiased
    return se


def _multinomial(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    """Counts (size, n) of n draws with replacement from n seeds."""
    draws = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(draws.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
