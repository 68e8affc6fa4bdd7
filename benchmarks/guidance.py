"""How efficient every guidance is, in nats: the table of the design, on the bundled prior and encoder.

    python benchmarks/guidance.py [--out figures.json] [--units ADDRESS ...] [--guidance NAME ...] [--quick]

For every unit and guidance rows of fresh samples: at strength 1, and at the strength that shifts the mean activation by
one standard deviation of the prior, or by each --shift (found beforehand, on seeds of its own). shift: mean activation
in standard deviations of the prior. path KL: what the guided chain spent, in nats; kl_lower: the least that any
law with this mean activation spends; their ratio is the KL efficiency. objective: path KL - s shift; no guidance
gets below -log Z(s). All rows of a unit share one pool of unguided samples (its mean, its standard deviation and
log Z(l) of the bound; --bound draws more of them for these three, for 256 cannot tell log Z at a shift of two), and all
guidances share their seeds and twins. p is the law of this chain at strength 0. The twist
of Calibrated sees no more than sample.py gives it: the first --pilot trajectories of the pool. Learned learns on all of it.
Calibrated and Learned go by the unit's own law but in rows called gaussian; Calibrated has shifts for steps of finite length, Learned where the row says
finite; tweedie: those of short steps. blend 1: the average of memory alone steers, not half of it and half of the step's own gradient.
Rows called noise-aware read clean estimates by the twin of --noise-aware (a folder of NoiseAwareModule, or bundled, which the units that it reads, the default ones
among them, have unless another is said, as in sample.py), the others never do.

+- is one standard error: bootstrap over seeds and pool, seeds in common. A kl_lower with ">=" lies at the edge of
what the pool can say of log Z: a bound still, but not the sharpest. The energy is linear, where MomentMatched and
DPS are one and the same: w, held fixed, is only a constant (its rows are those of DPS). Every row is kept in --out as it
ends: the same call goes on where it was stopped, and other guidances can be added later. The table goes to stdout, progress to stderr.
"""

import argparse
import hashlib
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tiltlens.energies import Linear
from tiltlens.estimates.bounds import least_kl, mean
from tiltlens.estimates.importance import tilt
from tiltlens.estimates.samples import Samples
from tiltlens.estimates.trust import trusted_log_z
from tiltlens.guidance import DPS, LGD, MPGD, Calibrated, Guidance, Learned, MomentMatched
from tiltlens.modules.accelerator import cpu_precision
from tiltlens.priors import load_prior
from tiltlens.sampling.chain import ORDERS
from tiltlens.sampling.pilot import UnitPilot
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sample_pool import run_pool
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import UnitBank, build_unit
from tiltlens.units.address import Address
from tiltlens.units.noise_aware import CONFIG, WEIGHTS, same_unit, twin_folder
from tiltlens.units.twins import adopt_twins

