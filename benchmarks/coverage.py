"""Do the error bars mean what they say: coverage of 95 % intervals over many independent runs with a known truth.

    python benchmarks/coverage.py [--runs 200] [--dimensions 2 16 64] [--seed 0] [--out figures.json] [--quick]

The prior is a mixture of three Gaussians in dimension d, the unit a projection, E = -a; strengths are those of KL near
0.3, 1, 3 and 8 nats, where log Z, KL and the mean activation of q_s are closed forms. Weights, means, spreads and the
direction are drawn at random, anew every 8 runs; --seed names them and all noise: constants of the estimators were set
on seed 0, so that any other is out of sample. A run is what a user would have: 64 unguided samples for the pilot and
--samples rows a strength, estimated by `estimate_curve`, the code of every report.

- importance: Calibrated guidance, each strength alone.
- particles: the same guidance and rows in groups of 16, each strength alone.
- mbar: the rows of importance, all strengths and the unguided ones together, where MBAR is what is given.
- sweep, particle sweep: these rows, and those of particles with the unguided ones, by whichever method the report chooses for a
  strength (--sweeps: these alone, in a tenth of the time; --samples 32 for a run of few rows).
- noise space: half as many annealed walks, gradient-free, read on their way up at the rungs nearest to the strengths.

valid: the share of runs that give a number at all. covers: of those, the share whose interval, estimate +- t se with
the normal's 1.96, holds the truth (its own standard error is 1.5 points at 95 % of 200). bare: runs whose number is wrong
by more than four standard errors. A run that gives one of the three not says why, of this strength: "silent" counts those that
do not, and must be 0.
edge: the same coverage where less than half of the runs give a number, the likeliest place for luck to pass for trust.
The chain has 50 steps uniform in the table's index, where its law is the mixture's to 0.4 % of the variance: well below these errors.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core below

import numpy as np
import torch

from tiltlens.energies import Linear
from tiltlens.estimates import estimate_curve
from tiltlens.guidance import Calibrated
from tiltlens.priors import GaussianMixture
from tiltlens.sampling import ChainSampler, Independent, NoiseSpace, Particles
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import Projection, UnitBank

NATS = (0.3, 1.0, 3.0, 8.0)
GROUP, PILOT = 16, 64
TOGETHER = 8  # runs that share a mixture, and a batch
NORMAL = 1.959964
WANTED = (0.92, 0.98)
NUMBERS = ("log_z", "kl", "activation")
COLUMNS = ("activation", "energy", "z", "log_w", "path_kl", "finite", "group", "weight", "ancestor")


def problem(rng: np.random.Generator, dimension: int) -> tuple[GaussianMixture, list[float]]:
    """A mixture with unequal weights and spreads, and the direction that is read."""
    means = rng.normal(0, 1.2 / np.sqrt(dimension), (3, dimension))
    direction = rng.normal(0, 1, dimension)
    direction /= np.linalg.norm(direction)
    means += np.outer(rng.normal(0, 1, 3), direction)
    weights, variances = rng.dirichlet([4, 4, 4]), rng.uniform(0.25, 0.6, 3)
    return GaussianMixture(weights.tolist(), means.tolist(), variances.tolist()), direction.tolist()


def strength_of(prior: GaussianMixture, direction: list[float], nats: float) -> float:
    """The strength at which KL(q_s||p) is `nats`, by bisection: KL rises with s."""
    low, high = 0.0, 1.0
    while prior.kl(direction, high) < nats:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if prior.kl(direction, middle) < nats else (low, middle)
    return high


class Runs:
    """Some runs on one problem, drawn in one batch, for every row has noise of its own. number: of the problem."""

    def __init__(self, dimension: int, number: int, runs: int, asked: argparse.Namespace):
        self.asked, self.runs, self.what = asked, runs, f"dimension {dimension}, mixture {number}"
        self.rng = np.random.default_rng([asked.seed, dimension, number])
        self.prior, self.direction = problem(self.rng, dimension)
        self.strengths = [strength_of(self.prior, self.direction, nats) for nats in NATS]
        self.first = (asked.seed * 1000 + number) * TOGETHER * asked.samples  # of the rows' seeds

    def truth(self, strength: float) -> dict[str, float]:
        return {
            "log_z": float(self.prior.log_z(self.direction, strength)),
            "kl": self.prior.kl(self.direction, strength),
            "activation": self.prior.mean_energy(self.direction, strength),  # as m(s): E = -a
        }

    def sampler(self, method) -> Sampler:
        """Calibrated once, on a pilot that belongs to no run: the twist is frozen, as in a run with a pilot."""
        bank = UnitBank([Projection(self.direction)])
        sampler = Sampler(self.prior, bank, Linear(standardise=False), Calibrated(), self.asked.steps,
                          spacing="index", method=method)  # fmt: skip
        sampler.calibrate(sampler.run_pilot(PILOT, PILOT))
        return sampler

    def rows(
        self, method: ChainSampler, strengths: Iterable[float], what: str
    ) -> list[dict[str, np.ndarray]]:
        """The table of each run."""
        sampler, n = self.sampler(method), self.asked.samples
        tables: list[dict[str, list]] = [{} for _ in range(self.runs)]
        for s in strengths:
            tell(f"{self.what}, {what}, strength {s:.3g}")
            found = sampler.sample([Row(0, s, self.first + i) for i in range(self.runs * n)])
            columns = {k: getattr(found, k).numpy() for k in COLUMNS if getattr(found, k) is not None}
            columns |= {
                "seed": np.array([r.seed for r in found.rows]),
                "strength": np.full(len(found.rows), s),
            }
            for k, table in enumerate(tables):
                for name, value in columns.items():
                    table.setdefault(name, []).append(value[k * n : (k + 1) * n])
        return [{k: np.concatenate(v) for k, v in t.items()} for t in tables]

    def walks(self) -> list[list[dict[str, np.ndarray]]]:
        """The tables of each run, a strength each: one annealed walk a row, up to KL near 8, read on its way there."""
        tell(f"{self.what}, noise space")
        sampler, n = self.sampler(NoiseSpace(self.asked.levels, final=0)), self.asked.samples // 2
        rows = [Row(0, self.strengths[-1], self.first + i) for i in range(self.runs * n)]
        walk = sampler.method.walk(sampler.parts(), rows)
        ladder, energies, log_w = (x.numpy() for x in (walk.ladder[0], walk.energies, walk.log_weights))
        rungs = [int(np.abs(ladder - s).argmin()) for s in self.strengths]
        self.walked = [float(ladder[k]) for k in rungs]
        tables: list[list[dict]] = [[] for _ in range(self.runs)]
        for k, table in enumerate(tables):
            for rung, s in zip(rungs, self.walked):
                e, w = (x[k * n : (k + 1) * n, rung] for x in (energies, log_w))
                table.append({"strength": np.full(n, s), "seed": np.arange(n), "activation": -e, "energy": e,
                              "log_w": w, "path_kl": -s * e - w})  # fmt: skip
        return tables

    def pilots(self) -> list[dict[str, np.ndarray]]:
        """A pilot for each run, exact draws."""
        generator = torch.Generator().manual_seed(int(self.rng.integers(2**62)))
        draws = self.prior.sample(self.runs * PILOT, generator).numpy()
        a = (draws @ np.asarray(self.direction)).reshape(self.runs, PILOT)
        return [{"activation": x, "energy": -x, "z": x} for x in a]

    def methods(self) -> dict[str, list[list[dict]]]:
        """method -> run -> the tables that are estimated one by one."""
        free = self.rows(Independent(), [0.0], "unguided")
        alone = self.rows(Independent(), self.strengths, "guided")
        particles = self.rows(Particles(GROUP), self.strengths, "particles")
        sweeps = {"mbar": joined(free, alone), "particle sweep": joined(free, particles)}
        if self.asked.sweeps:
            return sweeps
        walks = self.walks()
        apart = lambda tables: [[at(t, s) for s in self.strengths] for t in tables]  # noqa: E731
        return {
            "importance": apart(alone),
            "particles": apart(particles),
            **sweeps,
            "noise space": walks,
        }


def joined(free: list[dict], guided: list[dict]) -> list[list[dict[str, np.ndarray]]]:
    """One table a run, of unguided rows and guided ones; what unguided rows do not have is NaN there."""
    blank = lambda f, v: np.full(len(f["strength"]), np.nan)  # noqa: E731
    return [
        [{k: np.concatenate([f.get(k, blank(f, v)), v]) for k, v in t.items()}] for f, t in zip(free, guided)
    ]


def at(table: dict[str, np.ndarray], strength: float) -> dict[str, np.ndarray]:
    here = table["strength"] == strength
    return {k: v[here] for k, v in table.items()}


def estimate(job: tuple[list[dict], dict | None]) -> list[tuple[dict, list[str]]]:
    """(row, warnings) of every strength of one run."""
    tables, pilot = job
    out = []
    for table in tables:
        rows, warnings = estimate_curve("u", table, pilot)
        out += [(row, warnings) for row in rows if row["strength"] > 0]
    return out


def judge(runs: list[list[tuple[dict, list[str]]]], k: int, truth: dict[str, float], method: str) -> Counter:
    """Counts of some runs at strength number k: (number, what) -> how many; what: valid, covers or bare."""
    rows = [run[k] for run in runs]
    out: Counter = Counter()
    for name in NUMBERS:
        key = "optimum_energy" if name == "activation" else name
        found = [(r[key], r[f"{key}_se"]) for r, _ in rows if r.get(key) is not None and r[f"{key}_se"] is not None
                 and (method != "mbar" or r["kl_method"] == "mbar")]  # fmt: skip
        off = np.array([abs(x - truth[name]) / max(se, 1e-12) for x, se in found])
        out[name, "valid"] = len(off)
        out[name, "covers"], out[name, "bare"] = int((off <= NORMAL).sum()), int((off > 4).sum())
    keys = ("log_z", "kl", "optimum_energy")
    out["all", "silent"] = sum(
        any(r[key] is None for key in keys) and not explained(r["strength"], said) for r, said in rows
    )
    return out


def explained(strength: float, said: list[str]) -> bool:
    """Whether a sentence speaks of this strength: "strengths 0.5, 1: ..."."""
    heads = (line.partition(":")[0].removeprefix("strengths ").removeprefix("strength ") for line in said)
    return any(f"{strength:g}" in head.split(", ") for head in heads)


def tell(text: str, end: str = "\r") -> None:
    if end == "\n" or sys.stderr.isatty():
        print(f"\x1b[K{text}" if sys.stderr.isatty() else text, end=end, file=sys.stderr, flush=True)


def show(figures: dict[tuple, Counter], runs: int) -> None:
    print(
        "| dimension | method | KL, nats | log_z: valid, covers | kl: valid, covers | mean activation: valid, covers | bare | silent |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (dimension, method, nats), f in figures.items():
        cells = [f"{100 * f[name, 'valid'] / runs:.0f} %, {share(f, name)}" for name in NUMBERS]
        bare = sum(f[name, "bare"] for name in NUMBERS)
        print(f"| {dimension} | {method} | {nats:g} | {' | '.join(cells)} | {bare} | {f['all', 'silent']} |")


def share(f: Counter, name: str) -> str:
    valid, covers = f[name, "valid"], f[name, "covers"]
    return f"{100 * covers / valid:.1f} % of {valid}" if valid else "-"


def verdict(figures: dict[tuple, Counter], runs: int) -> bool:
    """Pooled over strengths and dimensions, method by method: intervals of one run at several strengths are related,
    runs are not."""
    good = True
    print(
        "\n| method | log_z | edge | kl | edge | mean activation | edge | bare |\n|---|---|---|---|---|---|---|---|"
    )
    for method in dict.fromkeys(method for _, method, _ in figures):
        cells = []
        for name in NUMBERS:
            mine = [f for key, f in figures.items() if key[1] == method]
            pooled = sum(mine, Counter())
            edge = sum((f for f in mine if f[name, "valid"] < runs / 2), Counter())
            valid, covers = pooled[name, "valid"], pooled[name, "covers"]
            good &= valid > 0 and WANTED[0] <= covers / valid <= WANTED[1]
            cells += [share(pooled, name), share(edge, name)]
        bare, given = (sum(pooled[name, what] for name in NUMBERS) for what in ("bare", "valid"))
        cells.append(f"{bare} of {given}")
        print(f"| {method} | {' | '.join(cells)} |")
    silent = sum(f["all", "silent"] for f in figures.values())
    good &= silent == 0
    print(
        f"\n{'PASS' if good else 'FAIL'}: 95 % intervals shall cover in {WANTED[0]:.0%} to {WANTED[1]:.0%} of the runs that give "
        f"a number, and no run give none without a word (silent: {silent})."
    )
    return good


def keep(asked: argparse.Namespace, figures: dict[tuple, Counter], done: int) -> None:
    """What `done` runs say so far: all of them take long."""
    if asked.out:
        rows = [
            {"dimension": d, "method": method, "nats": nats, "silent": f["all", "silent"]}
            | {name: {k: f[name, k] for k in ("valid", "covers", "bare")} for name in NUMBERS}
            for (d, method, nats), f in figures.items()
        ]
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        told = {"runs": done, "samples": asked.samples, "seed": asked.seed, "rows": rows}
        asked.out.write_text(json.dumps(told, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument(
        "--samples", type=int, default=128, help="rows a strength and run, in whole groups of 16"
    )
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--levels", type=int, default=16, help="rungs of the walks in noise space")
    parser.add_argument("--seed", type=int, default=0, help="of mixtures and noise")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--sweeps", action="store_true", help="whole sweeps alone")
    parser.add_argument("--quick", action="store_true", help="does it run: one dimension, few runs")
    asked = parser.parse_args()
    if asked.quick:
        asked.runs, asked.dimensions, asked.levels = 8, asked.dimensions[:1], 4
    if asked.samples % GROUP:
        parser.error(f"--samples {asked.samples}: expected a multiple of {GROUP}")
    start, figures = time.perf_counter(), defaultdict(Counter)
    with ProcessPoolExecutor(asked.workers) as workers:
        for number, first in enumerate(range(0, asked.runs, TOGETHER)):
            for dimension in asked.dimensions:
                runs = Runs(dimension, number, min(TOGETHER, asked.runs - first), asked)
                pilots = runs.pilots()
                for method, tables in runs.methods().items():
                    jobs = [
                        (t, pilot if method in ("mbar", "particle sweep") else None)
                        for t, pilot in zip(tables, pilots)
                    ]
                    found = list(workers.map(estimate, jobs))
                    strengths = runs.walked if method == "noise space" else runs.strengths
                    for k, (nats, s) in enumerate(zip(NATS, strengths)):
                        figures[dimension, method, nats] += judge(found, k, runs.truth(s), method)
                        if method == "mbar":  # and all that a report of this sweep gives, by whichever method
                            figures[dimension, "sweep", nats] += judge(found, k, runs.truth(s), "sweep")
                tell(f"{runs.what}: {time.perf_counter() - start:.0f} s", end="\n")
            keep(asked, figures, min(first + TOGETHER, asked.runs))
    print(f"{asked.runs} runs of {asked.samples} rows a strength, {asked.steps} steps, seed {asked.seed}; {(time.perf_counter() - start) / 60:.1f} minutes"
          + (" (--quick: the figures mean nothing)" if asked.quick else "") + "\n")  # fmt: skip
    show(figures, asked.runs)
    good = verdict(figures, asked.runs)
    if not (good or asked.quick):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
