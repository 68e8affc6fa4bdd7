"""Whose log Z(s) is believed: weights healthy enough, and not refuted by the bound of another run.

Gibbs: log Z(s) >= -(path_kl + s E) for every run. An estimate significantly below has missed a mode that guidance found.
"""

import math

import numpy as np

from tiltlens.estimates import mbar
from tiltlens.estimates.bounds import log_z_floor
from tiltlens.estimates.importance import LOG_Z_ROOT, level, relative_variance, tilt
from tiltlens.estimates.pool import Pool
from tiltlens.estimates.samples import Samples

SIGNIFICANT = 3.0  # standard errors
RATIO = 1.05
NOTHING = 0.05  # l times the deviation of E


def trusted(run: Samples, strength: float, root: float, floor: tuple[float, float]) -> tuple[float, float]:
    """log Z(s) from a run's weights, and its `relative_variance`; NaN where collapsed or refuted.

    root: LOG_Z_ROOT or KL_ROOT; floor: `log_z_floor` at s.
    """
    variance = relative_variance(run, strength, root)
    if np.isnan(variance):
        return np.nan, np.nan
    log_z = float(tilt(run, strength).log_z)
    return (np.nan, np.nan) if refuted(log_z, np.sqrt(variance), floor) else (log_z, variance)


def refuted(log_z: float, se: float, floor: tuple[float, float]) -> bool:
    """Whether an estimate of log Z lies significantly below a floor, (value, standard error)."""
    return log_z + SIGNIFICANT * np.hypot(se, floor[1]) + 1e-9 * (1 + abs(floor[0])) < floor[0]


def best_source(samples: list[Samples], strength: float, root: float, pooled: bool) -> int | None:
    """The run whose weights for q_s give log Z best, among the healthy and not refuted; None without any.

    pooled: runs are known together, too (MBAR); then that at s, the unguided one and those whose weights are `level` speak
    alone. Any other, read beyond its own strength, passes for healthy most often where it missed the tail.
    """
    floor = log_z_floor(samples, strength)
    may = [
        not pooled or run.strength in (0.0, strength) or (run.log_w is not None and level(run, strength))
        for run in samples
    ]
    variance = [trusted(run, strength, root, floor)[1] if m else np.nan for run, m in zip(samples, may)]
    return int(np.nanargmin(variance)) if np.isfinite(variance).any() else None


def trusted_log_z(
    samples: list[Samples], top: float, pool: Pool | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """l (L,), then log Z(l) and its variance from every run (runs, L), NaN where it is not trusted; last MBAR's, where
    there is a pool.

    The grid is geometric, up to `top` from where the tilt is nothing yet; its ratio of 1.05 puts a supremum over l at
    most 0.1 % low.
    """
    spread = float(samples[0].energy.std())
    low = min(1e-3 * top, NOTHING / spread) if spread * top > NOTHING else 1e-3 * top
    l = np.geomspace(low, top, 1 + math.ceil(math.log(top / low) / math.log(RATIO)))  # noqa: E741
    floors = [log_z_floor(samples, x) for x in l]
    found = [[trusted(run, x, LOG_Z_ROOT, floor) for x, floor in zip(l, floors)] for run in samples]
    if pool is not None:
        found.append([_pooled(pool, x, floor) for x, floor in zip(l, floors)])
    return l, *np.moveaxis(np.array(found), -1, 0)


def _pooled(pool: Pool, strength: float, floor: tuple[float, float]) -> tuple[float, float]:
    """As `trusted`, by MBAR."""
    draws = mbar.trusted_draws(pool, strength)
    if draws < mbar.floor(pool, LOG_Z_ROOT):
        return np.nan, np.nan
    log_z, variance = float(mbar.evaluate(pool, np.array([strength])).log_z[0]), 1 / draws
    return (np.nan, np.nan) if refuted(log_z, np.sqrt(variance), floor) else (log_z, variance)
