"""Thermodynamic integration: log Z from m(s), and the sweep put together from what was decided.

    log Z(b) - log Z(a) = -int_a^b m(s) ds ~ -[h (m_a + m_b)/2 + h^2 (Var_b - Var_a)/12],   h = b - a

the corrected trapezium (cubic Hermite), with dm/ds = -Var.
"""

import numpy as np
from scipy.interpolate import PchipInterpolator

from tiltlens.estimates import mbar
from tiltlens.estimates.bootstrap import Replicates
from tiltlens.estimates.importance import KL_ROOT, LOG_Z_ROOT, level
from tiltlens.estimates.pool import Pool
from tiltlens.estimates.samples import Samples
from tiltlens.estimates.sweep import MBAR, Node, Sweep
from tiltlens.estimates.widening import of_pool, of_run


def integral(strengths: np.ndarray, energy: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """int m ds over the interval before each node, (..., K); NaN at the first and where m is unknown."""
    h = np.diff(strengths)
    out = np.full(energy.shape, np.nan)
    ends = (energy[..., :-1] + energy[..., 1:]) / 2
    out[..., 1:] = h * ends + h**2 * (variance[..., 1:] - variance[..., :-1]) / 12
    return out


def quadrature_errors(strengths: np.ndarray, energy: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """(K,) how far the Hermite rule is from the integral of a monotone interpolant (PCHIP) of the same m(s), nats,
    over the interval before each node.

    PCHIP takes its slopes from m alone and so shares no error of the variances. Infinite where m is unknown at
    either end, 0 at the first node.
    """
    errors = np.full(len(strengths), np.inf)
    errors[0] = 0.0
    hermite = integral(strengths, energy, variance)
    for k in range(1, len(strengths)):
        first = k
        while first > 0 and np.isfinite(energy[first - 1]):
            first -= 1
        if np.isfinite(energy[k]) and first < k:
            falling = np.minimum.accumulate(energy[first : k + 1])
            monotone = PchipInterpolator(strengths[first : k + 1], falling)
            errors[k] = abs(float(monotone.integrate(strengths[k - 1], strengths[k])) - hermite[k])
    return errors


def shortfalls(nodes: list[Node], samples: list[Samples], pool: Pool | None) -> np.ndarray:
    """(3, K): by how much the bootstrap's errors of log_z, kl and m(s) fall short; see `widening`."""
    out = np.ones((3, len(nodes)))
    for k, node in enumerate(nodes):
        for row, source in enumerate((node.log_z, node.source, node.source)):
            if source == MBAR:
                out[row, k] = of_pool(pool, node.strength, samples)
            elif source is not None and node.strength:
                out[row, k] = of_run(samples[source], node.strength)
    return out


def disagreements(
    nodes: list[Node], found: np.ndarray, samples: list[Samples], pool: Pool | None, bootstrap: Replicates
) -> np.ndarray:
    """(3, K): how far MBAR is from the single run that was chosen for log_z, kl and m(s), as an error of the latter.

    Weights that pass for healthy pass most often where the run missed its tail, and its bootstrap does not know; the draws of
    the other runs do. Beyond two of MBAR's own errors where its draws are healthy; in full where they are not, and its error is
    none. 0 where MBAR was chosen, where there is none, and of weights so `level` that no tail is missing.

    found: `measure`d, (1 + B, 4, 3, K).
    """
    out = np.zeros((3, len(nodes)))
    for k, node in enumerate(nodes):
        if pool is None or not node.strength:
            continue
        joint = _terms(found[:, 2, :, k], node.strength)
        for row, (source, i, root) in enumerate(
            ((node.log_z, 1, LOG_Z_ROOT), (node.source, 0, KL_ROOT), (node.source, 0, KL_ROOT))
        ):
            if source in (None, MBAR) or level(samples[source], node.strength):
                continue
            single = _terms(found[:1, i, :, k], node.strength)[row]
            known = 2 * float(bootstrap.se(joint[row])) if mbar.healthy(pool, node.strength, root) else 0.0
            out[row, k] = max(abs(float(joint[row][0] - single[0])) - known, 0.0)
    return np.nan_to_num(out, posinf=0.0)


def _terms(found: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log Z, KL and m of (B, 3): log Z, m, Var."""
    return found[:, 0], -strength * found[:, 1] - found[:, 0], found[:, 1]


def compose(nodes: list[Node], found: np.ndarray) -> Sweep:
    """The sweep that the nodes chose from what was `measure`d, (..., 4, 3, K)."""
    s = np.array([n.strength for n in nodes])
    log_z, kl, m, variance = np.full((4, *found.shape[:-3], len(nodes)), np.nan)
    for k, node in enumerate(nodes):
        if node.method == "exact":
            log_z[..., k] = kl[..., k] = 0.0
        if node.log_z is not None:
            log_z[..., k] = found[..., 2 if node.log_z == MBAR else 1, 0, k]
        if node.source is not None:
            own, m[..., k], variance[..., k] = np.moveaxis(
                found[..., 2 if node.source == MBAR else 0, :, k], -1, 0
            )
            kl[..., k] = -s[k] * m[..., k] - own
        if node.method == "thermodynamic":
            m[..., k], variance[..., k] = found[..., 3, 1, k], found[..., 3, 2, k]
            area = integral(s[k - 1 : k + 1], m[..., k - 1 : k + 1], variance[..., k - 1 : k + 1])
            log_z[..., k] = log_z[..., k - 1] - area[..., 1]
            kl[..., k] = -s[k] * m[..., k] - log_z[..., k]
    return Sweep(log_z, kl, m, variance)
