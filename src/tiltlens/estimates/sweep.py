"""log Z(s) and KL(q_s||p) over a sweep: which estimate is believed at which strength.

    d log Z/ds = -m(s),   dm/ds = -Var_{q_s}(E),   KL(q_s||p) = -s m(s) - log Z(s)

`kl_method` of a strength, the first that holds:

- exact: s = 0.
- importance, reweighted-prior, reweighted-neighbour: some run (the guided run at s; unguided samples; a run
  at another strength, see `importance.reweight`) has weights for q_s healthy enough for KL. Of several, the
  one with the smallest variance of log Z^, 1/ESS - 1/n by trusted ESS.
- thermodynamic: the strength below is known and the guided mean may stand in for m(s). log Z is carried on
  by the corrected trapezium (cubic Hermite), int_a^b m = h (m_a + m_b)/2 + h^2 (Var_b - Var_a)/12. A guided
  mean is *biased* (q' is not q_s): it stands in only if at the last known strength s_T it was measured right
  to 10 % of the shift m(0) - m(s_T), error included, and only up to 2 s_T; that bias enters the error.
- bounds: nothing above holds, kl is not given; path_kl and kl_lower bound what was sampled, and KL(q_s||p),
  which never falls with s, is at least its last known value. log_z (and with it the gap) is given where some
  run's weights are healthy enough for Z.

Weights of modest ESS do not help an integral out: m(s) suffers more from a missed tail than Z does.

An estimate of log Z is refuted, and not used, where it lies more than three standard errors below -(path_kl +
l E) of some run (Gibbs: it missed a mode that guidance found). Nothing bounds log Z from above without a
bound on E: E might have a heavy tail that no sample shows. So a collapsed strength gets no number, whatever
its bootstrap says.

No MBAR: it wants samples of the states q_k, each state's energy known on every sample. Here q_k was not
sampled (Q_k was), and dP/dQ_k is known along the paths of run k alone; treating guided samples as q_k's would
hide their bias in small errors.
"""

from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from tiltlens.estimates.bounds import log_z_floor
from tiltlens.estimates.importance import KL_ROOT, LOG_Z_ROOT, ess_floor, reweight, tilt, trusted_ess
from tiltlens.estimates.samples import Samples

STAND_IN = 0.1  # of the shift of mean energy: the bias at which a guided mean may stand in for m(s)
REACH = 2.0  # times the last known strength: how far it may
SIGNIFICANT = 3.0  # standard errors


class Node(NamedTuple):
    """How one strength is estimated.

    source: index of the run that gives m(s) (thermodynamic: as its plain mean; bounds: log Z alone), None
    without any; bias: of m(s), as far as it was measured.
    """

    strength: float
    method: str
    source: int | None = None
    bias: float = 0.0


class Sweep(NamedTuple):
    """Values along a sweep, each (..., K), NaN where unknown.

    log_z, kl in nats; energy = m(s); drift: log Z minus its integral from the node below.
    """

    log_z: np.ndarray
    kl: np.ndarray
    energy: np.ndarray
    drift: np.ndarray


def trusted(run: Samples, strength: float, root: float, floor: tuple[float, float]) -> tuple[float, float]:
    """log Z(s) from a run's weights, and its variance, 1/ESS - 1/n; NaN where collapsed or refuted.

    root: LOG_Z_ROOT or KL_ROOT; floor: `log_z_floor` at s. Runs are compared by this variance, of
    trusted ESS: plain 1/ESS is least for the run that was luckiest, and to choose by it chooses the error.
    """
    if run.log_w is None or len(run) < 2:
        return np.nan, np.nan
    ess = trusted_ess(reweight(run, strength))
    if ess < ess_floor(len(run), root):
        return np.nan, np.nan
    log_z, variance = float(tilt(run, strength).log_z), max(1 / ess - 1 / len(run), 0.0)
    slack = SIGNIFICANT * np.hypot(np.sqrt(variance), floor[1]) + 1e-9 * (1 + abs(floor[0]))
    return (log_z, variance) if log_z + slack >= floor[0] else (np.nan, np.nan)


def best_source(samples: list[Samples], strength: float, root: float) -> int | None:
    """The run whose weights for q_s give log Z best, among the healthy and not refuted; None without any."""
    floor = log_z_floor(samples, strength)
    variance = [trusted(run, strength, root, floor)[1] for run in samples]
    return int(np.nanargmin(variance)) if np.isfinite(variance).any() else None


