"""The curve of one unit: recorded samples -> one row a strength.

A row says two things. What was *sampled* (the guided law q'): means of activation, z and energy, path_kl and
kl_lower, which bracket KL(q'||p), their ratio (efficiency), the ESS of the weights and the gap to the
optimum. And what the *optimum* q_s is at this strength: log_z, kl and its mean energy m(s) (optimum_energy), by
the method named in kl_method (see `sweep`). Null (None) means not defined or not to be had honestly; a warning,
one sentence, says why.
"""

import numpy as np

from tiltlens.estimates import mbar
from tiltlens.estimates.audit import settle
from tiltlens.estimates.bootstrap import replicate
from tiltlens.estimates.bounds import Mean, Reach, least_kl, mean, objective
from tiltlens.estimates.importance import tilt
from tiltlens.estimates.pool import Pool
from tiltlens.estimates.samples import Samples
from tiltlens.estimates.sweep import find_sources, measure
from tiltlens.estimates.table import Group, read_groups
from tiltlens.estimates.trust import trusted_log_z
from tiltlens.estimates.widening import of_pool, of_run

TOP = 8.0  # times the largest strength: how far the lower bound looks for the strength that q' really reached
NOTHING = Mean(np.nan, np.nan)


def estimate_curve(unit: str, table: dict, pilot: dict | None = None) -> tuple[list[dict], list[str]]:
    """Rows (sorted by strength) and warnings of one unit, whose name they carry.

    table: columns (N,), a dict of arrays or a structured array: strength, seed, activation, energy, and where
    recorded z, log_w, path_kl (None or NaN at eta = 0), finite (bool), and of particles group (the first seed of each
    group) and weight (of sum 1 in its group). pilot: columns (n,)
    energy, activation, z of unguided samples with seeds of their own, pooled into strength 0.

    Rows with a NaN, an infinity or finite = False are left out and counted (nonfinite). Units: nats for
    log_z, kl, path_kl, kl_lower, gap; samples for ess. Every *_se is one standard error. Raises ValueError
    for missing columns and columns of different lengths.
    """
    groups = read_groups(table, pilot)
    filled = [g for g in groups if len(g.samples)]
    samples = [g.samples for g in filled]
    if not samples:
        return [_row(unit, g, {}) for g in groups], [_lost(g) for g in groups if g.nonfinite]
    warnings = [_lost(g) for g in groups if g.nonfinite]

    sources = find_sources(samples)
    trust = trusted_log_z(samples, TOP * samples[-1].strength or 1.0, sources.pool)
    reach = [
        least_kl(mean(run.energy, None, run.martingale, run).value, *trust) if run.strength else None
        for run in samples
    ]
    count = len(sources.strengths)

    def everything(counts: list[np.ndarray]) -> np.ndarray:
        """(B, 12 K + 3 runs): all that is estimated, for given counts of the samples."""
        parts = [measure(sources, samples, counts).reshape(len(counts[0]), -1)]
        parts += _lower(reach, samples, sources.pool, counts)
        parts += [_cost(run, c)[:, None] for run, c in zip(samples, counts)]
        return np.concatenate(parts, -1)

    bootstrap = replicate(everything, [run.cluster for run in samples])
    ends = [12 * count + k * len(samples) for k in range(3)]
    found, lower, log_z_l, cost = np.split(bootstrap.values, ends, -1)
    settled = settle(sources, samples, found.reshape(-1, 4, 3, count), bootstrap)
    sweep, sweep_se = settled.value, settled.se
    warnings += settled.warnings
    at = [next(k for k, n in enumerate(settled.nodes) if n.strength == run.strength) for run in samples]
    gap = cost + settled.composed.log_z[:, at]
    gap_se = np.hypot(bootstrap.se(gap) * settled.wider[0, at], settled.apart[0, at])
    wider = _widened(reach, samples, sources.pool)
    lower_se = np.sqrt(bootstrap.se(lower) ** 2 + (wider**2 - 1) * bootstrap.se(log_z_l) ** 2)

    rows = []
    for group in groups:
        if not len(group.samples):
            rows.append(_row(unit, group, {"kl_method": "bounds"}))
            continue
        k = next(i for i, g in enumerate(filled) if g is group)
        run, j = samples[k], at[k]
        path_kl = mean(run.path_kl, None, None, run) if run.path_kl is not None else NOTHING
        # both are estimates, and near the optimum they meet: the truth is never the other way round (beyond errors neither
        # are they: such a log Z(l) is refuted by the run's own bound)
        least = Mean(np.fmin(lower[0, k], path_kl.value), lower_se[k])
        values = {
            "path_kl": path_kl,
            "kl_lower": least,
            "kl": Mean(sweep.kl[j], sweep_se.kl[j]),
            "log_z": Mean(sweep.log_z[j], sweep_se.log_z[j]),
            "optimum_energy": Mean(sweep.energy[j], sweep_se.energy[j])
            if np.isfinite(sweep.kl[j])
            else NOTHING,
            "gap": Mean(gap[0, k], gap_se[k]) if np.isfinite(sweep.log_z[j]) else NOTHING,
        }
        if run.strength == 0:
            values = {**dict.fromkeys(values, Mean(0.0, 0.0)), "optimum_energy": values["optimum_energy"]}
        elif path_kl.value > 0:
            values["efficiency"] = least.value / path_kl.value
        if run.log_w is not None:
            values["ess"] = tilt(run, run.strength).ess
        values["kl_method"] = settled.methods[j]
        rows.append(_row(unit, group, values))
        if reach[k] and reach[k].edge:
            warnings.append(
                f"strength {run.strength:g}: the mean energy lies beyond the reach of trusted weights "
                f"(l = {reach[k].l:.3g}): kl_lower is a bound still, but not the sharpest."
            )
    return rows, merged(warnings)


