"""log Z(s) and KL(q_s||p) over a sweep: which estimate is believed at which strength.

    d log Z/ds = -m(s),   dm/ds = -Var_{q_s}(E),   KL(q_s||p) = -s m(s) - log Z(s)

`kl_method` of a strength, the first that holds:

- exact: s = 0.
- mbar: all strengths whose weights are healthy and the samples of p, together (see `mbar`), where enough draws
  count at s.
- importance, reweighted-prior, reweighted-neighbour: one run alone (the guided run at s; unguided samples; a run at
  another strength, see `importance.reweight`, if its weights are `level` or there is nothing to pool), where its weights for q_s are healthy enough for KL. Of
  several, the one with the smallest variance of log Z^, 1/ESS - 1/n by trusted ESS. One run stands before MBAR
  only where its error of KL is clearly the smaller (CLEARLY): near the optimal control its control variate
  knows more than any overlap of strengths. Among equals a choice by the smaller error chooses the luckier
  sample, and covers too rarely. What one run cannot know of its own missing tail the others may: by how much MBAR
  disagrees with it enters its error (`integral.disagreements`).
- thermodynamic: the strength below is known and the guided mean may stand in for m(s). log Z is carried on
  by the corrected trapezium (cubic Hermite), int_a^b m = h (m_a + m_b)/2 + h^2 (Var_b - Var_a)/12. A guided
  mean is *biased* (q' is not q_s): it stands in only if at the last known strength s_T it was measured right
  to 10 % of the shift m(0) - m(s_T), error included, and only up to 2 s_T; that bias enters the error.
- bounds: nothing above holds, kl is not given; path_kl and kl_lower bound what was sampled, and KL(q_s||p),
  which never falls with s, is at least its last known value.

log_z (and with it the gap) asks for less, and is chosen for itself by the same rules: it is given where some
weights are healthy enough for Z.

Weights of modest ESS do not help an integral out: m(s) suffers more from a missed tail than Z does.

An estimate of log Z is refuted, and not used, where it lies more than three standard errors below -(path_kl +
l E) of some run (Gibbs: it missed a mode that guidance found). Nothing bounds log Z from above without a
bound on E: E might have a heavy tail that no sample shows. So a collapsed strength gets no number, whatever
its bootstrap says.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tiltlens.estimates import mbar
from tiltlens.estimates.bootstrap import Replicates
from tiltlens.estimates.bounds import log_z_floor
from tiltlens.estimates.importance import KL_ROOT, LOG_Z_ROOT, tilt
from tiltlens.estimates.mbar import Smooth
from tiltlens.estimates.pool import Pool, pool_draws
from tiltlens.estimates.samples import Samples
from tiltlens.estimates.trust import best_source, refuted

STAND_IN = 0.1  # of the shift of mean energy: the bias at which a guided mean may stand in for m(s)
REACH = 2.0  # times the last known strength: how far it may
CLEARLY = 0.8  # of MBAR's error


class Node(NamedTuple):
    """How one strength is estimated.

    source: index of the run that gives kl and m(s), MBAR, or None without any (exact, thermodynamic, bounds); log_z:
    likewise; bias: of m(s), as far as it was measured.
    """

    strength: float
    method: str
    source: int | None = None
    log_z: int | None = None
    bias: float = 0.0


MBAR = -1  # as a source


class Sweep(NamedTuple):
    """Values along a sweep, each (..., K), NaN where unknown.

    log_z, kl in nats; energy = m(s), variance = Var_{q_s}(E).
    """

    log_z: np.ndarray
    kl: np.ndarray
    energy: np.ndarray
    variance: np.ndarray


class Sources(NamedTuple):
    """Who may speak at each strength (K,): the index of a run, MBAR, or None; for kl, and for log_z alone."""

    strengths: np.ndarray
    kl: list[int | None]
    log_z: list[int | None]
    pool: Pool | None


def find_sources(samples: list[Samples], strengths: Sequence[float] | None = None) -> Sources:
    """The best single run at each strength, by default those sampled (samples sorted by them), and at 0; and the pool
    for MBAR."""
    asked = [run.strength for run in samples] if strengths is None else strengths
    strengths = np.array(sorted({0.0, *asked}))
    pool = pool_draws(samples)
    pool = pool if pool is not None and len(pool) > 1 else None
    best = [
        [best_source(samples, s, root, pool is not None) for s in strengths] for root in (KL_ROOT, LOG_Z_ROOT)
    ]
    if samples[0].strength == 0:
        best[0][0] = 0
    return Sources(strengths, *best, pool)


def measure(sources: Sources, samples: list[Samples], counts: list[np.ndarray]) -> np.ndarray:
    """(..., 4, 3, K): log Z, m and Var by the best run for kl; by the best for log_z; by MBAR; and of each strength's
    own samples as they are (log Z unknown), for given counts of every run's samples, [(..., n_k)]."""
    shape = counts[0].shape[:-1]
    out = np.full((*shape, 4, 3, len(sources.strengths)), np.nan)
    for k, s in enumerate(sources.strengths):
        for i, source in enumerate((sources.kl[k], sources.log_z[k])):
            if source is not None:
                out[..., i, :, k] = np.stack(tilt(samples[source], s, counts[source])[:3], -1)
    if sources.pool is not None:
        out[..., 2, :, :] = np.stack(mbar.evaluate(sources.pool, sources.strengths, counts), -2)
    for run, count in zip(samples, counts):
        if run.strength not in sources.strengths:
            continue
        k = int(np.searchsorted(sources.strengths, run.strength))
        c = count if run.weight is None else count * run.weight
        with np.errstate(invalid="ignore"):  # a replicate may draw nothing of a strength
            m = c @ run.energy / c.sum(-1)
            out[..., 3, 1, k], out[..., 3, 2, k] = m, c @ run.energy**2 / c.sum(-1) - m**2
    out[..., :3, 0, 0] = 0.0
    return out


