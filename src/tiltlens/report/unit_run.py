"""What a report knows of one unit: its part of the tables of a run folder, read once."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tiltlens.run_folder import RunFolder, unit_slug


@dataclass(frozen=True)
class UnitRun:
    """One unit of a run. slug: its name in file names.

    curve: a dict a strength, ascending, with the columns of curve.parquet. samples, steps: its rows of those
    tables. natural: {"activation", "z"}: (n,) arrays of draws from p, of the pilot or else of strength 0. scale_error:
    relative standard error of the natural standard deviation, the unit of z; None where not known.
    """

    unit: str
    slug: str
    curve: list[dict]
    samples: pa.Table
    steps: pa.Table
    natural: dict[str, np.ndarray] = field(default_factory=dict)
    scale_error: float | None = None

    @property
    def scale(self) -> str:
        """The column in which activations are shown: "z" if the run standardised, else "activation"."""
        return "z" if any(row["z_mean"] is not None for row in self.curve) else "activation"

    @property
    def linear(self) -> bool:
        """Whether E is minus the activation that is shown: an energy is then read as an activation."""
        energy, shown = (self.samples[name].cast(pa.float64()).to_numpy() for name in ("energy", self.scale))
        known = np.isfinite(energy) & np.isfinite(shown)
        return bool(known.any()) and np.allclose(energy[known], -shown[known], rtol=1e-4, atol=1e-4)

    @property
    def has_images(self) -> bool:
        return self.samples["image"].null_count < self.samples.num_rows

    @property
    def copies(self) -> np.ndarray:
        """(N,) how often each sample stands in the output: 1, or what its group of particles made of it."""
        if "copies" not in self.samples.column_names:
            return np.ones(self.samples.num_rows, int)
        return self.samples["copies"].fill_null(1).to_numpy().astype(int)

    @property
    def in_groups(self) -> bool:
        """Whether some samples are particles."""
        return "copies" in self.samples.column_names and self.samples["copies"].null_count < len(self.copies)

    def values(self, column: str) -> dict[float, np.ndarray]:
        """By strength: the finite values (n,) of a column of samples; of particles, of their equally weighted output."""
        strengths = self.samples["strength"].to_numpy()
        values = self.samples[column].cast(pa.float64()).to_numpy()
        times = self.copies * np.isfinite(values)
        return {float(s): np.repeat(values, times * (strengths == s)) for s in np.unique(strengths)}


def read_units(folder: RunFolder) -> dict[str, UnitRun]:
    """Every unit with samples or a row of the curve, in the order of the curve.

    A strength without a row of the curve (the run was stopped) gets one with the means of its samples alone.
    """
    summary, samples, steps = folder.read_summary(), folder.samples(), folder.steps()
    rows, reference = summary["rows"], summary["natural"]
    pilot = folder.path / "pilot" / "samples.parquet"
    pilot = pq.read_table(pilot) if pilot.exists() else None
    units = dict.fromkeys([*(row["unit"] for row in rows), *samples["unit"].to_pylist()])
    named = folder.read_manifest().get("units", {})
    runs = {}
    for unit in units:
        own = samples.filter(pc.equal(samples["unit"], unit))
        curve = {row["strength"]: _Blank(row) for row in rows if row["unit"] == unit}
        for strength in set(own["strength"].to_pylist()) - set(curve):
            curve[strength] = _means(own.filter(pc.equal(own["strength"], strength)))
        drawn = own.filter(pc.equal(own["strength"], 0.0))
        if pilot is not None and pc.any(pc.equal(pilot["unit"], unit)).as_py():
            drawn = pilot.filter(pc.equal(pilot["unit"], unit))
        runs[unit] = UnitRun(
            unit,
            named.get(unit, {}).get("slug") or unit_slug(unit),
            [curve[strength] for strength in sorted(curve)],
            own,
            steps.filter(pc.equal(steps["unit"], unit)),
            {name: _finite(drawn[name]) for name in ("activation", "z") if name in drawn.column_names},
            _relative(reference.get(unit, {})),
        )
    return runs


def _relative(natural: dict) -> float | None:
    return natural["std_se"] / natural["std"] if natural.get("std_se") else None


def _finite(column: pa.ChunkedArray) -> np.ndarray:
    values = column.cast(pa.float64()).to_numpy()
    return values[np.isfinite(values)]


def _means(samples: pa.Table) -> dict:
    """A row of the curve from the samples of one strength: means, nothing that needs an estimator."""
    row = {"strength": samples["strength"][0].as_py(), "n": samples.num_rows}
    for name in ("activation", "z", "energy", "path_kl"):
        values = _finite(samples[name])
        mean, se = ("path_kl", "path_kl_se") if name == "path_kl" else (f"{name}_mean", f"{name}_se")
        row[mean] = float(values.mean()) if len(values) else None
        row[se] = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return _Blank(row)


class _Blank(dict):
    """A row whose other columns are null."""

    def __missing__(self, key):
        return None
