"""Bounds on the KL of what was sampled, and its distance from the optimum.

Let q' be the law of the guided chain's final sample, Q its law of paths. Then, with Gibbs' inequality
at any l,

    sup_{l >= 0} [ -l E_{q'}[E] - log Z(l) ]  <=  KL(q'||p)  <=  KL(Q||P) = E_Q[path_kl]
    gap(s) = E_Q[path_kl] + s E_{q'}[E] + log Z(s) = KL(Q||Q*_s) >= 0,      Q*_s the path law of q_s

The left side is the least KL that reaches this mean energy; it is 0 at l = 0 and stays a bound when l is kept
to where log Z is known, which is how collapse is handled: the supremum is taken over the trusted l alone. A
law of *higher* energy than natural would need l < 0; guidance lowers E, and there the answer is 0.

The objective path_kl + s E has the martingale M as a control variate of known mean zero. At the optimal
control path_kl + s E + log Z = -M for every single path, so the regression leaves no noise at all and gap = 0
exactly.

Read for a fixed run and any l, the same inequality bounds log Z from below:
log Z(l) >= -(E_Q[path_kl] + l E_{q'}[E]).
An importance estimate below that has missed a mode that guidance found.
"""

from typing import NamedTuple

import numpy as np

from tiltlens.estimates.bootstrap import small_sample
from tiltlens.estimates.importance import CONTROL_MIN, GROUPS_MIN
from tiltlens.estimates.samples import Samples


class Mean(NamedTuple):
    """A mean and its standard error (NaN where fewer than 2 samples)."""

    value: np.ndarray
    se: np.ndarray


def mean(
    x: np.ndarray,
    counts: np.ndarray | None = None,
    martingale: np.ndarray | None = None,
    run: Samples | None = None,
) -> Mean:
    """Mean of x (n,) with counts (..., n), by default once each.

    With a martingale M (n,) of mean zero: mean(x) - beta mean(M), beta = cov(x, M) / var(M). run: whose rows these
    are; particles are then weighted, and the error is that of the means of groups.
    """
    if run is not None and run.weight is not None:
        return _mean_of_groups(x, counts, run)
    counts = np.ones(len(x)) if counts is None else counts
    centre = x.mean() if len(x) else 0.0
    y = x - centre
    n = counts.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = counts @ y / n
        variance = counts @ y**2 / n - value**2
        spent = 1
        if martingale is not None and len(x) >= CONTROL_MIN:
            m = martingale
            mean_m = counts @ m / n
            var_m = counts @ m**2 / n - mean_m**2
            cov = counts @ (y * m) / n - value * mean_m
            value = value - cov / var_m * mean_m
            variance = variance - cov**2 / var_m
            spent = 2
        se = np.sqrt(np.maximum(variance, 0.0) / np.maximum(n - spent, 0))
    return Mean(centre + value, se)


def _mean_of_groups(x: np.ndarray, counts: np.ndarray | None, run: Samples) -> Mean:
    """Weighted mean of particles; error of a ratio of sums over groups, NaN where they are too few to tell one."""
    weight = run.weight if counts is None else counts * run.weight
    with np.errstate(divide="ignore", invalid="ignore"):
        value = weight @ x / weight.sum(-1)
    if counts is not None:
        return Mean(value, np.full(np.shape(value), np.nan))
    sums = np.bincount(run.groups, weight * (x - value))
    n = len(sums)
    se = np.sqrt(sums @ sums * n / (n - 1)) / weight.sum() if n >= GROUPS_MIN else np.nan
    return Mean(value, se * small_sample(n))


def objective(samples: Samples, strength: float, counts: np.ndarray | None = None) -> Mean:
    """The soft-constraint objective E_Q[path_kl] + s E_{q'}[E] of a run, at any strength s; its least is -log
    Z(s).

    Nats, with M as control variate. Raises ValueError where the run recorded no path_kl.
    """
    if samples.path_kl is None:
        raise ValueError(
            f"the samples at strength {samples.strength} have no path_kl (eta = 0): no objective"
        )
    return mean(samples.path_kl + strength * samples.energy, counts, samples.martingale, samples)


def log_z_floor(samples: list[Samples], strength: float) -> tuple[float, float]:
    """max over runs of -(path_kl + s E), a lower bound on log Z(s), and the standard error of the run that
    gives it.

    The run is picked three standard errors down, lest the noisiest win. (-inf, 0) without any run with
    path_kl.
    """
    best = (-np.inf, 0.0)
    for run in samples:
        if run.path_kl is not None and len(run) > 1:
            found = objective(run, strength)
            if -found.value - 3 * found.se > best[0] - 3 * best[1]:
                best = (float(-found.value), float(found.se))
    return best


class Reach(NamedTuple):
    """Where the supremum of the lower bound is.

    value in nats; l; source: index of the run that gives log Z(l), or their number: MBAR; edge: whether its trust ends there.
    """

    value: float
    l: float  # noqa: E741
    source: int
    edge: bool


def least_kl(
    energy: float,
    l: np.ndarray,  # noqa: E741
    log_z: np.ndarray,
    variance: np.ndarray,
) -> Reach | None:
    """max_l [-l energy - log Z(l)] over l (L,); log_z and its variance: (runs, L), NaN where not trusted.

    One run gives all of log Z(.), lest the supremum pick, at each l, the run that errs most: the run of least
    variance at its own maximum, if that is inside what is trusted; else the run that reaches highest. None (
    the bound is 0, at l = 0) where nothing is above 0: mean energies at or above natural.
    """
    best, rank = None, (True, np.inf)
    for j, row in enumerate(-l * energy - log_z):
        if not np.isfinite(row).any() or not np.nanmax(row) > 0:
            continue
        k = int(np.nanargmax(row))
        edge = k + 1 == len(l) or not np.isfinite(row[k + 1])
        mine = (edge, -row[k] if edge else variance[j, k])
        if mine < rank:
            best, rank = Reach(float(row[k]), float(l[k]), j, edge), mine
    return best