def decide(sources: Sources, samples: list[Samples], found: np.ndarray, se: Replicates) -> list[Node]:
    """A node for each strength, in order. found: `measure`d, (1 + B, 4, 3, K)."""
    s = sources.strengths
    single, _, joint, plain = (Smooth(*np.moveaxis(found[:, i], 1, 0)) for i in range(4))
    kl_se = [se.se(x.kl(s)) for x in (single, joint)]
    log_z_se = [se.se(found[:, i, 0]) for i in (1, 2)]
    nodes: list[Node] = []
    for k, strength in enumerate(s):
        if strength == 0:
            nodes.append(Node(0.0, "exact", sources.kl[0]))
            continue
        kl, log_z = sources.kl[k], sources.log_z[k]
        for root, own, mine, its in (
            (KL_ROOT, kl, kl_se[0][k], kl_se[1][k]),
            (LOG_Z_ROOT, log_z, log_z_se[0][k], log_z_se[1][k]),
        ):
            pool, value = sources.pool, joint.log_z[0, k]
            may = pool is not None and mbar.healthy(pool, strength, root)
            may = may and not refuted(value, log_z_se[1][k], log_z_floor(samples, strength))
            if may and not (own is not None and mine < CLEARLY * its):
                kl, log_z = (MBAR, log_z) if root == KL_ROOT else (kl, MBAR)
        if kl is not None:
            own = samples[kl].strength if kl != MBAR else None
            name = (
                "importance"
                if own == strength
                else "reweighted-prior"
                if own == 0
                else "reweighted-neighbour"
            )
            nodes.append(Node(strength, "mbar" if kl == MBAR else name, kl, log_z))
        elif (bias := _stand_in_bias(s, nodes, single, joint, plain, se)) is not None:
            nodes.append(Node(strength, "thermodynamic", None, log_z, bias))
        else:
            nodes.append(Node(strength, "bounds", None, log_z))
    return nodes


def _stand_in_bias(
    strengths: np.ndarray, nodes: list[Node], single: Smooth, joint: Smooth, plain: Smooth, se: Replicates
) -> float | None:
    """The bias to expect of the guided mean at the next node, from that at the last known strength; None if too
    large."""
    k = len(nodes)
    known = [i for i, n in enumerate(nodes) if n.method not in ("exact", "thermodynamic", "bounds")]
    if not known or nodes[0].source is None or nodes[-1].method == "bounds":
        return None
    last = known[-1]
    if strengths[k] > REACH * strengths[last] or not np.isfinite(plain.energy[0, [last, k]]).all():
        return None
    exact = joint if nodes[last].source == MBAR else single
    shift = abs(single.energy[0, 0] - exact.energy[0, last])
    error = float(se.se(plain.energy[:, last] - exact.energy[:, last]))
    off = abs(plain.energy[0, last] - exact.energy[0, last]) + error
    if not off <= STAND_IN * shift:
        return None
    return float(off / shift * abs(single.energy[0, 0] - plain.energy[0, k]))