def _lower(
    reach: list[Reach | None], samples: list[Samples], pool: Pool | None, counts: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """kl_lower of every run and its log Z(l), (B, runs) each, with each supremum kept where the whole sample has it."""
    log_z, moved = np.zeros((2, len(counts[0]), len(samples)))
    joint = [k for k, best in enumerate(reach) if best and best.source == len(samples)]  # by MBAR
    if joint:
        log_z[:, joint] = mbar.evaluate(pool, np.array([reach[k].l for k in joint]), counts).log_z
    for k, best in enumerate(reach):
        if not best:
            continue
        if k not in joint:
            log_z[:, k] = tilt(samples[best.source], best.l, counts[best.source]).log_z
        moved[:, k] = -best.l * mean(samples[k].energy, counts[k], samples[k].martingale, samples[k]).value
    return moved - log_z, log_z


def _widened(reach: list[Reach | None], samples: list[Samples], pool: Pool | None) -> np.ndarray:
    """(runs,): by how much the bootstrap's error of log Z(l) falls short; see `widening`."""
    out = np.ones(len(samples))
    for k, best in enumerate(reach):
        if best and best.source == len(samples):
            out[k] = of_pool(pool, best.l, samples)
        elif best and best.l:
            out[k] = of_run(samples[best.source], best.l)
    return out


def _cost(run: Samples, counts: np.ndarray) -> np.ndarray:
    """path_kl + s E of a run, (B,); NaN without path_kl."""
    if run.path_kl is None:
        return np.full(len(counts), np.nan)
    return objective(run, run.strength, counts).value if run.strength else np.zeros(len(counts))


def merged(warnings: list[str]) -> list[str]:
    """One sentence for all strengths of which the same is to be said."""
    said: dict[str, list[str]] = {}
    for sentence in warnings:
        head, colon, text = sentence.partition(": ")
        strength = head.removeprefix("strength ") if colon and head.startswith("strength ") else ""
        said.setdefault(text if strength else sentence, []).append(strength)
    return [
        text if not strengths[0] else f"strength{'s' * (len(strengths) > 1)} {', '.join(strengths)}: {text}"
        for text, strengths in said.items()
    ]


def _lost(group: Group) -> str:
    total = group.nonfinite + len(group.samples)
    if not len(group.samples):
        return (
            f"strength {group.samples.strength:g}: none of {total} samples is finite, and nothing is said of it: try "
            "model.precision=float32, smaller strengths, or another guidance."
        )
    return (
        f"strength {group.samples.strength:g}: {group.nonfinite} of {total} samples were not finite and are "
        "left out; what is said holds for the rest."
    )


def _row(unit: str, group: Group, values: dict) -> dict:
    """One row with every key, in order; NaN becomes None."""
    described = {
        "activation": mean(group.activation, None, None, group.samples),
        "z": mean(group.z, None, None, group.samples) if group.z is not None else NOTHING,
        "energy": mean(group.samples.energy, None, None, group.samples),
    }
    row = {"unit": unit, "strength": group.samples.strength, "n": len(group.samples)}
    for name in ("activation", "z", "energy"):
        row |= _pair(f"{name}_mean", f"{name}_se", described[name])
    row |= _pair("path_kl", "path_kl_se", values.get("path_kl"))
    row |= _pair("kl_lower", "kl_lower_se", values.get("kl_lower"))
    row["efficiency"] = _number(values.get("efficiency", np.nan))
    row |= _pair("kl", "kl_se", values.get("kl"))
    row["kl_method"] = values.get("kl_method", "bounds")
    row |= _pair("log_z", "log_z_se", values.get("log_z"))
    row |= _pair("optimum_energy", "optimum_energy_se", values.get("optimum_energy"))
    row["ess"] = _number(values.get("ess", np.nan))
    row |= _pair("gap", "gap_se", values.get("gap"))
    return row | {"nonfinite": group.nonfinite}


def _pair(name: str, se: str, value: Mean | None) -> dict:
    value = value or NOTHING
    return {name: _number(value.value), se: _number(value.se) if np.isfinite(value.value) else None}


def _number(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None
