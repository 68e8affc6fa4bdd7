"""From a run folder's rows to its curve: the one place where recorded rows meet the estimators."""

from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tiltlens.constraint import Constraint
from tiltlens.estimates import estimate_curve
from tiltlens.estimates.curve import merged
from tiltlens.modules.dual import ConstraintPlan
from tiltlens.run_folder import RunFolder
from tiltlens.run_tables import as_json

GUIDED = 0.1  # of the steps: with fewer, a strength is not what it says
NAMED = 20  # rows that a warning names
DETERMINISTIC = (
    "eta = 0: the chain is deterministic, its steps have no noise to measure a shift against: path_kl, log_w and what "
    "rests on them are null. Take eta > 0 for them."
)


def estimate_run(folder: RunFolder, module: Any, data: Any) -> None:
    """Write curve.parquet, summary.json and pilot/samples.parquet. module: a SamplingModule that has sampled."""
    sampler = module.sampler
    table = columns(folder.samples())
    steps = columns(folder.steps()) if module.method.guides else {}
    pilots = pilot_table(sampler.constraint, sampler.pilots) if sampler.pilots else None
    rows, warnings, natural, certificates = [], list(module.notes), {}, {}
    asked = data.asked if isinstance(data, ConstraintPlan) else None
    for i, unit in enumerate(module.units):
        mine = {k: v[table["unit"] == unit.name] for k, v in table.items()}
        pilot = None if pilots is None else {k: v[pilots["unit"] == unit.name] for k, v in pilots.items()}
        curve, notes = estimate_curve(unit.name, mine, pilot)
        for row in curve:
            here = mine["strength"] == row["strength"]
            row["seconds"] = float(np.nansum(mine["seconds"][here]))
        rows += curve
        warnings += [f"{unit.name}: {note}" for note in [*notes, *lost(mine), *unguided(steps, unit.name)]]
        reference = sampler.constraint.naturals[i]
        if note := sampler.constraint.energy.note(reference):
            warnings.append(f"{unit.name}: {note}")
        if asked:
            certificates[unit.name] = asked.certify(reference, mine, pilot, curve)
        natural[unit.name] = {
            "mean": reference.mean, "mean_se": reference.mean_se, "std": reference.std, "std_se": reference.std_se,
            "n": len(reference.activations),
            "from": module.natural or ("pilot" if module.pilot else "none"), "level": _level(sampler.constraint, i),
            "quantiles": {f"q{q:g}": float(torch.quantile(reference.activations, q)) for q in (0.01, 0.05, 0.5, 0.95, 0.99)}
            if len(reference.activations) else {},
        }  # fmt: skip
    if module.eta == 0 and not np.isfinite(table["log_w"].astype(float)).any():
        warnings.insert(0, DETERMINISTIC)
    if pilots is not None:
        _write_table(folder, "pilot/samples.parquet", pilots)
    folder.write_curve(rows, natural=natural, warnings=warnings)
    if asked:
        folder.write("summary.json", as_json({**folder.read_summary(), "constraint": certificates}))


def lost(samples: dict[str, np.ndarray]) -> list[str]:
    """The names of one unit's rows that are not finite."""
    names = [
        f"strength {s:g} seed {k}"
        for s, k in zip(*(samples[c][~samples["finite"]] for c in ("strength", "seed")))
    ]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        [f"not finite (finite = false in samples.parquet): {', '.join(names[:NAMED])}{more}"] if names else []
    )


def unguided(steps: dict[str, np.ndarray], unit: str) -> list[str]:
    """The strengths above 0 at which next to no recorded step moved any row of this unit. steps: columns; {} says nothing."""
    notes, acts = [], steps and np.nan_to_num(steps["guidance_norm"]) != 0
    for strength in np.unique(steps["strength"][steps["unit"] == unit]) if steps else ():
        here = (steps["unit"] == unit) & (steps["strength"] == strength)
        count, acted = len(np.unique(steps["step"][here])), len(np.unique(steps["step"][here & acts]))
        known = np.isfinite(steps["guidance_norm"][here]).all()  # rows that were lost are told of elsewhere
        if strength > 0 and known and acted < GUIDED * count:
            notes.append(
                f"strength {strength:g}: the guidance acted at {acted} of {count} steps, so that these are samples of strength 0 "
                "or close to them. A unit that the pilot could not read, a narrow profile or very few steps do this: try a larger "
                "model.pilot, more model.steps, a wider profile, or another unit."
            )
    return merged(notes)


def columns(table: pa.Table) -> dict[str, np.ndarray]:
    """Columns as arrays; null numbers are NaN, null strings None."""
    return {name: table[name].to_numpy() for name in table.column_names}


def pilot_table(constraint: Constraint, pilots: list) -> dict[str, np.ndarray]:
    """The pilot's samples as rows: unit, seed, activation, z, energy."""
    columns: dict[str, list] = {k: [] for k in ("unit", "seed", "activation", "z", "energy")}
    for i, (unit, pilot) in enumerate(zip(constraint.bank.units, pilots)):
        n = constraint.naturals[i]
        a = unit.combine((pilot.members.double() - n.member_mean) / n.member_std)
        z = (a - n.mean) / n.std
        energy = constraint.energy(z if constraint.energy.standardise else a, float(constraint.level[i]))
        columns["unit"] += [unit.name] * len(a)
        columns["seed"] += range(len(a))
        for key, value in (("activation", a), ("z", z), ("energy", energy)):
            columns[key] += value.tolist()
    return {k: np.asarray(v) for k, v in columns.items()}


def _level(constraint: Constraint, i: int) -> float | None:
    return None if constraint.energy.level is None else float(constraint.level[i])


def _write_table(folder: RunFolder, name: str, columns: dict[str, np.ndarray]) -> None:
    buffer = BytesIO()
    pq.write_table(pa.table({k: pa.array(v) for k, v in columns.items()}), buffer)
    folder.write(name, buffer.getvalue())
