"""Other strengths from stored rows: what q_s is like where nothing was sampled.

The same estimators as the curve's (MBAR, or one run re-weighted) at any strength, and the mean activation of q_s by
the same weights. Beyond what healthy weights reach there is no number, only its ESS to say why.
"""

from typing import NamedTuple

import numpy as np

from tiltlens.estimates import mbar
from tiltlens.estimates.audit import settle
from tiltlens.estimates.bootstrap import replicate
from tiltlens.estimates.curve import merged
from tiltlens.estimates.importance import reweight, tilt, trusted_ess
from tiltlens.estimates.sweep import MBAR, find_sources, measure
from tiltlens.estimates.table import read_groups

KEYS = ("unit", "strength", "activation", "z", "energy", "kl", "log_z")


class Reweighted(NamedTuple):
    """rows, one a strength; warnings; covariance: name -> (K, K) of the estimates at the rows' strengths, whose diagonal is
    the square of their standard errors; None where an estimate or its error is not to be had."""

    rows: list[dict]
    warnings: list[str]
    covariance: dict[str, list[list[float | None]]]


@np.errstate(over="ignore")  # at 1e300 a square is inf, and what is judged by it is not trusted
def reweight_rows(unit: str, table: dict, pilot: dict | None, strengths: list[float]) -> Reweighted:
    """Rows (one a strength), warnings and covariances of one unit.

    table, pilot: as `estimate_curve` takes them. A row: unit, strength, activation_mean, z_mean, energy_mean (of q_s),
    kl, log_z, each with its _se, kl_method, ess; None where weights are not healthy. Strengths share their samples, so that a
    difference of two rows has the variance C_ii + C_jj - 2 C_ij of the covariance, mostly far below C_ii + C_jj. Raises
    ValueError where no row is finite, or where there are guided rows and none has a weight (eta = 0).
    """
    groups = [g for g in read_groups(table, pilot) if len(g.samples)]
    if not groups:
        raise ValueError(f"{unit}: no stored row is finite; there is nothing to re-weight")
    runs = [g.samples for g in groups]
    guided = [r for r in runs if r.strength]
    if guided and all(r.log_w is None for r in guided):
        raise ValueError(
            f"{unit}: the stored rows have no importance weights (log_w is null): the run was sampled with eta = 0, or by "
            "a sampler without them. Sample with eta > 0 to re-weight"
        )
    sources = find_sources(runs, strengths)
    count = len(sources.strengths)
    observed = [("activation", [g.activation for g in groups])]
    if all(g.z is not None for g in groups):
        observed.append(("z", [g.z for g in groups]))

    def everything(counts: list[np.ndarray]) -> np.ndarray:
        parts = [measure(sources, runs, counts).reshape(len(counts[0]), -1)]
        parts += [_means(sources, runs, values, counts).reshape(len(counts[0]), -1) for _, values in observed]
        return np.concatenate(parts, -1)

    bootstrap = replicate(everything, [run.cluster for run in runs])
    found, *means = np.split(bootstrap.values, [12 * count, 14 * count][: len(observed)], -1)
    settled = settle(sources, runs, found.reshape(-1, 4, 3, count), bootstrap)
    nodes, value, se, composed = settled.nodes, settled.value, settled.se, settled.composed
    energy_se = bootstrap.se(composed.energy)
    rows, kept = [], [k for k, node in enumerate(nodes) if node.strength in strengths]
    replicates = {"energy_mean": composed.energy, "kl": composed.kl, "log_z": composed.log_z}
    for k, node in enumerate(nodes):
        if node.source is not None:
            for (name, _), mean in zip(observed, means):
                column = mean.reshape(-1, 2, count)[:, int(node.source == MBAR), k]
                replicates.setdefault(f"{name}_mean", np.full((len(column), count), np.nan))[:, k] = column
    for k in kept:
        node = nodes[k]
        row = {"unit": unit, "strength": node.strength, "kl_method": settled.methods[k]}
        ess = _ess(sources, runs, k, node.source)
        if node.source is not None:
            for name, _ in observed:
                column = replicates[f"{name}_mean"][:, k]
                # of the energy's disagreement as much as of its error: the same draws are missing from either mean
                share = float(settled.apart[2, k] / energy_se[k]) if settled.apart[2, k] else 0.0
                row |= {
                    f"{name}_mean": float(column[0]),
                    f"{name}_se": float(bootstrap.se(column) * np.hypot(settled.wider[2, k], share)),
                }
            row |= {"energy_mean": float(value.energy[k]), "energy_se": float(se.energy[k])}
        for name in ("kl", "log_z"):
            row |= {name: float(getattr(value, name)[k]), f"{name}_se": float(getattr(se, name)[k])}
        rows.append(row | {"ess": ess})
    rows = [{k: _number(v) for k, v in _whole(row).items()} for row in rows]
    covariance = {
        name: _covariance(drawn[1:, kept], [row[f"{name.removesuffix('_mean')}_se"] for row in rows])
        for name, drawn in replicates.items()
    }
    return Reweighted(rows, merged(settled.warnings), covariance)


def _covariance(drawn: np.ndarray, se: list[float | None]) -> list[list[float | None]]:
    """(K, K): the replicates' correlations (B, K) with these standard errors, which know more than the replicates do."""
    se = np.array([np.nan if x is None else x for x in se])
    told = np.isfinite(se)
    whole = drawn[np.isfinite(drawn[:, told]).all(1)]
    off = whole - whole.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.sqrt((off**2).sum(0))
        correlation = np.nan_to_num((off.T @ off) / np.outer(size, size))  # what never varies has none
    np.fill_diagonal(correlation, 1.0)
    found = correlation * np.outer(se, se)
    return [[_number(float(x)) for x in row] for row in found]


def _means(sources, runs, values, counts) -> np.ndarray:
    """(B, 2, K): E_{q_s} of an observable, by the best single run and by MBAR."""
    out = np.full((len(counts[0]), 2, len(sources.strengths)), np.nan)
    for k, s in enumerate(sources.strengths):
        i = sources.kl[k]
        if i is not None:
            out[:, 0, k] = tilt(runs[i], s, counts[i], values[i]).energy
    if sources.pool is not None:
        out[:, 1] = mbar.expectation(sources.pool, sources.strengths, values, counts)[0]
    return out


def _ess(sources, runs, k: int, source: int | None) -> float:
    """Of the source; where there is none, the best that any run has."""
    s = sources.strengths[k]
    if source == MBAR:
        return mbar.effective_seeds(sources.pool, s, runs)
    if source is not None:
        return tilt(runs[source], s).ess
    return max([1.0, *(trusted_ess(reweight(run, s)) for run in runs if run.log_w is not None)])


def _whole(row: dict) -> dict:
    names = [n for key in KEYS[2:] for n in ((key if key in ("kl", "log_z") else f"{key}_mean"), f"{key}_se")]
    return {k: row.get(k) for k in ("unit", "strength", *names, "kl_method", "ess")}


def _number(x):
    return None if isinstance(x, float) and not np.isfinite(x) else x