def trusted_log_z(samples: list[Samples], top: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """l (L,), then log Z(l) and its variance from every run (runs, L), NaN where a run is not trusted.

    The grid is geometric, up to `top`; its ratio of 1.05 puts a supremum over l at most 0.1 % low.
    """
    l = top * np.geomspace(1e-3, 1.0, 143)  # noqa: E741
    floors = [log_z_floor(samples, x) for x in l]
    found = [[trusted(run, x, LOG_Z_ROOT, floor) for x, floor in zip(l, floors)] for run in samples]
    return l, *np.moveaxis(np.array(found), -1, 0)


def decide(samples: list[Samples]) -> list[Node]:
    """A node for each strength sampled, and for 0, in order (samples sorted by strength)."""
    strengths = sorted({0.0, *(run.strength for run in samples)})
    own = {run.strength: k for k, run in enumerate(samples)}
    nodes: list[Node] = []
    for s in strengths:
        source = own.get(s) if s == 0 else None
        source = best_source(samples, s, KL_ROOT) if source is None else source
        if s == 0:
            nodes.append(Node(s, "exact", source))
        elif source is not None:
            name = "importance" if source == own[s] else "reweighted-neighbour"
            nodes.append(Node(s, name if samples[source].strength > 0 else "reweighted-prior", source))
        elif (bias := _stand_in_bias(samples, nodes, own, s)) is not None:
            nodes.append(Node(s, "thermodynamic", own[s], bias))
        else:
            nodes.append(Node(s, "bounds", best_source(samples, s, LOG_Z_ROOT)))
    return nodes


def _stand_in_bias(
    samples: list[Samples], nodes: list[Node], own: dict[float, int], s: float
) -> float | None:
    """The bias to expect of the guided mean at s, from that at the last known strength; None if too large."""
    known = [n for n in nodes if n.method not in ("exact", "thermodynamic", "bounds")]
    if not known or nodes[0].source is None or nodes[-1].method == "bounds":
        return None
    if s > REACH * known[-1].strength or len(samples[own[s]]) < 2:
        return None
    guided, node = samples[own[known[-1].strength]], known[-1]
    reference, natural = tilt(samples[node.source], node.strength), tilt(samples[nodes[0].source], 0.0)
    se = np.sqrt(guided.energy.var() / len(guided) + reference.variance / reference.ess)
    shift = abs(natural.energy - reference.energy)
    off = abs(guided.energy.mean() - reference.energy) + se
    if off > STAND_IN * shift:
        return None
    return float(off / shift * abs(natural.energy - samples[own[s]].energy.mean()))


def evaluate(nodes: list[Node], samples: list[Samples], counts: list[np.ndarray]) -> Sweep:
    """The sweep's values for given counts of every run's samples, [(..., n_k)]."""
    columns, before = [], None
    for node in nodes:
        s, log_z, m, variance, drift = node.strength, *np.full((4, *counts[0].shape[:-1]), np.nan)
        if node.method == "thermodynamic":
            run, c = samples[node.source], counts[node.source]
            m = c @ run.energy / c.sum(-1)
            variance = c @ run.energy**2 / c.sum(-1) - m**2
        elif node.source is not None:
            log_z, m, variance = tilt(samples[node.source], s, counts[node.source])[:3]
            m = np.full_like(m, np.nan) if node.method == "bounds" else m
        log_z = np.zeros_like(m) if s == 0 else log_z
        if before is not None:
            s_0, log_z_0, m_0, variance_0 = before
            carried = log_z_0 - (s - s_0) * (m_0 + m) / 2 - (s - s_0) ** 2 * (variance - variance_0) / 12
            log_z = carried if node.method == "thermodynamic" else log_z
            drift = log_z - carried
        columns.append(Sweep(log_z, -s * m - log_z, m, drift))
        before = (s, log_z, m, variance)  # NaN where m is not known: nothing is carried on from there
    return Sweep(*(np.stack(x, -1) for x in zip(*columns)))


def quadrature_errors(nodes: list[Node], sweep: Sweep) -> np.ndarray:
    """(K,) how far the Hermite rule is from the integral of a monotone interpolant (PCHIP) of the same m(s),
    nats.

    PCHIP takes its slopes from m alone and so shares no error of the variances. Errors add up along strengths
    that are integrated one from the other. Infinite where m is unknown at either end of the interval below, 0
    at s = 0.
    """
    s = np.array([n.strength for n in nodes])
    errors = np.where(s > 0, np.inf, 0.0)
    for k in range(1, len(nodes)):
        first = k
        while first > 0 and np.isfinite(sweep.energy[first - 1]):
            first -= 1
        if not np.isfinite(sweep.energy[k]) or first == k:
            continue
        monotone = PchipInterpolator(s[first : k + 1], np.minimum.accumulate(sweep.energy[first : k + 1]))
        hermite = sweep.log_z[k - 1] - sweep.log_z[k] + sweep.drift[k]
        errors[k] = abs(float(monotone.integrate(s[k - 1], s[k])) - hermite)
        if nodes[k].method == "thermodynamic" and nodes[k - 1].method == "thermodynamic":
            errors[k] += errors[k - 1]
    return errors