GUIDANCES = {
    "DPS": DPS,
    "LGD": LGD,
    "MPGD": MPGD,
    "MomentMatched": MomentMatched,
    "Calibrated": lambda: Calibrated(memory=0, smoothing=1),
    "Calibrated, memory": lambda: Calibrated(smoothing=1),
    "Calibrated, memory, 4 views": lambda: Calibrated(smoothing=4),
    "Calibrated, memory, blend 1": lambda: Calibrated(smoothing=1, blend=1.0),
    "Calibrated, memory, gaussian, tweedie": lambda: Calibrated(smoothing=1, law="gaussian", finite=False),
    "Learned": Learned,
    "Learned, gaussian, tweedie": lambda: Learned(law="gaussian", finite=False),
    "Calibrated, memory, noise-aware": lambda: Calibrated(smoothing=1),
    "Calibrated, memory, blend 1, noise-aware": lambda: Calibrated(smoothing=1, blend=1.0),
    "Calibrated, memory, gaussian, tweedie, noise-aware": lambda: Calibrated(
        smoothing=1, law="gaussian", finite=False
    ),
    "Learned, gaussian, tweedie, noise-aware": lambda: Learned(law="gaussian", finite=False),
    "Learned, noise-aware": Learned,
    "Learned, finite, noise-aware": lambda: Learned(finite=True),
}
AWARE = ", noise-aware"  # clean estimates are read by the twin of --noise-aware
PUBLISHED = [  # what is run unless --guidance asks: nothing that is fitted
    n for n in GUIDANCES if not n.startswith("Learned") and not n.endswith(AWARE)
]
# and where there is a reader
READ = [n for n in GUIDANCES if n.startswith("Calibrated") and n.endswith(AWARE)]
OURS, THEIRS, GOAL = "Calibrated, memory", "DPS", 2.0
GOALS = {1.0: 0.6, 2.0: 0.45}  # efficiency of Learned, by shift
UNITS = [  # a class, and two channels: one of the patches, one of the cls token
    "bundled,class=horse",
    "bundled,layer=blocks.3,tokens=patch,reduction=mean,channel=17",
    "bundled,layer=blocks.4,tokens=cls,channel=40",
]
NEAR = 0.15  # a tuning run this near, as a share of the shift, is the last
TRIES = 2
FIRST, SECOND, TUNING = (
    0,
    10_000,
    20_000,
)  # first seeds: the rows at strength 1, the tuned rows, the tuning runs
RESAMPLES = 400
TOP = 20.0  # the largest l of the lower bound


@dataclass
class Figure:
    """One row: estimates with their bootstrap resamples (b,), in standard deviations of the prior and nats."""

    unit: str
    guidance: str
    strength: float
    target: float | None  # the shift that the strength was tuned to
    n: int
    lost: int
    shift: tuple[float, np.ndarray]
    path_kl: tuple[float, np.ndarray]
    kl_lower: tuple[float, np.ndarray]
    objective: tuple[float, np.ndarray]
    ess: float
    edge: bool
    seconds: float  # a sample

    @property
    def efficiency(self) -> tuple[float, np.ndarray]:
        return self.kl_lower[0] / self.path_kl[0], self.kl_lower[1] / self.path_kl[1]

    def plain(self) -> dict:
        out = {
            "unit": self.unit,
            "guidance": self.guidance,
            "strength": self.strength,
            "target": self.target,
            "n": self.n,
        }
        for name in ("shift", "path_kl", "kl_lower", "efficiency", "objective"):
            value, resamples = getattr(self, name)
            out |= {name: value, f"{name}_se": float(resamples.std())}
        return out | {
            "kl_lower_edge": self.edge, "ess": self.ess, "nonfinite": self.lost, "seconds_a_sample": self.seconds
        }  # fmt: skip

    def whole(self) -> dict:
        """As JSON holds it, resamples and all."""
        pairs = {k: (v[0], v[1].tolist()) for k, v in vars(self).items() if isinstance(v, tuple)}
        return vars(self) | pairs

    @classmethod
    def of(cls, kept: dict) -> "Figure":
        return cls(**{k: (v[0], np.asarray(v[1])) if isinstance(v, list) else v for k, v in kept.items()})


