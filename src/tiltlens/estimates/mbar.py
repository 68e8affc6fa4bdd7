"""MBAR: one smooth log Z(s), m(s), Var(s), KL(s) from the draws of all strengths together.

With N_k draws of each q_k, k = 0..K-1, and f_k = -log Z(s_k), the maximum-likelihood estimate of p is a weight
on every draw, and with it every other strength, sampled or not, is known:

    p_n ~ c_n / D(E_n),   D(E) = sum_j N_j exp(f_j - s_j E),   f_k = -log sum_n c_n exp(-s_k E_n) / D(E_n)
    Z(s) = sum_n p_n exp(-s E_n) / sum_n p_n,   m = -d log Z/ds,   Var = d2 log Z/ds2,   KL = -s m - log Z

(Shirts and Chodera, Statistically optimal analysis of samples from multiple equilibrium states, 2008; the
reduced potential is u_k(x) = s_k E(x).) f is the maximum of a concave likelihood, found by Newton. log Z is
convex and m falls *by construction*: that they do is no evidence. `audit` therefore asks single runs.

*Guided samples are not draws of q_k*: Q_k was sampled, and the weights say how q_k differs. A run of n weighted
samples stands for N_k = ESS draws, c_n = N_k W_n, and takes part where its weights are healthy. That is the
limit of re-drawing by weight (systematic, sorted: every sample as often as its weight says), without its
rounding; the equations hold for any c_n whose weighted means are those of q_k. A natural sample far out, heavy
in importance sampling, counts for less here: it shares D with the guided ones. Samples of strength 0, and the
pilot, are draws of p.

pymbar's covariance takes draws for independent; here seeds are shared by strengths and weights repeat. So errors
come from `bootstrap`, all replicates at once; the tests hold f, and for independent draws the errors, against
pymbar.
"""

from typing import NamedTuple

import numpy as np

from tiltlens.estimates.importance import cluster_ess, ess_floor
from tiltlens.estimates.pool import Pool, pool_draws
from tiltlens.estimates.samples import Samples

__all__ = [
    "Pool",
    "Smooth",
    "draws_behind",
    "evaluate",
    "expectation",
    "healthy",
    "pool_draws",
    "trusted_draws",
]

CHORD = 60  # steps at most of a replicate, which starts at the whole sample's solution
REPLICATE_TOLERANCE = 1e-4  # of N_k, that the likelihood's gradient may be off


class Smooth(NamedTuple):
    """log Z(s) in nats, m(s), Var_{q_s}(E), each (..., S) for strengths (S,)."""

    log_z: np.ndarray
    energy: np.ndarray
    variance: np.ndarray

    def kl(self, strengths: np.ndarray) -> np.ndarray:
        """KL(q_s||p) = -s m(s) - log Z(s), nats."""
        return -strengths * self.energy - self.log_z


