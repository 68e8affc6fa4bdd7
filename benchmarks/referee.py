"""Three ways to KL(s), side by side: particles, MBAR over their sweep, and the gradient-free referee in noise space.

    python benchmarks/referee.py [--out figures.json] [--units ADDRESS ...] [--nats 3] [--device cuda] [--quick]

For every unit the referee's burn-in says at which strength KL(q_s||p) is near --nats; its annealed walks go there,
and are read at three strengths on the way, even in thermodynamic length. Particles (Calibrated guidance) sample the same
strengths on other seeds, and MBAR takes their weighted samples together with a pool of unguided ones, made once for all
units. Nothing but the units' standardisation and the law, p of this chain at strength 0, is shared by particles and referee.

KL in nats, +- one standard error (bootstrap over groups of particles, or over walks, widened as every report's, see
estimates/widening.py); in parentheses where the weights
do not stand for it themselves (see estimates/importance.py). off: the difference from the referee in units of the
combined standard error. kl_lower <= KL(q^||p) <= path KL bound what the particles sampled, and path KL of the walks what
the walks did. m(s) of the second table is that of plain Metropolis chains at the largest strength (--chains), against the
walks. A unit's rows are printed as it ends, and kept in --out: the same call goes on where it was stopped. Tables go to
stdout, progress to stderr.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from tiltlens.energies import Linear
from tiltlens.estimates import estimate_curve, mbar
from tiltlens.estimates.bootstrap import replicate
from tiltlens.estimates.bounds import mean
from tiltlens.estimates.importance import KL_ROOT, relative_variance, tilt
from tiltlens.estimates.samples import Samples
from tiltlens.estimates.widening import of_pool, of_run
from tiltlens.guidance import Calibrated
from tiltlens.modules.accelerator import cpu_precision
from tiltlens.priors import load_prior
from tiltlens.sampling import NoiseSpace, Particles
from tiltlens.sampling.burn_in import BurnIn
from tiltlens.sampling.chain_sampler import Independent
from tiltlens.sampling.equilibrium import equilibrium
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import UnitBank, build_unit

UNITS = [
    "bundled,class=horse",
    "bundled,class=ship",
    "bundled,layer=blocks.3,tokens=patch,reduction=mean,channel=17",
    "bundled,layer=blocks.2,tokens=patch,reduction=mean,channel=5",
    "bundled,layer=blocks.4,tokens=cls,channel=40",
]
STRENGTHS = 3
WALKS, CHAINS, POOL = 100_000, 200_000, 500_000  # first seeds; those of particles begin at 0
TOLERANCE = 3.0  # combined standard errors
KEPT = ("activation", "z", "energy", "log_w", "path_kl", "finite", "group", "weight", "ancestor")


@dataclass
class Figure:
    """One strength of one unit. Pairs are (estimate, standard error); sound: whether the weights stand for it."""

    unit: str
    strength: float
    particles: tuple[float, float]
    mbar: tuple[float, float]
    walks: tuple[float, float]
    sound: tuple[bool, bool, bool]
    kl_lower: float | None
    path_kl: float | None
    walk_path_kl: tuple[float, float]
    ess: tuple[float, float, float]

    def off(self, name: str) -> float:
        """Of particles or mbar from the walks, in combined standard errors."""
        a, b = getattr(self, name), self.walks
        return (a[0] - b[0]) / float(np.hypot(a[1], b[1]))


class Nothing:
    """In place of chains that were not asked for."""

    autocorrelation = effective = energy = energy_se = float("nan")


class Bench:
    """One prior, one chain, all units; one pool of unguided trajectories."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        prior = load_prior(asked.prior, precision=asked.precision)
        bank = UnitBank([build_unit(u) for u in asked.units])
        bank.validate(prior.image_size)
        self.names = [u.name for u in bank.units]
        self.particles = Particles(asked.particles)
        self.sampler = Sampler(
            prior, bank, Linear(), Calibrated(), asked.steps, device=asked.device, method=self.particles
        )
        pilots = self.sampler.run_pilot(asked.pilot, asked.batch_size, lambda k, n: tell(f"pilot {k}/{n}"))
        self.sampler.calibrate(pilots)
        members = self._unguided()
        self.sampler.calibrate(pilots, [members[:, u, : unit.size] for u, unit in enumerate(bank.units)])
        self.parts = self.sampler.parts()
        self.pool = []
        for u, (unit, n) in enumerate(zip(bank.units, self.sampler.constraint.naturals)):
            a = unit.combine((members[:, u, : unit.size] - n.member_mean) / n.member_std).double().numpy()
            z = (a - n.mean) / n.std
            self.pool.append({"energy": -z, "activation": a, "z": z})

    def _unguided(self) -> torch.Tensor:
        """Raw member activations (N, units, K) of unguided samples."""
        found, bank, device = [], self.sampler.bank, self.asked.device
        free = Independent()
        for seeds in batches(self.asked.pool, self.asked.batch_size):
            images = free.run(self.sampler.parts(), [Row(0, 0.0, POOL + k) for k in seeds]).images
            with torch.no_grad():
                found.append(bank.read_all(images.to(device)).double().cpu())
            tell(f"pool {seeds.stop}/{self.asked.pool}")
        return torch.cat(found)

    def unit(self, u: int) -> tuple[list[Figure], dict]:
        asked, start = self.asked, time.perf_counter()
        referee = NoiseSpace(asked.levels, final=asked.final)
        top = strength_of(referee.burn_in(self.parts, u), asked.nats)
        walks = [referee.walk(self.parts, [Row(u, top, WALKS + k) for k in seeds], self.tell(f"{self.names[u]}, walks"))
                 for seeds in batches(asked.walks, asked.batch_size)]  # fmt: skip
        join = lambda name: torch.cat([getattr(w, name) for w in walks]).cpu().numpy()  # noqa: E731
        ladder, energies, log_w = join("ladder")[0], join("energies"), join("log_weights")
        seconds = [time.perf_counter() - start]
        at = np.linspace(0, asked.levels, STRENGTHS + 1).round().astype(int)[1:]
        strengths = [float(ladder[k]) for k in at]
        table = self.sweep(u, strengths)
        seconds.append(time.perf_counter() - start - seconds[0])
        figures = self.figures(u, strengths, energies[:, at], log_w[:, at], table)
        chains = None
        if asked.chains:
            chains = equilibrium(
                referee, self.parts, u, top, range(CHAINS, CHAINS + asked.chains), asked.moves, asked.moves // 4,
                self.tell(f"{self.names[u]}, chains"),
            )  # fmt: skip
        told = next(d for d in referee.diagnostics() if d["strength"] == top)
        last = run_of(top, energies[:, -1], log_w[:, -1])
        m, m_se = estimate(last, lambda run, counts: tilt(run, top, counts).energy, top)
        return figures, {
            "unit": self.names[u], "strength": top, "acceptance": [min(told["acceptance"]), max(told["acceptance"])],
            "beta": told["beta"][-1], "lost": told["lost"], "autocorrelation": (chains or Nothing).autocorrelation,
            "effective": (chains or Nothing).effective, "m_chains": (chains or Nothing).energy,
            "m_chains_se": (chains or Nothing).energy_se, "m_walks": m, "m_walks_se": m_se, "seconds_walks": seconds[0], "seconds_particles": seconds[1],
        }  # fmt: skip

    def sweep(self, u: int, strengths: list[float]) -> dict[str, np.ndarray]:
        """The particles' rows at every strength, as columns."""
        columns: dict[str, list] = {}
        size = self.particles.group_size
        rows = [Row(u, s, k) for s in strengths for k in range(self.asked.groups * size)]
        at_once = max(1, self.asked.batch_size // size) * size
        for i in range(0, len(rows), at_once):
            mine = rows[i : i + at_once]
            found = self.sampler.sample(
                mine, self.tell(f"{self.names[u]}, particles from {i} of {len(rows)}")
            )
            named = {"strength": [r.strength for r in mine], "seed": [r.seed for r in mine]}
            named |= {k: getattr(found, k).numpy() for k in KEPT}
            for k, v in named.items():
                columns.setdefault(k, []).append(v)
        return {k: np.concatenate(v) for k, v in columns.items()}

    def figures(self, u: int, strengths: list[float], energies, log_w, table) -> list[Figure]:
        """energies, log_w: of the walks (walks, strengths)."""
        curve, _ = estimate_curve(self.names[u], table, self.pool[u])
        free = Samples(0.0, self.pool[u]["energy"], None, None, -1 - np.arange(self.asked.pool))
        size = self.particles.group_size
        runs = []
        for s in strengths:
            mine = {k: v[table["strength"] == s] for k, v in table.items()}
            keep = mine["finite"]
            runs.append(Samples(s, *(mine[k][keep] for k in ("energy", "log_w", "path_kl")), mine["group"][keep],
                                mine["weight"][keep] * size if size > 1 else None, mine["ancestor"][keep]))  # fmt: skip
        pool = mbar.pool_draws([free, *runs])
        joint = replicate(
            lambda counts: mbar.evaluate(pool, strengths, counts).kl(np.array(strengths)),
            [run.cluster for run in (free, *runs)],
        )
        joint_se = joint.se() * np.array([of_pool(pool, s, [free, *runs]) for s in strengths])
        out = []
        for k, (s, run) in enumerate(zip(strengths, runs)):
            walks = run_of(s, energies[:, k], log_w[:, k])
            row = next(r for r in curve if r["strength"] == s)
            kl = lambda run, counts, s=s: tilt(run, s, counts).kl(s)  # noqa: E731
            sound = [bool(np.isfinite(relative_variance(x, s, KL_ROOT))) for x in (run, walks)]
            spent = mean(walks.path_kl)
            out.append(Figure(
                self.names[u], s, estimate(run, kl, s), (float(joint.values[0, k]), float(joint_se[k])), estimate(walks, kl, s),
                (sound[0], bool(mbar.healthy(pool, s, KL_ROOT)), sound[1]), row["kl_lower"], row["path_kl"],
                (float(spent.value), float(spent.se)),
                (tilt(run, s).ess, mbar.trusted_draws(pool, s), tilt(walks, s).ess),
            ))  # fmt: skip
        return out

    def tell(self, what: str):
        return lambda done, total: tell(f"{what}: {done}/{total}")


def strength_of(burn_in: BurnIn, nats: float) -> float:
    """Where KL = integral_0^s r Var(E) dr, by the burn-in's few replicas, reaches so many nats; three digits."""
    while True:
        s, rate = np.array(burn_in.strengths), np.array(burn_in.strengths) * np.array(burn_in.deviations) ** 2
        kl = np.concatenate([[0.0], np.cumsum(np.diff(s) * (rate[1:] + rate[:-1]) / 2)])
        if kl[-1] >= nats:
            return float(f"{np.interp(nats, kl, s):.3g}")
        burn_in.beta(np.array(np.nextafter(s[-1], np.inf)))


def run_of(strength: float, energy: np.ndarray, log_w: np.ndarray) -> Samples:
    """The walks at one level, as samples with weights."""
    keep = np.isfinite(energy) & np.isfinite(log_w)
    energy, log_w = energy[keep], log_w[keep]
    return Samples(strength, energy, log_w, -(log_w + strength * energy), np.flatnonzero(keep))


def estimate(run: Samples, statistic, strength: float) -> tuple[float, float]:
    """(value, standard error) of a statistic (run, counts) -> (B,) of the weights for this strength."""
    found = replicate(lambda counts: statistic(run, counts[0])[:, None], [run.cluster])
    return float(found.values[0, 0]), float(found.se()[0]) * of_run(run, strength)


def batches(n: int, size: int) -> list[range]:
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def tell(text: str, end: str = "\r") -> None:
    if end == "\n" or sys.stderr.isatty():
        print(f"\x1b[K{text}" if sys.stderr.isatty() else text, end=end, file=sys.stderr, flush=True)


def pm(pair: tuple[float, float], sound: bool = True) -> str:
    text = f"{pair[0]:.2f} ± {pair[1]:.2f}"
    return text if sound else f"({text})"


def number(x: float | None, sign: str = "") -> str:
    return "–" if x is None or not np.isfinite(x) else f"{x:{sign}.2f}"


def print_figures(figures: list[Figure], head: bool = True) -> None:
    if head:
        print(
            "\n| unit | strength | KL particles | KL MBAR | KL noise space | off particles | off MBAR | kl_lower | path KL "
            "| path KL walks | ESS particles, MBAR, walks |"
        )
        print("|---" * 11 + "|", flush=True)
    for f in figures:
        kls = [pm(x, sound) for x, sound in zip((f.particles, f.mbar, f.walks), f.sound)]
        ess = ", ".join(f"{x:.0f}" for x in f.ess)
        print(
            f"| {f.unit} | {f.strength:.3g} | {' | '.join(kls)} | {number(f.off('particles'), '+')} | {number(f.off('mbar'), '+')} "
            f"| {number(f.kl_lower)} | {number(f.path_kl)} | {pm(f.walk_path_kl)} | {ess} |",
            flush=True,
        )


def print_walks(told: list[dict]) -> None:
    print("\n| unit | strength | acceptance | beta at the end | autocorrelation | effective | m(s) chains | m(s) walks "
          "| off | lost | s walks | s particles |")  # fmt: skip
    print("|---" * 12 + "|")
    for d in told:
        chains, walks = (d["m_chains"], d["m_chains_se"]), (d["m_walks"], d["m_walks_se"])
        off = (chains[0] - walks[0]) / np.hypot(chains[1], walks[1])
        print(
            f"| {d['unit']} | {d['strength']:.3g} | {d['acceptance'][0]:.2f} to {d['acceptance'][1]:.2f} | {d['beta']:.2f} "
            f"| {number(d['autocorrelation'])} | {number(d['effective'])} | {pm(chains) if np.isfinite(off) else '–'} | {pm(walks)} "
            f"| {number(off, '+')} "
            f"| {d['lost']} | {d['seconds_walks']:.0f} | {d['seconds_particles']:.0f} |"
        )


def verdict(figures: list[Figure]) -> dict:
    """Where both estimates stand for themselves they must agree."""
    both = [(f, name, f.off(name)) for f in figures
            for name, sound in (("particles", f.sound[0]), ("mbar", f.sound[1])) if sound and f.sound[2]]  # fmt: skip
    both = [(f, name, off) for f, name, off in both if np.isfinite(off)]
    wrong = [x for x in both if abs(x[2]) > TOLERANCE]
    rms = float(np.sqrt(np.mean([off**2 for *_, off in both]))) if both else float("nan")
    said = "FAIL" if wrong else "PASS" if both else "NOTHING TO COMPARE"
    print(
        f"\n{said}: {len(both) - len(wrong)} of {len(both)} comparisons in which both sides stand for their weights agree "
        f"within {TOLERANCE:g} combined standard errors; root mean square {rms:.2f}, ideal 1 or less."
    )
    every = np.array([f.off(name) for f in figures for name in ("particles", "mbar")])
    every = every[np.isfinite(every)]
    near = (abs(every) <= TOLERANCE).sum()
    print(
        f"Those in parentheses counted too: {near} of {len(every)}; root mean square {np.sqrt(np.mean(every**2)):.2f}."
    )
    inside = [f.kl_lower - TOLERANCE * f.particles[1] <= f.particles[0] <= f.path_kl + TOLERANCE * f.particles[1]
              for f in figures if f.kl_lower is not None and f.path_kl is not None]  # fmt: skip
    print(
        f"kl_lower <= KL particles <= path KL, within {TOLERANCE:g} standard errors: {sum(inside)} of {len(inside)} rows."
    )
    for f, name, off in wrong:
        print(f"- {f.unit}, strength {f.strength:.3g}: {name} off by {off:+.1f}")
    return {"verdict": said, "compared": len(both), "off": len(wrong), "rms": rms}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="bundled", help="bundled, a diffusers folder, or a hub name")
    parser.add_argument(
        "--precision",
        default=cpu_precision(),
        help="of the prior's network: bfloat16 or float32; what this CPU is faster with",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--units", nargs="+", default=UNITS, help="addresses")
    parser.add_argument("--nats", type=float, default=3.0, help="KL at the largest strength, about")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pool", type=int, default=1000, help="unguided samples")
    parser.add_argument("--pilot", type=int, default=64, help="trajectories for the slopes of Calibrated")
    parser.add_argument("--particles", type=int, default=32, help="in a group")
    parser.add_argument("--groups", type=int, default=8, help="of particles, at each strength")
    parser.add_argument("--walks", type=int, default=32, help="of the referee")
    parser.add_argument("--levels", type=int, default=36, help="of a walk's ladder, a multiple of 3")
    parser.add_argument("--final", type=int, default=2, help="further moves at its end")
    parser.add_argument("--chains", type=int, default=0, help="Metropolis chains at the largest strength")
    parser.add_argument(
        "--moves", type=int, default=32, help="of a chain, after a quarter as many to warm up"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="keep the figures as JSON, unit by unit")
    parser.add_argument("--quick", action="store_true", help="does it run: one unit, a few samples and steps")
    asked = parser.parse_args()
    if asked.quick:
        asked.steps, asked.pool, asked.pilot, asked.particles, asked.groups = 8, 32, 32, 8, 2
        asked.walks, asked.levels, asked.final, asked.chains, asked.moves = 16, 3, 1, 16, 4
        asked.batch_size, asked.units, asked.nats = 16, asked.units[:1], 1.0
    if min(asked.pilot, asked.pool) < 8:
        parser.error("expected --pilot >= 8 and --pool >= 8")
    if asked.levels % STRENGTHS:
        parser.error(f"expected --levels a multiple of {STRENGTHS}, found {asked.levels}")
    return asked


def main() -> None:
    asked, start = arguments(), time.perf_counter()
    settings = {k: str(v) for k, v in vars(asked).items() if k not in ("units", "out")}
    held = kept(asked.out, settings)
    missing = [u for u in asked.units if build_unit(u).name not in held]
    bench = Bench(asked) if missing else None
    print(
        f"prior {asked.prior}, {asked.precision}, {asked.device}; {asked.steps} steps, eta 1, uniform in log-SNR; {asked.groups} "
        f"groups of {asked.particles} particles a strength; {asked.walks} walks on {asked.levels} levels; pool of {asked.pool}"
        + (" (--quick: the figures mean nothing)" if asked.quick else "")
    )
    figures, told = [], []
    for u, address in enumerate(asked.units):
        name = build_unit(address).name
        if name not in held:
            rows, walk = bench.unit(u)
            held[name] = {"rows": [asdict(f) for f in rows], "walk": walk}
            keep(asked.out, settings, held)
        figures += [Figure(**f) for f in held[name]["rows"]]
        told.append(held[name]["walk"])
        print_figures([f for f in figures if f.unit == name], head=u == 0)
        tell(f"{name}: {time.perf_counter() - start:.0f} s", end="\n")
    print_walks(told)
    keep(asked.out, settings, held, verdict(figures))


def kept(path: Path | None, settings: dict) -> dict:
    """What an earlier call left: unit -> rows and walk."""
    if path is None or not path.exists():
        return {}
    body = json.loads(path.read_text())
    if body["settings"] != settings:
        raise SystemExit(f"{path} holds figures of other settings: give another --out")
    return body["units"]


def keep(path: Path | None, settings: dict, units: dict, closing: dict | None = None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"settings": settings, "units": units, **(closing or {})}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
