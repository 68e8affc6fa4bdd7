"""`sample.py --reweight DIR`: other strengths from the stored rows of a run, with no sampling and no model."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from tiltlens.estimates.reweighted import reweight_rows
from tiltlens.modules.results import columns
from tiltlens.report.digits import number, plus_minus
from tiltlens.run_folder import RunFolder
from tiltlens.run_tables import as_json
from tiltlens.sampling.plan import check_strengths

NAME = "reweighted.json"
SHOWN = (("activation", "activation_mean"), ("z", "z_mean"), ("KL", "kl"), ("log Z", "log_z"))


def reweight_run(path: str | Path, strengths: Sequence[float] | None = None) -> dict:
    """Write DIR/reweighted.json, {"rows": [...], "warnings": [...], "covariance": {unit: {name: (K, K)}}}, and return it;
    summary.json stays as it is. The covariance of each estimate between the strengths of the unit's rows, in their order.

    strengths: by default those of the run and one half-way between any two. Raises ValueError for a folder that is no
    run folder or holds no rows, for weights that were not stored, and where nothing is finite.
    """
    folder = RunFolder(path)
    if not folder.read_manifest():
        raise ValueError(
            f"{folder.path} is not a run folder: expected one with a manifest.json that sample.py wrote"
        )
    table = columns(folder.samples())
    if not len(table["seed"]):
        raise ValueError(f"{folder.path} holds no samples yet: there is nothing to re-weight")
    if strengths is None:
        own = sorted({0.0, *table["strength"].tolist()})
        strengths = [*own, *((a + b) / 2 for a, b in zip(own, own[1:]))]
    strengths = check_strengths(list(strengths))
    kept = folder.path / "pilot" / "samples.parquet"
    pilots = columns(pq.read_table(kept)) if kept.exists() else None
    rows, warnings, covariance = [], [], {}
    for unit in dict.fromkeys(table["unit"].tolist()):
        mine, pilot = (
            None if t is None else {k: v[t["unit"] == unit] for k, v in t.items()} for t in (table, pilots)
        )
        found = reweight_rows(unit, mine, pilot, strengths)
        rows += found.rows
        warnings += [f"{unit}: {line}" for line in found.warnings]
        covariance[unit] = found.covariance
    result = {"rows": rows, "warnings": warnings, "covariance": covariance}
    folder.write(NAME, as_json(result))
    return json.loads(as_json(result))


def show(result: dict, console: Console | None = None) -> None:
    """The rows as a table a unit, and the warnings."""
    console = console or Console(width=110, highlight=False)
    for unit in dict.fromkeys(row["unit"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["unit"] == unit]
        shown = [(head, key) for head, key in SHOWN if any(row[key] is not None for row in rows)]
        table = Table("strength", *(head for head, _ in shown), "ESS", "by", title=unit, title_justify="left")
        for row in rows:
            cells = [plus_minus(row[key], row[key.removesuffix("_mean") + "_se"]) for _, key in shown]
            table.add_row(number(row["strength"], 6), *cells, number(row["ess"], 3), row["kl_method"])
        console.print(table)
    for line in result["warnings"]:
        console.print(line, markup=False)
