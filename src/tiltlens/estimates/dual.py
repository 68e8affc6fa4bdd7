"""The dual: which strength meets a constraint, and what certifies it.

Least KL(q||p) subject to a mean activation E_q[a] >= c has the solution q_s with E_{q_s}[a] = c (for the energy
E = -a; the concave dual -log Z(s) - s E is largest there); "at most c nats" has KL(q_s||p) = c. On MBAR's smooth
curve both are one equation in s, solved by Newton kept inside a bracket:

    d E_{q_s}[a]/ds = -Cov_{q_s}(a, E),   d KL(q_s||p)/ds = s Var_{q_s}(E)

The certificate is that of a strength that was *sampled*, so that its images exist: the value reached there and its
error, KL there, and the least KL that any law with that mean activation has, sup_t [t c - log E_p exp(t a)], from
the same draws. Where the curve's trust ends before the target, a strength a little beyond is tried; where that
extends nothing the sampled law q' itself is asked: its mean activation (or its path_kl, the most it can have spent)
is interpolated over the strengths, and KL(q'||p) is bracketed by kl_lower and path_kl. Where it meets the target and
more rows there would make its weights healthy (particles: enough lineages), so many are asked for: q_s* then speaks.
"""

from typing import NamedTuple

import numpy as np

from tiltlens.estimates.dual_curve import Curve
from tiltlens.estimates.importance import GROUPS_MIN, KL_ROOT, rows_needed
from tiltlens.estimates.pool import pool_draws
from tiltlens.estimates.table import read_groups

KINDS = ("activation", "kl")
NEAR = 0.01  # of the way from natural to target: as good as met where a standard error is smaller still
SHARP = 0.15  # of that way: a standard error above it meets anything, and says nothing
FIRST = (1 / 3, 2 / 3, 1.0)  # of the strength guessed from natural samples: the first sweep
STEP_UP = 4.0  # a strength beyond all sampled ones is at most so many times the largest
BEYOND = 1.25  # times the end of trust: where to sample to move it
APART = 2.0  # the factor between two strengths from which one must have more than the other
MARGIN = 1.2  # of the rows that would let weights speak: their share is an estimate
FLAT = 2.0  # standard errors: two strengths whose means differ by less have reached the end


class Certificate(NamedTuple):
    """What is known of one unit's constraint.

    status: reached (within one standard error, of at most SHARP of the way from natural), natural (p meets it already: s = 0), infeasible, open (more samples are
    needed), lost (rows were sampled above strength 0, and none of them is finite). law: of which the certificate speaks, "q_s" or "sampled". strength: s*, sampled; solution: where the curve
    meets the target. value, value_se: reached there. kl, kl_se: KL(q_s*||p); kl_least: of any law with this mean activation, for
    kind "kl" with this mean energy; kl_most: path_kl, of the sampled law. reach: (least, most) that is natural, certified or sampled. propose: strengths to sample next.
    Where it is reached by NEAR alone, off by more than its small error, a closer one.
    enlarge: how many times as many rows at `strength` would make the error small enough or, where it is, let q_s* be certified; 1
    where nothing is wanting, or where no number would do.
    """

    status: str
    law: str
    target: float
    strength: float | None = None
    solution: float | None = None
    value: float | None = None
    value_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    kl_least: float | None = None
    kl_most: float | None = None
    reach: tuple[float, float] = (np.nan, np.nan)
    propose: tuple[float, ...] = ()
    enlarge: float = 1.0