class Bench:
    """One prior, one chain, several units; one pool of unguided trajectories for everything."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        self.prior = load_prior(asked.prior, precision=asked.precision)
        self.bank = UnitBank([build_unit(u) for u in asked.units])
        self.bank.validate(self.prior.image_size)
        aware = UnitBank(self.bank.units)
        if asked.noise_aware:
            adopt_twins(aware, [asked.noise_aware], self.prior.fingerprint)
        self.banks = {False: self.bank, True: aware}
        self.names = [u.name for u in self.bank.units]
        start = time.perf_counter()
        reader = Learned() if any(g.startswith("Learned") for g in asked.guidance) else DPS()
        self.pilots, self.slopes, self.lessons = {}, {}, {}
        for twin in sorted({g.endswith(AWARE) for g in asked.guidance}):  # the same trajectories
            pilots = self._sampler(reader, twin).run_pilot(
                asked.pool, asked.batch_size, lambda k, n: tell(f"pool {k}/{n}")
            )
            self.pilots[twin] = pilots
            self.slopes[twin] = [
                UnitPilot(p.members[: asked.pilot], p.path[:, : asked.pilot]) for p in pilots
            ]
            tell(f"pool of {asked.pool}: {time.perf_counter() - start:.0f} s", end="\n")
        self.members = [p.members for p in pilots]
        if asked.bound > asked.pool:  # the pool's own seeds, and more
            drawn = run_pool(
                self._sampler(DPS()).chain, self.bank, self.prior.decode, asked.bound, "cpu", torch.float32,
                lambda k, n: tell(f"for the bound {k}/{n}"),
            )  # fmt: skip
            self.members = [drawn.members[:, k, : u.size] for k, u in enumerate(self.bank.units)]
            tell(f"{asked.bound} for the bound: {time.perf_counter() - start:.0f} s", end="\n")
        sampler = self.calibrated(DPS(), twin)
        naturals = sampler.constraint.naturals
        self.pool = [unguided((u.combine((m - n.member_mean) / n.member_std) - n.mean) / n.std)
                     for u, m, n in zip(self.bank.units, self.members, naturals)]  # fmt: skip
        self.trust = [trusted_log_z([pool], TOP) for pool in self.pool]
        rng = np.random.default_rng(0)
        self.counts = resample(rng, asked.samples)
        self.pool_counts = resample(rng, len(self.members[0]))
        self.free: dict[
            tuple[int, int], dict[str, np.ndarray]
        ] = {}  # (unit, first seed) -> the unguided twins

    def _sampler(self, guidance: Guidance, twin: bool = False) -> Sampler:
        return Sampler(
            self.prior, self.banks[twin], Linear(), guidance, self.asked.steps, order=self.asked.order
        )

    def calibrated(self, guidance: Guidance, twin: bool = False) -> Sampler:
        """twin: clean estimates are read by the noise-aware one."""
        sampler = self._sampler(guidance, twin)
        if not guidance.learns:
            sampler.calibrate(self.slopes[twin], self.members)
            return sampler
        told = guidance.describe()
        key = (
            twin,
            str({k: v for k, v in told.items() if k != "law"}),
        )  # of a(x_0), which no lesson depends on
        start, known = time.perf_counter(), self.lessons.get(key)
        said = "" if known else f"{len(self.names)} units learned"
        sampler.calibrate(self.pilots[twin], self.members, known, lambda k, n: tell(f"learning {k}/{n}"))
        self.lessons[key] = sampler.lessons
        if said:
            tell(f"{said}: {time.perf_counter() - start:.0f} s", end="\n")
        return sampler

    def run(
        self, sampler: Sampler, unit: int, strength: float, first: int, n: int, what: str
    ) -> dict[str, np.ndarray]:
        """n samples from seed `first` on -> columns z, energy, log_w, path_kl (n,), and finite."""
        rows = [Row(unit, strength, first + i) for i in range(n)]
        batches = [rows[i : i + self.asked.batch_size] for i in range(0, n, self.asked.batch_size)]
        done = [
            sampler.sample(
                batch, lambda k, steps, i=i: tell(f"{what}: batch {i + 1}/{len(batches)}, step {k}/{steps}")
            )
            for i, batch in enumerate(batches)
        ]
        names = ("z", "energy", "log_w", "path_kl", "finite")
        return {k: np.concatenate([getattr(s, k).numpy() for s in done]) for k in names}

    def twins(self, sampler: Sampler, unit: int, first: int, n: int) -> dict[str, np.ndarray]:
        """The same seeds unguided: the scene and most of the noise cancel in a difference, shift by shift."""
        if (unit, first) not in self.free:
            what = f"{self.names[unit]}, unguided twins"
            self.free[unit, first] = self.run(sampler, unit, 0.0, first, n, what)
        return self.free[unit, first]

    def tune(
        self, sampler: Sampler, unit: int, target: float, points: list, what: str, begin: float = 1.0
    ) -> float:
        """The strength of a shift near target. points: (log s, log shift) so far, and those that are found now; begin: the
        strength to begin with where there are none.

        Regula falsi on log shift against log strength. A run is compared with its unguided twins, seed by seed: the
        scene, most of the noise, cancels.
        """
        n = self.asked.tuning
        twins = self.twins(sampler, unit, TUNING, n)["z"]
        for attempt in range(TRIES):
            log_s = guess(points, target) if points else float(np.log(begin))
            run = self.run(sampler, unit, float(np.exp(log_s)), TUNING, n, f"{what}, tuning {attempt + 1}")
            found = float((run["z"] - twins)[run["finite"]].mean()) if run["finite"].any() else np.nan
            tell(f"{what}: strength {np.exp(log_s):.3g} shifts by {found:.2f}", end="\n")
            if not np.isfinite(found):
                points.append((log_s, np.log(10.0)))
                continue
            points.append((log_s, np.log(max(found, 0.1))))
            if abs(found - target) <= NEAR * target:
                break
        return round_off(np.exp(guess(points, target)))

    def row(self, sampler: Sampler, unit: int, name: str, strength: float, target: float | None) -> Figure:
        n, what = self.asked.samples, f"{self.names[unit]}, {name}"
        first = SECOND if target else FIRST
        twins = self.twins(sampler, unit, first, n)
        start = time.perf_counter()
        run = self.run(sampler, unit, strength, first, n, f"{what}, strength {strength:.3g}")
        seconds = (time.perf_counter() - start) / n
        keep = run["finite"] & twins["finite"]
        if keep.sum() < 2:
            raise SystemExit(
                f"{what}, strength {strength:.3g}: {n - keep.sum()} of {n} samples are not finite"
            )
        samples = Samples(
            strength, run["energy"][keep], run["log_w"][keep], run["path_kl"][keep], np.flatnonzero(keep)
        )
        moved = run["energy"][keep] - twins["energy"][keep]
        pool, ones, counts = self.pool[unit], np.ones(int(keep.sum())), self.counts[:, keep]
        natural = mean(pool.energy).value
        reach = least_kl(natural + mean(moved, None, samples.martingale).value, *self.trust[unit])

        def figures(mine: np.ndarray, theirs: np.ndarray) -> list:
            shift = -mean(moved, mine, samples.martingale).value  # E = -z
            path_kl = mean(samples.path_kl, mine).value
            # E_q'[E] = natural mean - shift: the pool's mean enters the bound and log Z alike, and drops out
            energy = mean(pool.energy, theirs).value - shift
            lower = -reach.l * energy - tilt(pool, reach.l, theirs).log_z if reach else 0 * energy
            cost = mean(samples.path_kl + strength * moved, mine, samples.martingale).value
            return [shift, path_kl, np.fmin(lower, path_kl), cost]

        point, again = figures(ones, np.ones(len(pool))), figures(counts, self.pool_counts)
        pairs = [(float(a), np.asarray(b)) for a, b in zip(point, again)]
        edge = bool(reach and reach.edge)
        ess = tilt(samples, strength).ess
        return Figure(
            self.names[unit],
            name,
            strength,
            target,
            len(samples),
            int((~keep).sum()),
            *pairs,
            ess,
            edge,
            seconds,
        )


def guess(points: list[tuple[float, float]], target: float) -> float:
    """The log strength at which log shift reaches log target: on the chord of the two points about it (of the nearest
    two while all are on one side), at most a factor 8 beyond them."""
    goal = np.log(target)
    below = [p for p in points if p[1] < goal]
    above = [p for p in points if p[1] >= goal]
    nearest = sorted(points, key=lambda p: abs(p[1] - goal))
    (x_0, y_0), slope = nearest[0], 1.0
    if below and above:
        (x_1, y_1), (x_2, y_2) = max(below, key=lambda p: p[1]), min(above, key=lambda p: p[1])
        slope = (y_2 - y_1) / (x_2 - x_1) if x_2 != x_1 else 1.0
    elif len(points) > 1:
        slope = (y_0 - nearest[1][1]) / (x_0 - nearest[1][0]) if x_0 != nearest[1][0] else 1.0
    step = (goal - y_0) / np.clip(slope, 0.4, 2.0)
    return float(x_0 + np.clip(step, -np.log(8), np.log(8)))


def round_off(strength: float) -> float:
    """Three digits: what the table prints is what was run."""
    return float(f"{strength:.3g}")


def unguided(z) -> Samples:
    z = np.asarray(z, np.float64)
    if not np.isfinite(z).all():
        raise SystemExit(f"the pool has {(~np.isfinite(z)).sum()} unguided samples that are not finite")
    return Samples(0.0, -z, None, None, np.arange(len(z)))


def resample(rng: np.random.Generator, n: int) -> np.ndarray:
    """(RESAMPLES, n) how often each sample is drawn."""
    return rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)


def tell(text: str, end: str = "\r") -> None:
    if end == "\n" or sys.stderr.isatty():
        print(f"\x1b[K{text}" if sys.stderr.isatty() else text, end=end, file=sys.stderr, flush=True)


def pm(pair: tuple[float, np.ndarray], digits: int = 2, sign: str = "") -> str:
    return f"{pair[0]:{sign}.{digits}f} ± {pair[1].std():.{digits}f}"


def print_rows(figures: list[Figure]) -> None:
    print(
        "\n| unit | guidance | strength | shift | path KL | kl_lower | efficiency | objective | ESS | s/sample |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for f in figures:
        lower = (">= " if f.edge else "") + pm(f.kl_lower)
        lost = f" ({f.lost} lost)" if f.lost else ""
        strength = f"{f.strength:.3g}" + (" (tuned)" if f.target else "") + lost
        print(
            f"| {f.unit} | {f.guidance} | {strength} | {pm(f.shift)} | {pm(f.path_kl)} | {lower} | {pm(f.efficiency)} "
            f"| {pm(f.objective, sign='+')} | {f.ess:.1f} | {f.seconds:.2f} |"
        )


def print_closing(figures: list[Figure], units: list[str], target: float) -> dict:
    """Efficiency at the strengths tuned to this shift, mean over units, and the verdict."""
    tuned = {(f.unit, f.guidance): f for f in figures if f.target == target}
    names = list(dict.fromkeys(f.guidance for f in figures))
    means = {}
    print(f"\nKL efficiency at a shift near {target:g}\n")
    print("| guidance | " + " | ".join(units) + " | mean | shifts | s/sample |")
    print("|---" * (len(units) + 4) + "|")
    for name in names:
        rows = [tuned[u, name] for u in units]
        means[name] = tuple(np.mean([r.efficiency[k] for r in rows], 0) for k in (0, 1))
        cells = [pm(r.efficiency) for r in rows] + [pm(means[name])]
        shifts = ", ".join(f"{r.shift[0]:.2f}" for r in rows)
        seconds = np.mean([r.seconds for r in rows])
        print(f"| {name} | {' | '.join(cells)} | {shifts} | {seconds:.2f} |")
    closing = {"efficiency": {k: float(v[0]) for k, v in means.items()}}
    # by a reader, where there is one: so does sample.py
    ours = OURS + AWARE if OURS + AWARE in means else OURS
    for name in names:
        if name.startswith("Learned") and target in GOALS:
            passed = means[name][0] >= GOALS[target]
            print(f"\n{'PASS' if passed else 'FAIL'}: the KL efficiency of {name} is {pm(means[name])}; goal: at least "
                  f"{GOALS[target]:g}.")  # fmt: skip
        if name.startswith(OURS) and THEIRS in means:
            ratio, again = float(means[name][0] / means[THEIRS][0]), means[name][1] / means[THEIRS][1]
            low, high = np.nanquantile(again, [0.16, 0.84])  # no standard error: the ratio's tail is heavy
            closing[f"ratio of {name}"] = {"value": ratio, "low": float(low), "high": float(high)}
            said = f"the KL efficiency of {name} is {ratio:.1f} times that of {THEIRS} (68 %: {low:.1f} to {high:.1f})"
            if name == ours and target == 1:
                said = f"{'PASS' if ratio >= GOAL else 'FAIL'}: {said}; goal: at least {GOAL:g}"
            print(f"\n{said}.")
    return closing


def common(description: str) -> argparse.ArgumentParser:
    """The options of every command that makes such rows."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="bundled", help="bundled, a diffusers folder, or a hub name")
    parser.add_argument(
        "--precision",
        default=cpu_precision(),
        help="of the prior's network: bfloat16 or float32; what this CPU is faster with",
    )
    parser.add_argument(
        "--units", nargs="+", default=UNITS, help="addresses (with weights=FILE for other encoders)"
    )
    parser.add_argument("--noise-aware", help="the folder of a twin that reads clean estimates, or bundled")
    parser.add_argument("--samples", type=int, default=64, help="of a row")
    parser.add_argument("--pool", type=int, default=256, help="unguided samples")
    parser.add_argument(
        "--bound", type=int, default=0, help="unguided samples for kl_lower; those of the pool unless more"
    )
    parser.add_argument("--pilot", type=int, default=64, help="of the pool, for the slopes of Calibrated")
    parser.add_argument("--tuning", type=int, default=16, help="samples of a tuning run")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--order", type=int, default=1, choices=ORDERS, help="of the chain")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="does it run: one unit, a few samples and steps")
    return parser


