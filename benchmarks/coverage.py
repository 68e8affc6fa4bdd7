"""Do the error bars mean what they say: coverage of 95 % intervals over many independent runs with a known truth.

    python benchmarks/coverage.py [--runs 200] [--dimensions 2 16 64] [--out figures.json] [--quick]

The prior is a mixture of three Gaussians in dimension d, the unit a projection, E = -a; strengths are those of KL near
0.3, 1, 3 and 8 nats, where log Z, KL and the mean activation of q_s are closed forms. A run is what a user would have:
64 unguided samples for the pilot and --samples rows a strength, estimated by `estimate_curve`, the code of every report.

- importance: Calibrated guidance, each strength alone.
- particles: the same guidance and rows in groups of 16, each strength alone.
- mbar: the rows of importance, all strengths and the unguided ones together.
- noise space: half as many annealed walks, gradient-free, read on their way up at the rungs nearest to the strengths.

valid: the share of runs that give a number at all. covers: of those, the share whose interval, estimate +- t se with
the normal's 1.96, holds the truth (its own standard error is 1.5 points at 95 % of 200). bare: runs whose number is wrong
by more than four standard errors. A run that gives none says why: "silent" counts those that do not, and must be 0.
The chain has 100 steps uniform in the table's index, where its law is the mixture's to 0.1 % of the variance.
"""

import argparse
import json
import os
import sys
import time
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
from tiltlens.sampling import Independent, NoiseSpace, Particles
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import Projection, UnitBank

NATS = (0.3, 1.0, 3.0, 8.0)
GROUP, PILOT = 16, 64
ROWS_AT_ONCE = 2048
NORMAL = 1.959964
WANTED = (0.92, 0.98)
NUMBERS = ("log_z", "kl", "activation")
COLUMNS = ("activation", "energy", "z", "log_w", "path_kl", "finite", "group", "weight", "ancestor")