def certify(kind: str, target: float, table: dict, pilot: dict | None, rows: list[dict]) -> Certificate:
    """What one unit's samples say of a constraint.

    kind: "activation" (mean activation, raw, at least target) or "kl" (nats). table, pilot: as `estimate_curve` takes
    them; rows: what it gave. Raises ValueError for another kind, or where no natural sample is there to start from.
    """
    if kind not in KINDS:
        raise ValueError(f"a constraint of kind {kind!r}: expected one of {', '.join(KINDS)}")
    groups = [g for g in read_groups(table, pilot) if len(g.samples)]
    runs = [g.samples for g in groups]
    pool = pool_draws(runs)
    if pool is None:
        raise ValueError(
            "a constraint is solved from natural samples on: expected a pilot or rows of strength 0, and found none that is finite"
        )
    curve = Curve(runs, [g.activation for g in groups], kind, pool)
    natural = float(curve(np.zeros(1))[0][0])
    by_strength = {r["strength"]: r for r in rows}
    sampled, known = _sampled(kind, rows), _known(curve, by_strength)
    certified = float(curve(np.array([curve.top]))[0][0]) if curve.top else natural
    ends = [certified, *(v for _, v, _ in known)]
    seen = [natural, *ends, *(v for _, v, _ in sampled)]
    reach = (min(seen), max(seen))
    if target <= natural:
        se = curve.mean(0.0)[1] if kind == "activation" else 0.0
        return Certificate("natural", "q_s", target, 0.0, 0.0, natural, se, 0.0, 0.0, 0.0, None, reach)
    solution = curve.solve(target)
    if not any(by_strength):  # natural samples alone
        return Certificate("open", "q_s", target, reach=reach, propose=first_sweep(curve, target, solution))
    if known and target <= max(ends):
        s, value, se = min(known, key=lambda x: abs(x[1] - target))
        slope = float(curve(np.array([s]))[1][0])
        good, wider = meets(value, se, target, natural)
        if solution is None:
            solution = _between(kind, target, natural, known)
        elif s <= curve.top and slope > 0:  # a step of Newton's from what is known best
            solution = float(np.clip(s + (target - value) / slope, s / 2, min(2 * s, curve.top)))
        kl, kl_se = by_strength[s]["kl"], by_strength[s]["kl_se"]
        least = kl if kind == "kl" or curve.linear else curve.least_kl(value)
        met = "reached" if good and wider == 1 else "open"
        more = () if good else (tidy(solution, by_strength),)
        wider = wider if good else 1.0
        return Certificate(
            met, "q_s", target, s, solution, value, se, kl, kl_se, least, None, reach, more, wider
        )
    most = max(float(g.activation.max()) for g in groups if not g.samples.strength)
    found = _of_sampled(
        kind, target, natural, sampled, by_strength, reach, kind == "activation" and target <= most
    )
    if kind == "activation" and not curve.linear and found.value is not None:
        found = found._replace(kl_least=curve.least_kl(found.value))
    if found.status == "lost":
        return found
    if found.status == "reached":
        run = next(run for run in runs if run.strength == found.strength)
        needed = MARGIN * rows_needed(run, run.strength, KL_ROOT)
        return found._replace(enlarge=float(needed)) if np.isfinite(needed) else found
    top = max([curve.top, *(s for s, _, _ in known)])
    ended = found.status == "infeasible" and _ended(curve, target)
    tried = any(top < s <= BEYOND**2 * top for s, _, _ in sampled)
    if top and not ended and not tried and _near(curve, top, target):
        more = (tidy(BEYOND * top, by_strength), *found.propose)
        found = found._replace(status="open", propose=tuple(dict.fromkeys(more)))
    return found


def _ended(curve: Curve, target: float) -> bool:
    """Whether q_s itself has come to its end where its trust ends: three more doublings of the strength would not do."""
    low, high = curve(np.array([curve.top / APART, curve.top]))[0]
    return bool(high + 3 * max(high - low, 0.0) < target)


def _near(curve: Curve, top: float, target: float) -> bool:
    """Whether q_s, straight on from where it is known, meets the target at most two strengths of BEYOND further: further off, rows that move the
    end of trust are taken from those that look for the target."""
    if curve.kind == "kl":  # which is convex in s
        return True
    value, slope = (float(x[0]) for x in curve(np.array([top])))
    return value + max(slope, 0.0) * (BEYOND**2 - 1) * top >= target


def _known(curve: Curve, by_strength: dict[float, dict]) -> list[tuple[float, float, float]]:
    """(strength, value, error) of q_s at each sampled strength where healthy weights tell it."""
    found = []
    for s, row in by_strength.items():
        if s and row["kl"] is not None and row["kl_se"] and (s <= curve.top or curve.alone(s) is not None):
            found.append((s, *(curve.mean(s) if curve.kind == "activation" else (row["kl"], row["kl_se"]))))
    return found


def _between(
    kind: str, target: float, natural: float, points: list[tuple[float, float, float]]
) -> float | None:
    """Where the values at some strengths, and the natural one at 0, first reach the target; None if nowhere."""
    x, y = ([first, *(p[i] for p in sorted(points))] for i, first in ((0, 0.0), (1, natural)))
    j = next((j for j in range(1, len(x)) if y[j] >= target), None)
    if j is None:
        return None
    if kind != "kl" and y[j - 1] > natural:
        return _saturating(x[j - 1 : j + 1], y[j - 1 : j + 1], target, natural)
    part = (target - y[j - 1]) / (y[j] - y[j - 1])
    return float(
        x[j - 1] + (x[j] - x[j - 1]) * (np.sqrt(part) if kind == "kl" else part)
    )  # KL grows like s^2


def _saturating(x: list[float], y: list[float], target: float, natural: float) -> float:
    """Where y(s) = natural + s/(b + m s) through two points, both above natural, is the target: straight for m = 0, else a mean that
    saturates, as those of logits do. Infinite where its end lies below the target."""
    ratio = [s / (v - natural) for s, v in zip(x, y)]
    m = (ratio[1] - ratio[0]) / (x[1] - x[0])
    b, goal = ratio[1] - m * x[1], target - natural
    return b * goal / (1 - m * goal) if b > 0 and m * goal < 1 else np.inf


