"""What a sweep's own consistency says of it, before anything is reported.

log Z is convex with slope -m(s) and m falls with s; log Z >= -(path_kl + l E) for every run; KL(q_s||p) rises
with s. An integral that breaks these, or whose quadrature is as uncertain as its value, is withheld;
weights that break them are reported with a warning. Nothing is clipped: that would turn a bound
into an estimate. MBAR keeps these laws by construction, so it is held against the m(s) of single runs:
thermodynamic integration is the cross-check of whatever gave log Z.
"""

from typing import NamedTuple

import numpy as np

from tiltlens.estimates.bootstrap import Replicates
from tiltlens.estimates.bounds import log_z_floor
from tiltlens.estimates.importance import GROUPS_MIN
from tiltlens.estimates.integral import compose, disagreements, integral, quadrature_errors, shortfalls
from tiltlens.estimates.samples import Samples
from tiltlens.estimates.sweep import Node, Sources, Sweep, decide
from tiltlens.estimates.trust import SIGNIFICANT

COLLAPSED = "no run has importance weights for it that are healthy"
REMEDY = " More samples, strengths in between, or particles would help."
MORE_GROUPS = " More groups, more particles in each, or strengths in between would help."
QUADRATURE = 0.1  # of KL: an integral this uncertain, and more than its standard error, is withheld


class Settled(NamedTuple):
    """What may be reported at each strength of a sweep, and what it was made of.

    nodes: (K) by what source; value, se: after the audit, (K,) each; methods: a kl_method each; composed: log Z, KL and m by the nodes' sources,
    (1 + B, K) over the bootstrap; wider, apart: (3, K) of log Z, KL and m, by how much the bootstrap's errors fall short and what they have
    besides; warnings.
    """

    nodes: list[Node]
    value: Sweep
    se: Sweep
    methods: list[str]
    composed: Sweep
    wider: np.ndarray
    apart: np.ndarray
    warnings: list[str]


def settle(sources: Sources, samples: list[Samples], found: np.ndarray, bootstrap: Replicates) -> Settled:
    """Decide what gives log Z and KL at each strength of sources, withhold what contradicts itself, and say so.

    found: (1 + B, 4, 3, K) what `measure` says of sources and samples over the bootstrap's counts. The errors of
    an integral come back with those of its quadrature and of its biased means.
    """
    nodes = decide(sources, samples, found, bootstrap)
    composed, single = compose(nodes, found), found[:, 0]
    single = Sweep(single[:, 0], single[:, 0] + np.nan, single[:, 1], single[:, 2])
    apart = disagreements(nodes, found, samples, sources.pool, bootstrap)
    wider = shortfalls(nodes, samples, sources.pool)
    value, se, methods, said = _withhold(nodes, samples, composed, wider, apart, bootstrap)
    s = np.array([n.strength for n in nodes])
    said += _contradictions(s, composed, single, wider.max(0), apart[0], bootstrap)
    return Settled(nodes, value, se, methods, composed, wider, apart, said)


def _withhold(
    nodes: list[Node],
    samples: list[Samples],
    sweep: Sweep,
    wider: np.ndarray,
    apart: np.ndarray,
    bootstrap: Replicates,
) -> tuple[Sweep, Sweep, list[str], list[str]]:
    """(values, standard errors, a kl_method each (K,), warnings)."""
    s = np.array([n.strength for n in nodes])
    value, se = (Sweep(*(f(x) for x in sweep)) for f in (lambda x: x[0].copy(), bootstrap.se))
    methods = [n.method for n in nodes]
    for x, factor, off in zip((se.log_z, se.kl, se.energy), wider, apart):
        x[:] = np.hypot(x * factor, off)
    quadrature = quadrature_errors(s, value.energy, value.variance)
    for k in range(1, len(nodes)):
        if nodes[k].method == nodes[k - 1].method == "thermodynamic":
            quadrature[k] += quadrature[k - 1]
    warnings, last = [], 0.0
    remedy = MORE_GROUPS if any(run.groups is not None for run in samples) else REMEDY
    for k, node in enumerate(nodes):
        at = f"strength {node.strength:g}:"
        reason = _too_few(node.strength, samples) or COLLAPSED
        if node.method == "thermodynamic":
            statistical, bias = float(se.kl[k]), node.strength * node.bias
            for x in (se.log_z, se.kl):
                x[k] = np.sqrt(x[k] ** 2 + bias**2 + quadrature[k] ** 2)
            se.energy[k] = np.hypot(se.energy[k], node.bias)
            reason = _flaw(methods[k - 1], quadrature[k], statistical, k, value, se, samples, node)
            if reason:
                methods[k] = "bounds"
                value.log_z[k] = se.log_z[k] = np.nan
            else:
                warnings.append(
                    f"{at} log_z and kl are integrated from means of the guided samples, a biased "
                    f"stand-in for m(s); the bias to expect, {node.bias:.2g} in energy, is in their errors."
                )
        if methods[k] == "bounds":
            value.kl[k] = se.kl[k] = np.nan
            least = (
                f"; KL(q_s||p) is at least {last:.3g} nats, the most at a smaller strength"
                if last > 0
                else ""
            )
            warnings.append(
                f"{at} no kl, only bounds: {reason}{least}{'' if np.isfinite(value.log_z[k]) else '; no log_z and no gap either'}."
                f"{remedy if reason == COLLAPSED else ''}"
            )
            continue
        last = max(last, float(value.kl[k]))
    return value, se, methods, warnings