def read_by_the_bundled(unit: str) -> bool:
    """Whether the bundled reader was trained for it."""
    told = json.loads((twin_folder("bundled") / CONFIG).read_text())["units"]
    known = {same_unit(Address.parse(f"bundled,{u}")) for u in told}
    addresses = [getattr(m, "address", None) for m in build_unit(unit).members]
    return all(a and a.encoder == "bundled" and same_unit(a) in known for a in addresses)


def arguments() -> argparse.Namespace:
    parser = common(__doc__)
    parser.add_argument(
        "--guidance",
        nargs="+",
        choices=list(GUIDANCES),
        metavar="NAME",
        help="unless said, all that nothing is fitted for",
    )
    parser.add_argument("--shift", nargs="+", type=float, default=[1.0], help="in prior standard deviations")
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args()
    if asked.noise_aware is None and asked.prior == "bundled" and all(map(read_by_the_bundled, asked.units)):
        asked.noise_aware = "bundled"  # as "auto" of sample.py takes it
    asked.guidance = asked.guidance or PUBLISHED + (READ if asked.noise_aware else [])
    if asked.quick:
        asked.samples, asked.steps, asked.pool, asked.pilot = 4, 6, 32, 32
        asked.tuning, asked.batch_size, asked.units = 2, 8, asked.units[:1]
    if not asked.noise_aware and any(g.endswith(AWARE) for g in asked.guidance):
        parser.error("the noise-aware rows need --noise-aware FOLDER")
    if not 8 <= asked.pilot <= asked.pool:
        parser.error("expected 8 <= --pilot <= --pool")
    if not all(0 < x < np.inf for x in asked.shift):
        parser.error(f"expected every --shift above 0, found {asked.shift}")
    return asked