def evaluate(pool: Pool, strengths: np.ndarray, counts: list[np.ndarray] | None = None) -> Smooth:
    """log Z, m and Var at any strengths (S,), for counts of every run's samples, [(..., n_k)], by default once each.

    Each replicate has its own maximum; NaN where a replicate drew nothing of a state, or found none.
    """
    s = np.asarray(strengths, float)
    mixed, v, top = _tilted(pool, s, counts)
    m_0 = (v * pool.weight) @ pool.energy / (v @ pool.weight)  # moments from here: no cancellation
    e = pool.energy - m_0[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        z, first, second = (mixed @ (v * e**k).T for k in range(3))
        mean = first / z
        natural = np.log(mixed @ np.exp(-pool.log_mixture + pool.log_mixture.min())) - pool.log_mixture.min()
        log_z = np.log(z) + top - np.asarray(natural)[..., None] - s * pool.centre
        return Smooth(log_z, mean + m_0 + pool.centre, second / z - mean**2)


def expectation(
    pool: Pool, strengths: np.ndarray, values: list[np.ndarray], counts: list[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """E_{q_s}[a] and Cov_{q_s}(a, E), each (..., S), of another observable, given for all runs: [(n_k,)].

    d E_{q_s}[a] / ds = -Cov_{q_s}(a, E).
    """
    a = np.concatenate([values[k] for k in pool.members])
    mixed, v, _ = _tilted(pool, np.asarray(strengths, float), counts)
    centre = a.mean()
    a = a - centre
    with np.errstate(divide="ignore", invalid="ignore"):
        z, mean, energy, both = (mixed @ (v * x).T for x in (1.0, a, pool.energy, a * pool.energy))
        mean, energy, both = mean / z, energy / z, both / z
        return mean + centre, both - mean * energy


def _tilted(
    pool: Pool, s: np.ndarray, counts: list[np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """c_n (..., N) of each replicate, exp(-s E) / D over its largest (S, N), and the logarithm of that (S,)."""
    mixed = pool.weight if counts is None else _replicates(pool, [counts[k] for k in pool.members])
    log_v = -s[:, None] * pool.energy - pool.log_mixture
    top = log_v.max(1)
    return mixed, np.exp(log_v - top[:, None]), top


def _replicates(pool: Pool, counts: list[np.ndarray]) -> np.ndarray:
    """c_n / (D*/D) of each replicate (..., N), with D* at the replicate's own f: Newton with one fixed Hessian."""
    c = []
    for k, (count, size) in enumerate(zip(counts, pool.sizes)):
        drawn = count * pool.weight[pool.state == k]
        with np.errstate(divide="ignore", invalid="ignore"):
            c.append(size * drawn / drawn.sum(-1, keepdims=True))
    c = np.concatenate(c, -1)
    if len(pool) == 1:
        return c
    inverse = np.linalg.pinv(-pool.hessian, rcond=1e-14)
    g = np.zeros((*c.shape[:-1], len(pool)))
    for _ in range(CHORD):
        ratio = c / (np.exp(g) @ pool.share)
        off = pool.sizes[1:] - np.exp(g[..., 1:]) * (ratio @ pool.share[1:].T)
        if not (np.abs(off) > REPLICATE_TOLERANCE * pool.sizes[1:]).any():
            break
        g[..., 1:] += np.clip(off @ inverse, -1, 1)
    lost = (np.abs(off) > 0.01 * pool.sizes[1:]).any(-1)
    ratio[lost] = np.nan
    return ratio


def trusted_draws(pool: Pool, strength: float) -> float:
    """How many draws the estimate at s rests on, as `importance.trusted_ess` counts: ESS, or N exp(-spread)."""
    return draws_behind(pool, -strength * pool.energy)


def draws_behind(pool: Pool, log_tilt: np.ndarray) -> float:
    """As `trusted_draws`, of the law p exp(log_tilt), given for all samples (N,)."""
    log_v = log_tilt - pool.log_mixture
    order = np.argsort(log_v)
    log_v, c = log_v[order], pool.weight[order]
    w = np.exp(log_v - log_v[-1])
    below = np.cumsum(c) / c.sum()
    median = log_v[np.searchsorted(below, 0.5)]
    upper = below >= 0.5
    spread = c[upper] @ (log_v[upper] - median) ** 2 / c[upper].sum()
    return float(min((c @ w) ** 2 / (c @ w**2), c.sum() * np.exp(-spread)))


def effective_seeds(pool: Pool, strength: float, samples: list[Samples]) -> float:
    """How many independent seeds the draws at s are worth."""
    return seeds_behind(pool, strength, samples)[1]


def seeds_behind(pool: Pool, strength: float, samples: list[Samples]) -> tuple[int, float]:
    """(number of independent seeds, `cluster_ess` of the draws at s): seeds shared by strengths count once; particles of
    one beginning likewise, each strength by itself."""
    runs = [samples[k] for k in pool.members]
    offset = 1 + max(int(run.cluster.max()) for run in runs)
    ids = []
    for run in runs:
        beginnings = (
            np.arange(len(run)) if run.ancestor is None else np.unique(run.ancestor, return_inverse=True)[1]
        )
        ids.append(run.cluster if run.weight is None else offset + beginnings)
        offset += len(run)
    ids, log_v = np.concatenate(ids), -strength * pool.energy - pool.log_mixture
    return len(np.unique(ids)), cluster_ess(pool.weight * np.exp(log_v - log_v.max()), ids)


def healthy(pool: Pool, strength: float, root: float) -> bool:
    """Whether enough draws count at this strength; root: LOG_Z_ROOT or KL_ROOT."""
    return trusted_draws(pool, strength) >= floor(pool, root)


def floor(pool: Pool, root: float) -> float:
    """The number of draws from which an estimate is believed."""
    return ess_floor(pool.sizes.sum(), root)
