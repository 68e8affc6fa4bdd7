"""What is to be seen at a few nats, and whether another network sees it too: four ways to one class, side by side.

    python benchmarks/eye_and_judge.py --judge DIR [--out runs/eye-and-judge] [--classes horse ship ...] [--nats 3] [--quick]

DIR: a timm folder of a classifier of another architecture, of the same classes (README of this folder). For every class:

    plain         Calibrated guidance with memory: rows of fixed seeds at the strength whose path KL is near --nats
    learned       the same seeds under Learned guidance (its law Gaussian, as the plain one's), at its own strength for as many nats
    particles     twisted sequential Monte Carlo at the strength where KL(q_s||p) of the re-weighted samples is --nats
    re-weighted   unguided images, made once for all classes, drawn in proportion to exp(-s E) at that strength, or where ESS
                  falls to 24 if that comes first: the class's own ceiling, as far as these images tell

OUT/CLASS.png shows 16 of each and the unguided images of the first two rows' seeds (particles and re-weighted images are drawn
systematically by weight, so that one may stand there twice), OUT/overview.png eight of each. Classes that are done are not
sampled again: an interrupted call is simply repeated, and another judge costs no sampling.

shift: of the mean activation, in standard deviations of the unguided images; guided rows against their unguided twins. nats:
path KL (of particles: -s E - log Z^), an upper bound on what was paid, and the least that any law with this shift pays. judge:
shift of the judge's logit of the same class, in its own unguided standard deviations. *Equal activation*: the re-weighted
images are a curve, s -> (shift of the activation, shift of the judge), which can be read at any shift up to their ceiling; so
every run is held against it at the run's own shift, and no strength need be matched: ratio = judge / judge of the re-weighted
at that shift. Below 1 a run moves the encoder by what the judge does not see. named: share of the images that the judge gives this class before all others. +- is one
standard error: bootstrap over seeds, groups of particles and unguided images, which all rows of a class share. Tables go to stdout, progress to stderr.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tiltlens.energies import Linear
from tiltlens.guidance import Calibrated, Guidance, Learned
from tiltlens.modules.accelerator import cpu_precision
from tiltlens.priors import load_prior
from tiltlens.sampling import Particles
from tiltlens.sampling.chain import ORDERS
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import UnitBank, build_unit
from tiltlens.units.sources import load_encoder

CLASSES = ["horse", "ship", "airplane", "cat", "frog"]
METHODS = ("unguided", "plain", "learned", "particles", "re-weighted")
GOAL = 0.8
CEILING = 24.0  # ESS of the re-weighted images at the largest strength that they are shown at
REACH = 8.0  # and at the largest that a run is held against
TUNING, POOL = 20_000, 500_000  # first seeds; those of the rows are 0, 1, ..
RESAMPLES = 200
SHOWN = 16


@dataclass
class Figure:
    """A method's row: pairs are (estimate, standard error), None where not defined."""

    name: str
    method: str
    strength: float
    n: int
    shift: tuple[float, float]
    nats: tuple[float, float]
    least: tuple[float, float] | None
    judge: tuple[float, float]
    ratio: tuple[float, float] | None
    named: float
    seconds: float