def _too_few(strength: float, samples: list[Samples]) -> str | None:
    """Of particles: groups are what is independent, and fewer than four tell no error, however healthy their weights."""
    run = next((run for run in samples if run.strength == strength and run.groups is not None), None)
    count = len(np.unique(run.groups)) if run else GROUPS_MIN
    if count >= GROUPS_MIN:
        return None
    return (
        f"{count} group{'s' * (count != 1)} of particles tell no error, {GROUPS_MIN} at least do (data.n of {GROUPS_MIN} "
        "groups or more, or smaller groups)"
    )


def _contradictions(
    s: np.ndarray, sweep: Sweep, single: Sweep, wider: np.ndarray, apart: np.ndarray, bootstrap: Replicates
) -> list[str]:
    """Where m(s) rises, log Z is not convex, or log Z is not the integral of -m(s), beyond errors.

    wider, apart: (K,) by how much the bootstrap's errors fall short, and what log Z's error has besides.
    """
    wider = np.maximum(wider[1:], wider[:-1])
    apart = np.hypot(apart[1:], apart[:-1])
    quadrature = quadrature_errors(s, single.energy[0], single.variance[0])
    rise, step = np.diff(single.energy), np.diff(sweep.log_z)
    h, m = np.diff(s), single.energy
    checks = (
        (
            rise,
            np.zeros(len(h)),
            1,
            "the mean energy m(s) rises with s, which no exact tilt does: do not trust kl.",
        ),
        (
            step + integral(s, m, single.variance)[:, 1:],
            quadrature[1:] + 1e-9 * h,
            0,
            "log Z and the integral of m(s) of single runs differ by {:+.2g} nats: a mode may be missed, or the sweep "
            "is coarse here.",
        ),
        (
            -(step + h * m[:, :-1]),
            1e-9 * h,
            1,
            "log Z falls faster than its slope, -m(s), at the strength below: it is not convex here; do not trust kl.",
        ),
        (
            step + h * m[:, 1:],
            1e-9 * h,
            1,
            "log Z rises faster than its slope, -m(s), here: it is not convex; do not trust kl.",
        ),
    )
    found: list[tuple[int, str]] = []
    for value, slack, one_sided, text in checks:
        off = value[0] if one_sided else abs(value[0])
        with np.errstate(invalid="ignore"):
            wrong = off > SIGNIFICANT * np.hypot(wider * bootstrap.se(value), apart) + slack
        found += [(k + 1, text.format(value[0, k])) for k in np.flatnonzero(wrong)]
    return [f"strength {s[k]:g}: {text}" for k, text in sorted(found)]


def _flaw(
    below: str,
    quadrature: float,
    statistical: float,
    k: int,
    value: Sweep,
    se: Sweep,
    samples: list[Samples],
    node: Node,
) -> str | None:
    """Why an integrated log Z cannot be given; None where it can."""
    if below == "bounds":
        return "the strength below, from which log Z would be integrated, is not known"
    if quadrature > max(statistical, QUADRATURE * abs(value.kl[k])):
        return "the sweep is too coarse to integrate m(s), add strengths in between"
    floor, floor_se = log_z_floor(samples, node.strength)
    if value.log_z[k] + SIGNIFICANT * np.hypot(se.log_z[k], floor_se) < floor:
        return "the integral of m(s) contradicts log Z >= -(path_kl + s E)"
    return None