def main() -> None:
    asked, start = arguments(), time.perf_counter()
    bench, figures = None, kept(asked)
    spent = sum(f.seconds * f.n for f in figures.values())
    names = [build_unit(u).name for u in asked.units]
    for unit, name in ((u, g) for u in range(len(names)) for g in asked.guidance):
        what, keys = (
            f"{names[unit]}, {name}",
            [(names[unit], name, target) for target in (None, *asked.shift)],
        )
        if all(k in figures for k in keys):
            continue
        same = [figures.get((names[unit], "DPS", k[2])) for k in keys]
        if name == "MomentMatched" and all(same):  # one and the same for a linear energy: it is not run twice
            figures |= {k: replace(f, guidance=name) for k, f in zip(keys, same)}
            continue
        bench = bench or Bench(asked)
        sampler = bench.calibrated(GUIDANCES[name](), name.endswith(AWARE))
        for key in keys:
            if key in figures:
                continue
            if key[2] is None:
                strength = 1.0
            else:
                points = [
                    (np.log(f.strength), np.log(max(f.shift[0], 0.1))) for f in map(figures.get, keys) if f
                ]
                strength = bench.tune(sampler, unit, key[2], points, what)
            f = figures[key] = bench.row(sampler, unit, name, strength, key[2])
            keep(asked, figures)
            tell(
                f"{what}, strength {f.strength:.3g}: shift {pm(f.shift)}, path KL {pm(f.path_kl)}, efficiency "
                f"{pm(f.efficiency)} [{time.perf_counter() - start:.0f} s]", end="\n",
            )  # fmt: skip
    wanted = [figures[u, g, target] for u in names for g in asked.guidance for target in (None, *asked.shift)]
    minutes = (time.perf_counter() - start + spent) / 60
    print(
        f"prior {asked.prior}, {asked.precision}; {asked.steps} steps of order {asked.order}, eta 1, uniform in log-SNR; {asked.samples} samples a "
        f"row; pool of {asked.pool}, slopes from {asked.pilot}, kl_lower from {max(asked.bound, asked.pool)}; {minutes:.1f} minutes"
        + (" (--quick: the figures mean nothing)" if asked.quick else "")
    )
    print_rows(wanted)
    keep(asked, figures, {f"shift {x:g}": print_closing(wanted, names, x) for x in asked.shift})