def _sampled(kind: str, rows: list[dict]) -> list[tuple[float, float, float]]:
    """(strength, value, error) of the sampled law q' at each strength above 0."""
    value, se = ("path_kl", "path_kl_se") if kind == "kl" else ("activation_mean", "activation_se")
    unknown = 0.0 if kind == "kl" else np.inf  # the spread of one group says nothing
    return [
        (r["strength"], r[value], unknown if r[se] is None else r[se])
        for r in rows
        if r["strength"] and r[value] is not None
    ]


def _of_sampled(
    kind: str,
    target: float,
    natural: float,
    sampled: list,
    by_strength: dict,
    reach: tuple[float, float],
    seen: bool = False,
) -> Certificate:
    """The certificate of the sampled law: the strength whose mean is nearest, or the next one to try. seen: whether there are
    natural activations above the target, which is then within reach, however flat the means on the way."""
    if not sampled:  # eta = 0 has no path_kl
        lost = all(not row["n"] for s, row in by_strength.items() if s)
        return Certificate("lost" if lost else "infeasible", "sampled", target, reach=reach)
    s, value, se = (np.array(x) for x in zip(*sampled))
    k = int(np.argmin(abs(value - target)))
    row = by_strength[float(s[k])]
    told = {
        "strength": float(s[k]), "value": float(value[k]), "value_se": float(se[k]) if np.isfinite(se[k]) else None,
        "kl_least": row["kl_lower"],
        "kl_most": row["path_kl"], "reach": reach,
    }  # fmt: skip
    good, wider = meets(value[k], se[k], target, natural)
    if not np.isfinite(se[k]):  # of one group: more of them first, where it is near
        good, wider = abs(value[k] - target) <= SHARP * (target - natural), float(GROUPS_MIN)
    if good:
        status = "reached" if wider == 1 else "open"
        closer = None
        if (
            abs(value[k] - target) > se[k]
        ):  # by NEAR alone; a unit that saturates may lie below it at every strength
            closer = _between(kind, target, natural, sampled) or _beyond(kind, target, natural, s, value)
        told |= {"propose": (tidy(closer, by_strength),) if closer is not None else ()}
        return Certificate(status, "sampled", target, solution=float(s[k]), enlarge=wider, **told)
    solution = _between(kind, target, natural, sampled)
    if solution is not None:
        told |= {"solution": solution, "propose": (tidy(solution, by_strength),)}
        return Certificate("open", "sampled", target, **told)
    apart = np.flatnonzero(s <= s[-1] / APART)
    gain, error = (
        (value[-1] - value[apart[-1]], FLAT * np.hypot(se[-1], se[apart[-1]])) if len(apart) else (1, 0)
    )
    if (
        not seen and len(s) > 3 and gain < error and gain + error < target - value[-1]
    ):  # as much again would not do
        return Certificate("infeasible", "sampled", target, **told)
    more = _beyond(kind, target, natural, s, value)
    return Certificate("open", "sampled", target, propose=(tidy(more, by_strength),), **told)


def _beyond(kind: str, target: float, natural: float, s: np.ndarray, value: np.ndarray) -> float:
    """The strength to try where the values at all strengths lie below the target."""
    x, y = [0.0, *s], [natural, *value]
    gain = np.inf
    if kind == "kl":  # grows like s^2
        gain = np.sqrt((target - natural) / max(value[-1] - natural, 1e-12))
    elif y[-1] > y[-2] > natural:
        gain = _saturating(x[-2:], y[-2:], target, natural) / x[-1]
    elif len(s) == 1 and y[-1] > natural:
        gain = (target - natural) / (y[-1] - natural)
    return float(s[-1] * np.clip(gain, 1.25, STEP_UP))


def meets(value: float, se: float, target: float, natural: float) -> tuple[bool, float]:
    """Whether the target is met within one standard error, and how many times as many rows would make that error small
    enough to mean it; 1 where it is."""
    way = target - natural
    return abs(value - target) <= max(se, NEAR * way), float(max(se / (SHARP * way), 1.0) ** 2)


def first_sweep(curve: Curve, target: float, solution: float | None) -> tuple[float, ...]:
    """Strengths up to the one that natural samples alone point to: by MBAR, else by their first two moments."""
    if solution is None:
        value, slope = (float(x[0]) for x in curve(np.zeros(1)))
        if curve.kind == "kl":
            solution = np.sqrt(2 * target) / (float(curve.runs[0].energy.std()) or 1.0)
        else:
            solution = (target - value) / slope if slope > 0 else 1.0
    return tuple(dict.fromkeys(tidy(f * solution, {}) for f in FIRST))


def tidy(strength: float, taken: dict) -> float:
    """A strength in three digits, and not one that is taken."""
    for digits in (3, 4, 6):
        short = float(f"{strength:.{digits}g}")
        if short not in taken:
            return short
    return float(strength)
