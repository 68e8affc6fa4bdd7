"""Importance sampling: log Z, mean energy and KL of the optimum q_s from weighted samples.

    Z(s) = E_Q[w],   m(s) = E_Q[w E] / Z,   KL(q_s||p) = -s m(s) - log Z(s),   ESS = 1 / sum W^2

with W = w / sum w. The weights of a run at strength s' serve any other strength, since dP/dQ is the same:
log w -> log w - (s - s') E. With s' = 0 this re-weights the unguided samples.

*Control variate.* M = sum delta.z/v has mean zero under Q. The influence of one sample on log Z^ and m^ is

    phi_Z = w / Z - 1,    phi_m = (w / Z)(E - m),    and on KL^ = -s m^ - log Z^ the sum -s phi_m - phi_Z

so that theta^ - beta mean(M), beta = cov(phi, M) / var(M), has the same limit and never a larger variance
(least squares). It is what makes KL cheap near the optimum: there w is constant and -s(E - m) = M + (path_kl
- its mean), so beta removes all that M explains. Being linear, the correction of KL is that of its two terms.

*Collapse.* Heavy weights are judged by their own few largest members: an estimate that passes a test of ESS
was also lucky. So a second, steadier judge sits beside ESS: were log w normal, ESS / n would be exp(-var log
w), and the upper half of log w tells that variance from n / 2 samples (a long lower tail harms nobody). The
smaller counts: trusted ESS. KL weighs the tail by -s E besides and needs more than Z. Simulated once, to choose (log w
normal, n = 64 to 4096, spread swept; what was chosen is measured by benchmarks/coverage.py), the worst share of runs that pass
and are wrong by more than 2 (3) of their standard errors:

    asked                               log Z          KL
    ESS >= 10                           0.31           0.64 (0.57)
    ESS >= 2 sqrt n                     0.12 (0.06)    0.36 (0.30)
    trusted ESS >= 2 sqrt n             0.09 (0.03)    0.24 (0.15)
    trusted ESS >= 4 sqrt n             0.06 (0.01)    0.18 (0.09)

Hence the floors: 3 sqrt n for Z (at 2, where few runs pass, those that do cover in 86 % only; benchmarks/coverage.py), 4 sqrt n
for m and KL, neither above n / 2 nor below 10. Particles are judged by
their groups, with Zhat_g as weights: four at least, and ten rows that count. But groups that all miss the same tail
agree with each other, and resampling leaves weights level: what tells is how many beginnings live on. Rows of one
ancestor count as one there, and 2.5 sqrt n of them are asked. (8 groups of 16 in dimension 16: at KL 3, 14 to 50 and an
error bar that covers; at KL 8, 2 to 21, all groups alike and log Z 0.5 low.) What is left errs
low. No such test sees a mode that no sample fell into, nor an exponential tail of E (there KL is 3 errors off
in half the runs).
"""

from typing import NamedTuple

import numpy as np

from tiltlens.estimates.samples import Samples

ESS_FLOOR = 10.0
LOG_Z_ROOT = 3.0  # times sqrt n: the trusted ESS that log Z asks for
LINEAGE_ROOT = 2.5  # likewise the lineages of particles
GROUPS_MIN = 4  # groups of particles from which their spread says anything
KL_ROOT = 4.0  # and that m(s) and KL ask for
LEVEL, LEVEL_LEAST = 0.8, 32.0  # of n, and in all: a trusted ESS that leaves no doubt
CONTROL_FRACTION = 0.1  # of ESS / n; below, a few weights set beta, and its noise costs more than it saves
CONTROL_MIN = 16  # samples: a regression on fewer is biased by about its own gain


class Tilt(NamedTuple):
    """Estimates of q_s from samples of another law; shape () or, for resampled counts, (B,).

    log_z in nats, energy = m(s), variance = Var_{q_s}(E); ess = 1/sum W^2, of the whole sample.
    """

    log_z: np.ndarray
    energy: np.ndarray
    variance: np.ndarray
    ess: float

    def kl(self, strength: float) -> np.ndarray:
        """KL(q_s||p) = -s m(s) - log Z(s), nats."""
        return -strength * self.energy - self.log_z


def ess_floor(n: int, root: float) -> float:
    """The trusted ESS from which n weights are believed; root: LOG_Z_ROOT or KL_ROOT."""
    return max(ESS_FLOOR, min(root * np.sqrt(n), n / 2))