def problem(dimension: int) -> tuple[GaussianMixture, list[float]]:
    """A mixture with unequal weights and spreads, and the direction that is read; the same for every call."""
    rng = np.random.default_rng(dimension)
    means = rng.normal(0, 1.2 / np.sqrt(dimension), (3, dimension))
    direction = rng.normal(0, 1, dimension)
    direction /= np.linalg.norm(direction)
    means += np.outer([-0.8, 0.2, 1.2], direction)
    return GaussianMixture([0.5, 0.35, 0.15], means.tolist(), [0.5, 0.3, 0.4]), direction.tolist()


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
    """All runs on one problem; samples of many runs are drawn in one batch, for every row has noise of its own."""

    def __init__(self, dimension: int, asked: argparse.Namespace):
        self.asked, self.dimension = asked, dimension
        self.prior, self.direction = problem(dimension)
        self.strengths = [strength_of(self.prior, self.direction, nats) for nats in NATS]

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

    def rows(self, sampler: Sampler, strengths: Iterable[float], what: str) -> list[dict[str, np.ndarray]]:
        """The table of each run."""
        n, runs, strengths = self.asked.samples, self.asked.runs, list(strengths)
        tables: list[dict[str, list]] = [{} for _ in range(runs)]
        at_once = max(ROWS_AT_ONCE // n, 1)
        for s in strengths:
            for first in range(0, runs, at_once):
                mine = range(first, min(first + at_once, runs))
                found = sampler.sample([Row(0, s, run * n + i) for run in mine for i in range(n)])
                tell(f"dimension {self.dimension}, {what}, strength {s:.3g}: run {mine[-1] + 1}/{runs}")
                columns = {k: getattr(found, k).numpy() for k in COLUMNS if getattr(found, k) is not None}
                columns |= {
                    "seed": np.array([r.seed for r in found.rows]),
                    "strength": np.full(len(found.rows), s),
                }
                for k, run in enumerate(mine):
                    for name, value in columns.items():
                        tables[run].setdefault(name, []).append(value[k * n : (k + 1) * n])
        return [{k: np.concatenate(v) for k, v in t.items()} for t in tables]

    def walks(self) -> list[list[dict[str, np.ndarray]]]:
        """The tables of each run, a strength each: one annealed walk a row, up to KL near 8, read on its way there."""
        sampler, n = self.sampler(NoiseSpace(self.asked.levels, final=0)), self.asked.samples // 2
        tables, at_once = [], max(ROWS_AT_ONCE // n, 1)
        for first in range(0, self.asked.runs, at_once):
            mine = range(first, min(first + at_once, self.asked.runs))
            rows = [Row(0, self.strengths[-1], run * n + i) for run in mine for i in range(n)]
            walk = sampler.method.walk(sampler.parts(), rows)
            tell(f"dimension {self.dimension}, noise space: run {mine[-1] + 1}/{self.asked.runs}")
            ladder, energies, log_w = (x.numpy() for x in (walk.ladder[0], walk.energies, walk.log_weights))
            rungs = [int(np.abs(ladder - s).argmin()) for s in self.strengths]
            self.walked = [float(ladder[k]) for k in rungs]
            for k in range(len(mine)):
                here, table = slice(k * n, (k + 1) * n), []
                for rung, s in zip(rungs, self.walked):
                    e, w = energies[here, rung], log_w[here, rung]
                    table.append({"strength": np.full(n, s), "seed": np.arange(n), "activation": -e, "energy": e,
                                  "log_w": w, "path_kl": -s * e - w})  # fmt: skip
                tables.append(table)
        return tables

    def pilots(self) -> list[dict[str, np.ndarray]]:
        """A pilot for each run, exact draws."""
        draws = self.prior.sample(self.asked.runs * PILOT, torch.Generator().manual_seed(7)).numpy()
        a = (draws @ np.asarray(self.direction)).reshape(self.asked.runs, PILOT)
        return [{"activation": x, "energy": -x, "z": x} for x in a]

    def methods(self) -> dict[str, list[list[dict]]]:
        """method -> run -> the tables that are estimated one by one."""
        free = self.rows(self.sampler(Independent()), [0.0], "unguided")
        alone = self.rows(self.sampler(Independent()), self.strengths, "importance")
        particles = self.rows(self.sampler(Particles(GROUP)), self.strengths, "particles")
        walks = self.walks()
        joined = [[{k: np.concatenate([f[k], t[k]]) for k in f}] for f, t in zip(free, alone)]
        apart = lambda tables: [[at(t, s) for s in self.strengths] for t in tables]  # noqa: E731
        return {
            "importance": apart(alone),
            "particles": apart(particles),
            "mbar": joined,
            "noise space": walks,
        }


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


def judge(runs: list[list[tuple[dict, list[str]]]], k: int, truth: dict[str, float], method: str) -> dict:
    """Counts at strength number k."""
    rows = [run[k] for run in runs]
    out: dict = {}
    for name in NUMBERS:
        key = "optimum_energy" if name == "activation" else name
        found = [(r[key], r[f"{key}_se"]) for r, _ in rows if r.get(key) is not None and r[f"{key}_se"] is not None
                 and (method != "mbar" or r["kl_method"] == "mbar")]  # fmt: skip
        off = np.array([abs(x - truth[name]) / max(se, 1e-12) for x, se in found])
        out[name] = {"valid": len(off), "covers": int((off <= NORMAL).sum()), "bare": int((off > 4).sum())}
    out["silent"] = sum(r["kl"] is None and not said for r, said in rows)
    return out


def tell(text: str, end: str = "\r") -> None:
    if end == "\n" or sys.stderr.isatty():
        print(f"\x1b[K{text}" if sys.stderr.isatty() else text, end=end, file=sys.stderr, flush=True)


def show(figures: list[dict], runs: int) -> None:
    print(
        "| dimension | method | KL, nats | log_z: valid, covers | kl: valid, covers | mean activation: valid, covers | bare | silent |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for f in figures:
        cells = []
        for name in NUMBERS:
            n, covers = f[name]["valid"], f[name]["covers"]
            cells.append(f"{100 * n / runs:.0f} %, {100 * covers / n:.1f} %" if n else "0 %, -")
        bare = sum(f[name]["bare"] for name in NUMBERS)
        print(
            f"| {f['dimension']} | {f['method']} | {f['nats']:g} | {' | '.join(cells)} | {bare} | {f['silent']} |"
        )


def verdict(figures: list[dict]) -> bool:
    """Pooled over strengths and dimensions, method by method: intervals of one run at several strengths are related,
    runs are not."""
    good = True
    print("\n| method | log_z | kl | mean activation |\n|---|---|---|---|")
    for method in dict.fromkeys(f["method"] for f in figures):
        cells = []
        for name in NUMBERS:
            mine = [f[name] for f in figures if f["method"] == method]
            n, covers = sum(x["valid"] for x in mine), sum(x["covers"] for x in mine)
            good &= n > 0 and WANTED[0] <= covers / n <= WANTED[1]
            cells.append(f"{100 * covers / n:.1f} % of {n}" if n else "none valid")
        print(f"| {method} | {' | '.join(cells)} |")
    silent = sum(f["silent"] for f in figures)
    good &= silent == 0
    print(
        f"\n{'PASS' if good else 'FAIL'}: 95 % intervals shall cover in {WANTED[0]:.0%} to {WANTED[1]:.0%} of the runs that give "
        f"a number, and no run give none without a word (silent: {silent})."
    )
    return good


def keep(asked: argparse.Namespace, figures: list[dict]) -> None:
    """What is known so far: a run takes long."""
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(
            json.dumps({"runs": asked.runs, "samples": asked.samples, "rows": figures}, indent=1) + "\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument(
        "--samples", type=int, default=128, help="rows a strength and run, in whole groups of 16"
    )
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--levels", type=int, default=16, help="rungs of the walks in noise space")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="does it run: one dimension, few runs")
    asked = parser.parse_args()
    if asked.quick:
        asked.runs, asked.dimensions, asked.levels = 8, asked.dimensions[:1], 4
    if asked.samples % GROUP:
        parser.error(f"--samples {asked.samples}: expected a multiple of {GROUP}")
    start, figures = time.perf_counter(), []
    with ProcessPoolExecutor(asked.workers) as workers:
        for dimension in asked.dimensions:
            runs = Runs(dimension, asked)
            pilots = runs.pilots()
            for method, tables in runs.methods().items():
                jobs = [(t, pilot if method == "mbar" else None) for t, pilot in zip(tables, pilots)]
                found = list(workers.map(estimate, jobs, chunksize=4))
                for k, s in enumerate(runs.walked if method == "noise space" else runs.strengths):
                    nats = round(runs.truth(s)["kl"], 2)
                    counts = judge(found, k, runs.truth(s), method)
                    figures.append(
                        {"dimension": dimension, "method": method, "nats": nats, "strength": s, **counts}
                    )
                tell(
                    f"dimension {dimension}, {method}: estimated, {time.perf_counter() - start:.0f} s",
                    end="\n",
                )
                keep(asked, figures)
    print(f"{asked.runs} runs of {asked.samples} rows a strength, {asked.steps} steps; {(time.perf_counter() - start) / 60:.1f} minutes"
          + (" (--quick: the figures mean nothing)" if asked.quick else "") + "\n")  # fmt: skip
    show(figures, asked.runs)
    good = verdict(figures)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(
            json.dumps({"runs": asked.runs, "samples": asked.samples, "rows": figures}, indent=1) + "\n"
        )
    if not (good or asked.quick):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