class Curve:
    """The re-weighted images. z, judge (N,): activation and the judge's logit, standardised on these images."""

    def __init__(self, z: np.ndarray, judge: np.ndarray):
        self.z, self.judge = z, judge
        rng = np.random.default_rng(0)
        again = rng.multinomial(len(z), np.full(len(z), 1 / len(z)), RESAMPLES)
        self.counts = np.concatenate([np.ones((1, len(z))), again])  # the first row is the estimate itself
        self.top = self._strength_of_ess(REACH)

    def weights(self, strength: float) -> np.ndarray:
        w = np.exp(strength * (self.z - self.z.max()))
        return w / w.sum()

    def ess(self, strength: float) -> float:
        return float(1 / (self.weights(strength) ** 2).sum())

    def _strength_of_ess(self, ess: float) -> float:
        return solve(lambda s: np.array([-self.ess(float(s[0]))]), np.array([-ess]), 100.0)[0]

    def at(self, strength: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each resample, at its own strength (1 + B,): shift of z and of the judge, and KL(q_s||p)."""
        top = self.z.max()
        w = self.counts * np.exp(strength[:, None] * (self.z - top))
        total, n = w.sum(1), self.counts.sum(1)
        z, judge = w @ self.z / total, w @ self.judge / total
        log_z = strength * top + np.log(total / n)
        return z - self.counts @ self.z / n, judge - self.counts @ self.judge / n, strength * z - log_z

    def strength_at(self, nats: float) -> float:
        """Where KL(q_s||p) is so large, or the ceiling; three digits."""
        top = self._strength_of_ess(CEILING)
        kl = lambda s: self.at(np.broadcast_to(s, len(self.counts)))[2][:1]  # noqa: E731
        return float(f"{solve(kl, np.array([nats]), top)[0]:.3g}")

    def beside(self, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Judge's shift and KL where the activation's is `shift` (1 + B,); None beyond reach."""
        limit = np.full(len(shift), self.top)
        if not 0 < shift[0] < self.at(limit)[0][0]:
            return None
        strength = solve(lambda s: self.at(s)[0], shift, self.top)
        return self.at(strength)[1:]


def solve(f, goal: np.ndarray, top: float) -> np.ndarray:
    """Bisection on [0, top], for increasing f: (B,) -> (B,); the end where the goal lies beyond."""
    low, high = np.zeros(len(goal)), np.full(len(goal), top)
    for _ in range(40):
        middle = (low + high) / 2
        below = f(middle) < goal
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return high


class Bench:
    """One prior, one chain; one set of unguided images for all classes. What is sampled knows nothing of the judge."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        self.prior = load_prior(asked.prior, precision=asked.precision)
        self.units = [build_unit(f"{asked.encoder},class={c}") for c in asked.classes]
        self.bank = UnitBank(self.units)
        self.bank.validate(self.prior.image_size)
        learner = Sampler(
            self.prior,
            self.bank,
            Linear(),
            Learned(shadows=asked.shadows, law="gaussian"),
            asked.steps,
            order=asked.order,
        )
        self.pilots = learner.run_pilot(asked.pilot, asked.batch_size, lambda k, n: tell(f"pilot {k}/{n}"))
        self.images = self._unguided()
        self.reads = read(self.bank, self.images)

    def _unguided(self) -> Tensor:
        """(N, 3, H, W), kept in OUT."""
        path, n, size = self.asked.out / "unguided.safetensors", self.asked.pool, self.asked.batch_size
        if path.exists():
            return safetensors.torch.load_file(path)["images"].float()
        sampler, images = self.sampler(0, Calibrated()), []
        for i in range(0, n, size):
            rows = [Row(0, 0.0, POOL + k) for k in range(i, min(i + size, n))]
            images.append(sampler.sample(rows).images)
            tell(f"unguided {i + len(rows)}/{n}")
        images = torch.cat(images)
        images = images[torch.isfinite(images).flatten(1).all(1)].half()
        safetensors.torch.save_file({"images": images}, path)
        return images.float()

    def sampler(
        self, unit: int, guidance: Guidance, method=None, reference: list[Tensor] | None = None
    ) -> Sampler:
        """Of one unit alone."""
        bank = UnitBank([self.units[unit]])
        found = Sampler(
            self.prior, bank, Linear(), guidance, self.asked.steps, method=method, order=self.asked.order
        )
        found.calibrate([self.pilots[unit]], reference, progress=lambda k, n: tell(f"learning {k}/{n}"))
        return found

    def sample(self, u: int) -> dict[str, np.ndarray]:
        """All that is drawn for a class, as METHOD.COLUMN."""
        asked, name = self.asked, self.asked.classes[u]
        reference, z = [self.reads[:, u : u + 1]], self.reads[:, u].numpy()
        z = (z - z.mean()) / z.std(ddof=1)
        top = Curve(z, z).strength_at(asked.nats)
        out = {"re-weighted.z": z, "re-weighted.strength": np.array(top)}
        for method, guidance in (
            ("plain", Calibrated()),
            ("learned", Learned(shadows=asked.shadows, law="gaussian")),
        ):
            start = time.perf_counter()
            sampler = self.sampler(u, guidance, None, reference)
            learned = time.perf_counter() - start
            if method == "plain":
                out |= self.run(sampler, "unguided", 0.0, 0, asked.samples, name)
            strength = self.tune(sampler, f"{name}, {method}")
            out |= self.run(sampler, method, strength, 0, asked.samples, name)
            tell(f"{name}, {method}: strength {strength:g} (learning {learned:.0f} s)", end="\n")
        particles = self.sampler(u, Calibrated(), Particles(asked.particles), reference)
        out |= self.run(particles, "particles", top, 0, asked.particles * asked.groups, name)
        tell(f"{name}, particles: strength {top:g}", end="\n")
        return out

    def run(
        self, sampler: Sampler, method: str, strength: float, first: int, n: int, name: str
    ) -> dict[str, np.ndarray]:
        """Rows first, first + 1, ..: z, path_kl, log_w, finite, group (n,), images (n, 3, H, W) float16; strength, seconds a row."""
        rows, size, start = (
            [Row(0, strength, first + i) for i in range(n)],
            self.asked.batch_size,
            time.perf_counter(),
        )
        size -= size % sampler.method.group_size
        parts = []
        for i in range(0, n, size):
            heard = lambda k, m, i=i: tell(f"{name}, {method}: rows from {i}, step {k}/{m}")  # noqa: E731
            parts.append(sampler.sample(rows[i : i + size], heard))
        columns = ("z", "path_kl", "log_w", "finite") + (("group",) if sampler.method.group_size > 1 else ())
        out = {k: torch.cat([getattr(p, k) for p in parts]).numpy() for k in columns}
        out["images"] = torch.cat([p.images for p in parts]).nan_to_num().half().numpy()
        out |= {"strength": np.array(strength), "seconds": np.array((time.perf_counter() - start) / n)}
        return {f"{method}.{k}": v for k, v in out.items()}

    def tune(self, sampler: Sampler, what: str) -> float:
        """The strength whose path KL is near --nats, by two small runs: path KL grows about as a power of s."""
        points = []
        for _ in range(2):
            s = power(points, self.asked.nats)
            run = self.run(sampler, "tuning", s, TUNING, self.asked.tuning, what)
            nats = run["tuning.path_kl"][run["tuning.finite"]].mean()
            points.append((np.log(s), np.log(max(nats, 1e-3))))
        return power(points, self.asked.nats)


class Judge:
    """Holds what was drawn against a network that had no part in it. unguided: the images that all classes share."""

    def __init__(self, folder: Path, classes: list[str], unguided: Tensor | None = None):
        name = f"local-dir:{folder}"
        encoder = load_encoder(name)
        self.names, self.size = encoder.class_names or [], encoder.input_size
        missing = [c for c in classes if c not in self.names]
        if missing:
            raise SystemExit(f"the judge {folder} knows no class {', '.join(missing)}; it knows {self.names}")
        self.bank = UnitBank([build_unit(f"{name},class={c}") for c in self.names])
        if unguided is not None:
            self.unguided, self.free = unguided, read(self.bank, unguided).numpy()

    def unit(self, name: str, found: dict[str, np.ndarray]) -> tuple[list[Figure], np.ndarray]:
        """A class's rows, and what is shown of each method (methods, 16, H, W, 3) uint8."""
        of = lambda method: {k.split(".")[1]: v for k, v in found.items() if k.startswith(f"{method}.")}  # noqa: E731
        k = self.names.index(name)
        mean, std = self.free[:, k].mean(), self.free[:, k].std(ddof=1)

        def judged(run: dict) -> dict:
            logits = read(self.bank, torch.from_numpy(run["images"]).float()).numpy()
            return run | {"judge": (logits[:, k] - mean) / std, "named": logits.argmax(1) == k}

        free = of("re-weighted")
        curve = Curve(free["z"], (self.free[:, k] - mean) / std)
        twins, top = judged(of("unguided")), float(free["strength"])
        runs = {method: judged(of(method)) for method in ("plain", "learned", "particles")}
        figures = [guided(curve, name, m, runs[m], twins) for m in ("plain", "learned")]
        figures += [particles(curve, name, runs["particles"]), self.reweighted(curve, name, k, top)]
        shown = {m: x["images"][:SHOWN] for m, x in (("unguided", twins), *runs.items())}
        shown["particles"] = runs["particles"]["images"][drawn(weights_of(runs["particles"]))]
        shown["re-weighted"] = self.unguided[drawn(curve.weights(top))].numpy()
        return figures, np.stack([pixels(shown[m]) for m in METHODS])

    def reweighted(self, curve: Curve, name: str, k: int, strength: float) -> Figure:
        shift, judge, kl = curve.at(np.full(len(curve.counts), strength))
        named = float(curve.weights(strength) @ (self.free.argmax(1) == k))
        return Figure(name, "re-weighted", strength, round(curve.ess(strength)), pair(shift), pair(kl), pair(kl),
                      pair(judge), None, named, 0.0)  # fmt: skip


@torch.no_grad()
def read(bank: UnitBank, images: Tensor) -> Tensor:
    """Raw activations (N, units), float64."""
    return torch.cat([bank.read_all(x)[..., 0].double() for x in images.split(256)])


def guided(curve: Curve, name: str, method: str, run: dict, twins: dict) -> Figure:
    """Against the unguided rows of the same seeds: the scene and most of the noise cancel."""
    keep = run["finite"] & twins["finite"]
    n = int(keep.sum())
    mean = lambda x: resamples(n) @ x[keep] / n  # noqa: E731
    shift, judge = mean(run["z"] - twins["z"]), mean(run["judge"] - twins["judge"])
    named = float(run["named"][keep].mean())
    return figure(curve, name, method, run, n, shift, judge, mean(run["path_kl"]), named)


def particles(curve: Curve, name: str, run: dict) -> Figure:
    """The law of an output particle: of a group drawn evenly, one particle by its weight. Errors by whole groups."""
    w, n = weights_of(run), len(run["z"])
    groups = np.unique(run["group"], return_inverse=True)[1]
    counts = resamples(groups.max() + 1)
    of = lambda x: counts @ np.bincount(groups, w * x)  # noqa: E731  counts are as many as groups
    free = curve.counts @ np.stack([curve.z, curve.judge], 1) / len(curve.z)
    shift, judge = (of(run[x]) - free[:, i] for i, x in enumerate(("z", "judge")))
    nats = of(np.where(w > 0, run["path_kl"], 0))
    return figure(curve, name, "particles", run, n, shift, judge, nats, float(w @ run["named"]))


def weights_of(run: dict) -> np.ndarray:
    """Of particles, of sum 1 over all rows and evenly shared among groups."""
    groups = np.unique(run["group"], return_inverse=True)[1]
    log_w = np.where(run["finite"], run["log_w"], -np.inf)
    top = np.full(groups.max() + 1, -np.inf)
    np.maximum.at(top, groups, log_w)
    w = np.exp(log_w - top[groups])
    return w / np.bincount(groups, w)[groups] / len(top)


def figure(
    curve: Curve, name: str, method: str, run: dict, n: int, shift, judge, nats, named: float
) -> Figure:
    """Holds a run against the re-weighted images at its own shift. shift, judge, nats (1 + B,)."""
    beside = curve.beside(shift)
    ratio, least = (None, None) if beside is None else (pair(judge / beside[0]), pair(beside[1]))
    return Figure(name, method, float(run["strength"]), n, pair(shift), pair(nats), least, pair(judge), ratio, named,
                  float(run["seconds"]))  # fmt: skip


def power(points: list[tuple[float, float]], nats: float) -> float:
    """The strength where a power law through (log s, log nats) reaches `nats`: s^2 until there are two; three digits."""
    if not points:
        return 1.0
    slope = 2.0
    if len(points) > 1 and points[0][0] != points[1][0]:
        slope = float(np.clip((points[1][1] - points[0][1]) / (points[1][0] - points[0][0]), 0.7, 3.0))
    log_s, log_nats = points[-1]
    return float(f"{np.exp(log_s + np.clip((np.log(nats) - log_nats) / slope, -2, 2)):.3g}")


def resamples(n: int) -> np.ndarray:
    """(1 + B, n): how often each row or group is drawn, all once in the first."""
    again = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return np.concatenate([np.ones((1, n)), again])


def drawn(w: np.ndarray) -> np.ndarray:
    """SHOWN rows, systematically by weight, in an order that is no ranking."""
    at = (np.arange(SHOWN) + 0.5) / SHOWN
    found = np.searchsorted(np.cumsum(w) / w.sum(), at)
    return np.random.default_rng(2).permutation(found)


def pair(values: np.ndarray) -> tuple[float, float]:
    """Estimate and standard error: half of what holds 68 % of the resamples, since a ratio's tail is heavy."""
    low, high = np.nanquantile(values[1:], [0.16, 0.84])
    return float(values[0]), float(high - low) / 2


def pixels(images: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8."""
    return (
        ((images.astype(np.float32).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    )


def caption(f: Figure) -> str:
    nats = f"{f.nats[0]:.1f} nats" if f.method == "re-weighted" else f"at most {f.nats[0]:.1f} nats"
    return f"{f.method}: {nats}, shift {f.shift[0]:.1f}, judge {f.judge[0]:.1f}"


def picture(
    rows: list[tuple[str, list[Figure], np.ndarray]], columns: int, lines: int, cell: int
) -> Image.Image:
    """A row a class, a block of columns x lines images a method, captions above."""
    font, gap, left = ImageFont.load_default(13), 14, 10
    width, height = columns * cell, lines * cell
    size = (left + len(METHODS) * (width + gap), len(rows) * (height + 58) + 8)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for j, (name, figures, shown) in enumerate(rows):
        y = 6 + j * (height + 58)
        told = {f.method: f for f in figures}
        for i, method in enumerate(METHODS):
            x, f = left + i * (width + gap), told.get(method)
            pen.text((x, y), name if i == 0 else "", "#23272b", font)
            lines_of = (
                ["unguided: the seeds of", "plain and learned"] if f is None else caption(f).split(", ", 1)
            )
            for k, text in enumerate(lines_of):
                pen.text((x, y + 16 * (k + 1)), text, "#23272b", font)
            for n, image in enumerate(shown[i][: columns * lines]):
                small = Image.fromarray(image).resize((cell, cell), Image.Resampling.LANCZOS)
                sheet.paste(small, (x + n % columns * cell, y + 52 + n // columns * cell))
    return sheet


def tell(text: str, end: str = "\r") -> None:
    if end == "\n" or sys.stderr.isatty():
        print(f"\x1b[K{text}" if sys.stderr.isatty() else text, end=end, file=sys.stderr, flush=True)


def pm(x: tuple[float, float] | None) -> str:
    return "–" if x is None else f"{x[0]:.2f} ± {x[1]:.2f}"


def report(figures: list[Figure]) -> dict:
    print(
        "\n| class | method | strength | rows (ESS) | shift | nats at most | least nats for it | judge | ratio | named | s/row |"
    )
    print("|---" * 11 + "|")
    for f in figures:
        print(
            f"| {f.name} | {f.method} | {f.strength:.3g} | {f.n} | {pm(f.shift)} | {pm(f.nats)} | {pm(f.least)} | {pm(f.judge)} "
            f"| {pm(f.ratio)} | {f.named:.0%} | {f.seconds:.2f} |"
        )
    closing = {}
    print("\n| method | mean shift | mean judge | mean ratio | named | units |\n|---|---|---|---|---|---|")
    for method in METHODS[1:]:
        mine = [f for f in figures if f.method == method]
        held = [f.ratio for f in mine if f.ratio]
        mean = (
            (float(np.mean([r[0] for r in held])), float(np.linalg.norm([r[1] for r in held])) / len(held))
            if held
            else None
        )
        closing[method] = {"ratio": mean, "units": len(held)}
        print(f"| {method} | {np.mean([f.shift[0] for f in mine]):.2f} | {np.mean([f.judge[0] for f in mine]):.2f} | {pm(mean)} "
              f"| {np.mean([f.named for f in mine]):.0%} | {len(held)} of {len(mine)} |")  # fmt: skip
    for method in ("learned", "particles"):
        ratio = closing[method]["ratio"]
        said = "NOTHING TO COMPARE" if ratio is None else "PASS" if ratio[0] >= GOAL else "FAIL"
        print(
            f"\n{said}: {method}, the judge's shift is {pm(ratio)} of the re-weighted images' at equal activation; goal: {GOAL:g}."
        )
    return closing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--judge", type=Path, required=True, help="timm folder of a classifier")
    parser.add_argument("--prior", default="bundled", help="bundled, a diffusers folder, or a hub name")
    parser.add_argument(
        "--precision",
        default=cpu_precision(),
        help="of the prior's network: bfloat16 or float32; what this CPU is faster with",
    )
    parser.add_argument("--encoder", default="bundled", help="whose class units are asked for")
    parser.add_argument("--classes", nargs="+", default=CLASSES)
    parser.add_argument("--nats", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--order", type=int, default=1, choices=ORDERS, help="of the chain")
    parser.add_argument("--pool", type=int, default=1408, help="unguided images")
    parser.add_argument(
        "--pilot", type=int, default=64, help="trajectories that slopes and Learned learn from"
    )
    parser.add_argument("--shadows", type=int, default=32, help="of these, run again by Learned")
    parser.add_argument("--samples", type=int, default=16, help="guided rows")
    parser.add_argument("--tuning", type=int, default=6, help="rows of each of two runs that find a strength")
    parser.add_argument("--particles", type=int, default=16, help="in a group")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/eye-and-judge"))
    parser.add_argument("--quick", action="store_true", help="does it run: one class, a few rows and steps")
    asked = parser.parse_args()
    if asked.quick:
        asked.classes, asked.steps, asked.pool, asked.pilot, asked.shadows = asked.classes[:1], 6, 64, 32, 32
        asked.samples, asked.tuning, asked.particles, asked.groups = 16, 2, 8, 2
    if not 32 <= asked.shadows <= asked.pilot:
        parser.error("expected 32 <= --shadows <= --pilot")
    if asked.samples < SHOWN or asked.particles > asked.batch_size or asked.groups < 2:
        parser.error(f"expected --samples >= {SHOWN}, --particles <= --batch-size, --groups >= 2")
    return asked


def main() -> None:
    asked, start = arguments(), time.perf_counter()
    Judge(asked.judge, asked.classes)  # its faults before hours of sampling
    asked.out.mkdir(parents=True, exist_ok=True)
    settings = {
        k: str(v)
        for k, v in vars(asked).items()
        if k not in ("classes", "judge", "out") and (k, v) != ("order", 1)
    }
    kept = asked.out / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise SystemExit(f"{asked.out} holds a run with other settings ({kept}): give another --out")
    kept.write_text(json.dumps(settings, indent=1) + "\n")
    bench = None
    for u, name in enumerate(asked.classes):
        path = asked.out / f"{name}.npz"
        if not path.exists():
            bench = bench or Bench(asked)
            np.savez_compressed(path, **bench.sample(u))
            tell(f"{path} [{time.perf_counter() - start:.0f} s]", end="\n")
    images = safetensors.torch.load_file(asked.out / "unguided.safetensors")["images"].float()
    judge, done = Judge(asked.judge, asked.classes, images), []
    for name in asked.classes:
        done.append((name, *judge.unit(name, dict(np.load(asked.out / f"{name}.npz")))))
        picture(done[-1:], 4, 4, 64).save(asked.out / f"{name}.png")
    picture(done, 4, 2, 48).quantize(256).save(asked.out / "overview.png", optimize=True)
    print(
        f"{asked.encoder} under {asked.prior}, {asked.precision}; {asked.steps} steps of order {asked.order}, eta 1, uniform in log-SNR; {len(images)} unguided "
        f"images, {asked.samples} guided rows, {asked.groups} groups of {asked.particles} particles; the judge reads {judge.size[0]} pixels"
        + (" (--quick: the figures mean nothing)" if asked.quick else "")
    )
    rows = [f for _, figures, _ in done for f in figures]
    body = {"settings": settings, "rows": [asdict(f) for f in rows], "mean": report(rows)}
    (asked.out / "figures.json").write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