DEFAULT = {"bound": 0, "order": 1}  # of options that came later than figures that are kept


def settings_of(asked: argparse.Namespace) -> dict:
    free = (
        "units",
        "guidance",
        "shift",
        "out",
        "batch_size",
        "noise_aware",
    )  # a row is the same beside any others
    told = {"prior_sha256": load_prior(asked.prior).fingerprint}
    return {k: v for k, v in vars(asked).items() if k not in free and v != DEFAULT.get(k, "none")} | told


def fingerprints(asked: argparse.Namespace) -> dict[str, str]:
    return {u.name: u.fingerprint for u in map(build_unit, asked.units)}


def twin_of(asked: argparse.Namespace) -> str | None:
    """sha256 of what the twin of --noise-aware reads by: weights, and the levels that it is used at."""
    if not asked.noise_aware:
        return None
    folder = twin_folder(asked.noise_aware)
    levels = json.loads((folder / CONFIG).read_text())["log_snr"]
    return hashlib.sha256((folder / WEIGHTS).read_bytes() + json.dumps(levels).encode()).hexdigest()


def kept(asked: argparse.Namespace) -> dict[tuple, Figure]:
    """What an earlier call left in --out."""
    if asked.out is None or not asked.out.exists():
        return {}
    body = json.loads(asked.out.read_text())
    if body["settings"] != settings_of(asked):
        raise SystemExit(f"{asked.out} holds figures of other settings: give another --out")
    for name, sha256 in fingerprints(asked).items():
        if body["unit_sha256"].get(name, sha256) != sha256:
            raise SystemExit(f"{asked.out} holds figures of {name} with other weights: give another --out")
    figures = [Figure.of(f) for f in body["kept"]]
    if any(f.guidance.endswith(AWARE) for f in figures) and body.get("noise_aware_sha256") != twin_of(asked):
        raise SystemExit(f"{asked.out} holds figures by another noise-aware twin: give another --out")
    return {(f.unit, f.guidance, f.target): f for f in figures}


def keep(asked: argparse.Namespace, figures: dict[tuple, Figure], closing: dict | None = None) -> None:
    if asked.out is None:
        return
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    rows = list(figures.values())
    before = json.loads(asked.out.read_text())["unit_sha256"] if asked.out.exists() else {}
    body = {"settings": settings_of(asked), "noise_aware_sha256": twin_of(asked), "unit_sha256": before | fingerprints(asked), **(closing or {}), "rows": [f.plain() for f in rows],
            "kept": [f.whole() for f in rows]}  # fmt: skip
    fresh = asked.out.with_name(f"{asked.out.name}.part")
    fresh.write_text(json.dumps(body) + "\n")
    fresh.replace(asked.out)


if __name__ == "__main__":
    main()
