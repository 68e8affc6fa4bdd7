"""Recorded columns -> groups of finite samples, one a strength."""

from typing import NamedTuple

import numpy as np

from tiltlens.estimates.samples import Samples

NEEDED = ("strength", "seed", "activation", "energy")
OPTIONAL = ("z", "log_w", "path_kl", "weight", "ancestor")
PILOT = ("energy", "activation")


class Group(NamedTuple):
    """The finite rows of one strength, their activation and standardised activation z (n,), how many were not
    finite."""

    samples: Samples
    activation: np.ndarray
    z: np.ndarray | None
    nonfinite: int


def read_groups(table: dict, pilot: dict | None) -> list[Group]:
    """The groups of one unit, sorted by strength; the pilot joins strength 0 with clusters -1, -2, ...

    The cluster of a row is its group of particles, where it has one, and else its seed. A column of log_w, path_kl,
    weight or z that is NaN at a whole strength was not recorded there (eta = 0, no particles); where it holds some
    numbers, its NaN are non-finite rows. Raises ValueError as `estimate_curve` says.
    """
    columns = _columns(table, NEEDED, "table")
    columns["strength"] = columns["strength"] + 0.0  # no -0.0
    seeds = np.asarray(table["seed"])
    if _has(table, "group") and table["group"] is not None:
        group = np.asarray(table["group"], np.float64)  # null where a row is alone
        seeds = np.where(np.isnan(group), seeds, group)
    groups = {}
    for s in np.unique(columns["strength"]):
        groups[float(s)] = {k: v[columns["strength"] == s] for k, v in columns.items()}
        groups[float(s)]["cluster"] = seeds[columns["strength"] == s].astype(object)
    if pilot is not None and len(pilot["energy"]):
        extra = _columns(pilot, PILOT, "pilot")
        order = np.lexsort((extra["activation"], extra["energy"]))  # the order of its rows then never matters
        extra = {k: v[order] for k, v in extra.items()}
        extra["cluster"] = np.array([-1 - k for k in range(len(order))], object)
        mine = groups.setdefault(0.0, {k: v[:0] for k, v in extra.items()})
        groups[0.0] = {
            k: np.concatenate([mine[k], extra[k]]) for k in ("energy", "activation", "z", "finite", "cluster")
        }
    finite = [_finite(s, g) for s, g in sorted(groups.items())]
    plan = np.unique(
        [c for g, keep in finite for c in g["cluster"][keep] if c >= 0]
    )  # seeds may exceed int64
    return [_group(s, g, keep, plan) for s, (g, keep) in zip(sorted(groups), finite)]


def _has(table: dict, name: str) -> bool:
    return name in (table.dtype.names if isinstance(table, np.ndarray) else table)


def _columns(table: dict, needed: tuple[str, ...], what: str) -> dict[str, np.ndarray]:
    missing = [name for name in needed if not _has(table, name)]
    if missing:
        raise ValueError(f"the {what} lacks {', '.join(missing)}: expected columns {', '.join(needed)}")
    n = len(table[needed[0]])
    columns = {}
    for name in dict.fromkeys((*needed, *OPTIONAL)):
        value = table[name] if _has(table, name) else None
        value = np.full(n, np.nan) if value is None else np.asarray(value, np.float64)
        if value.shape != (n,):
            raise ValueError(
                f"the {what}'s column {name} has shape {value.shape}: expected ({n},), one value a sample"
            )
        columns[name] = value
    flags = table["finite"] if _has(table, "finite") else None
    columns["finite"] = np.ones(n, bool) if flags is None else np.asarray(flags, bool)
    return columns


def _finite(strength: float, group: dict) -> tuple[dict, np.ndarray]:
    """The group with None for what was not recorded, and which of its rows are finite."""
    keep = group["finite"] & np.isfinite(group["energy"]) & np.isfinite(group["activation"])
    for name in OPTIONAL:
        value = group.get(name)
        if value is None or np.isnan(value[keep]).all() or (strength == 0 and name != "z"):
            group[name] = None
        else:
            keep = keep & np.isfinite(value)
    return group, keep


def _group(strength: float, group: dict, keep: np.ndarray, plan: np.ndarray) -> Group:
    found = group["cluster"][keep]
    cluster = np.array([c if c < 0 else np.searchsorted(plan, c) for c in found], np.int64)
    columns = {k: None if group.get(k) is None else group[k][keep] for k in ("energy", *OPTIONAL[1:])}
    if columns["weight"] is not None and len(cluster):
        columns |= _particles(columns, found, group["cluster"])
    z = None if group["z"] is None else group["z"][keep]
    return Group(
        Samples(strength, cluster=cluster, **columns), group["activation"][keep], z, int((~keep).sum())
    )


def _particles(columns: dict, kept: np.ndarray, everyone: np.ndarray) -> dict:
    """weight -> G W_i, of mean 1 in each group, None for groups of one; a particle left out counts as one of weight
    0: Zhat stays the mean over all G."""
    names, sizes = np.unique(everyone, return_counts=True)
    found, of, left = np.unique(kept, return_inverse=True, return_counts=True)
    if sizes.max() == 1:
        return {"weight": None, "ancestor": None}
    whole = sizes[np.searchsorted(names, found)]
    total = np.bincount(of, columns["weight"])
    log_w = columns["log_w"]
    return {
        "weight": columns["weight"] * (left / np.where(total > 0, total, 1.0))[of],
        "log_w": None if log_w is None else log_w + np.log(left / whole)[of],
    }