def trusted_ess(log_w: np.ndarray) -> float:
    """min(ESS, n exp(-spread)) of log weights (n,); spread: mean square of the upper half from the median."""
    w = np.exp(log_w - log_w.max())
    upper = np.sort(log_w)[len(log_w) // 2 :]
    spread = np.mean((upper - np.median(log_w)) ** 2)
    return float(min(w.sum() ** 2 / (w @ w), len(log_w) * np.exp(-spread)))


def relative_variance(samples: Samples, strength: float, root: float) -> float:
    """Variance of log Z^(s) from a run's weights, 1/ESS - 1/n by trusted ESS; NaN where they are collapsed.

    root: LOG_Z_ROOT or KL_ROOT. Runs are compared by it: plain 1/ESS is least for the run that was luckiest, and to
    choose by it chooses the error.
    """
    if samples.log_w is None or len(samples) < 2:
        return np.nan
    log_w = reweight(samples, strength)
    n, ess = len(log_w), trusted_ess(log_w)
    floor = ess_floor(n, root)
    if samples.groups is not None:
        if ess < ESS_FLOOR or lineages(log_w, samples.ancestor) < ess_floor(n, LINEAGE_ROOT):
            return np.nan
        log_w = log_z_of_groups(log_w, samples.groups)
        n, ess = len(log_w), trusted_ess(log_w)
        floor = min(root * np.sqrt(n), n / 2) if n >= GROUPS_MIN else np.inf
    return max(1 / ess - 1 / n, 0.0) if ess >= floor else np.nan


def level(samples: Samples, strength: float) -> bool:
    """Whether a run's weights for q_s are so level (LEVEL) that they hide no tail: near the optimal control. Not of particles:
    resampling makes their weights level, whatever is missing."""
    ess = trusted_ess(reweight(samples, strength))
    return samples.groups is None and ess >= max(LEVEL * len(samples), LEVEL_LEAST)


def rows_needed(samples: Samples, strength: float, root: float) -> float:
    """How many times as many rows would make a run's weights healthy, were all of them like these; at least 1, infinite
    without weights."""
    if samples.log_w is None or len(samples) < 2:
        return np.inf
    log_w, n = reweight(samples, strength), len(samples)
    if samples.groups is None:
        return _times(n, trusted_ess(log_w) / n, root)
    of_groups = log_z_of_groups(log_w, samples.groups)
    count = len(of_groups)
    wanted = [_times(n, min(lineages(log_w, samples.ancestor) / n, 1.0), LINEAGE_ROOT), GROUPS_MIN / count]
    if np.isfinite(of_groups).sum() > 1:
        wanted.append(_times(count, trusted_ess(of_groups) / count, root, 0.0))
    return float(max(wanted))


def _times(n: int, share: float, root: float, least: float = ESS_FLOOR) -> float:
    """k >= 1 with share k n >= max(least, min(root sqrt(k n), k n / 2)), as `ess_floor` asks."""
    if not share * n > 1e-6:
        return np.inf  # underflow: nothing is left to count on
    return max(1.0, least / (share * n), 1.0 if share >= 0.5 else (root / share) ** 2 / n)


def lineages(log_w: np.ndarray, ancestor: np.ndarray | None) -> float:
    """Effective number of paths of different beginning among particles; infinite where it was not recorded."""
    return np.inf if ancestor is None else cluster_ess(np.exp(log_w - log_w.max()), ancestor)


def log_z_of_groups(log_w: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """log Zhat_g of each group: the logarithm of the mean of its weights."""
    top = log_w.max()
    with np.errstate(divide="ignore"):
        means = np.bincount(groups, np.exp(log_w - top)) / np.bincount(groups)
        return top + np.log(means)


def cluster_ess(weights: np.ndarray, clusters: np.ndarray) -> float:
    """Effective number of independent clusters among weights (n,) >= 0: (sum_c w_c)^2 / sum_c w_c^2."""
    w = np.bincount(np.unique(clusters, return_inverse=True)[1], weights)
    return float(w.sum() ** 2 / (w @ w))


def reweight(samples: Samples, strength: float) -> np.ndarray:
    """log w (n,) of a run's samples for another strength u: log w_u = log w - (u - s) E, E_Q[w_u] = Z(u).

    Raises ValueError where the run recorded no weights (eta = 0).
    """
    if samples.log_w is None:
        raise ValueError(
            f"the samples at strength {samples.strength} carry no importance weights (eta = 0): "
            "expected log_w; re-weight samples of strength 0, or sample with eta > 0"
        )
    return samples.log_w + (samples.strength - strength) * samples.energy


def tilt(
    samples: Samples, strength: float, counts: np.ndarray | None = None, values: np.ndarray | None = None
) -> Tilt:
    """log Z(u), m(u) and Var of q_u, u = strength, from a run at any strength with weights; mean and variance of
    another observable, where its values (n,) are given.

    counts: (..., n) how often each sample is drawn, (by default once); the bootstrap passes (B, n). The
    control variate is used when the whole sample has ESS / n >= 0.1 and n >= 16. Raises ValueError without
    weights.
    """
    counts = np.ones(len(samples)) if counts is None else counts
    log_w = reweight(samples, strength)
    shift = log_w.max()
    w = np.exp(log_w - shift)  # at most 1; what underflows is below 1e-300 of the largest
    total = w.sum()
    ess = float(total**2 / (w @ w))
    if samples.groups is not None:
        of_groups = np.bincount(samples.groups, w)  # of rows, no more than what its groups are worth
        ess = min(ess, len(w) * float(total**2 / (of_groups @ of_groups)) / len(of_groups))
    observed = samples.energy if values is None else values
    centre = w @ observed / total  # E is measured from here: E + c then changes log Z alone
    e = observed - centre
    columns = np.stack([np.ones_like(w), w, w * e, w * e**2], 1)
    n, sum_w, sum_we, sum_wee = np.moveaxis(counts @ columns, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may miss every weight that counts
        log_z = shift + np.log(sum_w / n)
        energy = sum_we / sum_w
        variance = sum_wee / sum_w - energy**2
    m = samples.martingale
    if m is not None and len(m) >= CONTROL_MIN and ess >= CONTROL_FRACTION * len(m):
        sum_m, sum_mm, sum_wm, sum_wem = np.moveaxis(counts @ np.stack([m, m**2, w * m, w * e * m], 1), -1, 0)
        mean_m = sum_m / n
        var_m = sum_mm / n - mean_m**2
        log_z = log_z - (sum_wm / sum_w - mean_m) / var_m * mean_m
        energy = energy - (sum_wem - energy * sum_wm) / sum_w / var_m * mean_m
    return Tilt(log_z, centre + energy, variance, ess)
