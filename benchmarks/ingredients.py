"""What each ingredient of guidance brings: KL efficiency in linear response, all rows from the same trajectories.

    python benchmarks/ingredients.py [--out figures.json] [--units ADDRESS ...] [--pilot 256] [--shadows 128] [--noise-aware DIR] [--quick]

A pilot of unguided trajectories is run once, and some of them again, as shadows: the shifts that every guidance would make are
held against the noise of each step without being applied (src/tiltlens/guidance/learning.py). No guided sample is drawn. memory: the average of the
gradients alone; blend: half of it, and half of the step's own gradient, as Calibrated has it by default. efficiency: KL
efficiency at a small shift, 1 for the tilt itself; gap: what is left of the optimum's own s^2 Var a / 2, at the
strength as it is, 1 for no guidance at all and more for one that over-tilts. The learned rows are judged on trajectories
that they were not fitted to. +- is one standard error, over trajectories; rows share them, so that their differences
are known better than that. passes: forwards and vector-Jacobian products of the denoiser and of the encoder, a sample and step, mean
over the chain (an unguided step is one). With --noise-aware all but the redraws once more, the clean estimates read by
the twin in this folder, from the same noise. Shifts are Tweedie's: what finite steps and the natural law save shows at finite
shifts alone (guidance.py). The table goes to stdout, progress to stderr.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tiltlens.energies import Linear
from tiltlens.guidance import DPS, Calibrated, Learned
from tiltlens.guidance.learning import Found, Shadows, judge, settle
from tiltlens.modules.accelerator import cpu_precision
from tiltlens.priors import load_prior
from tiltlens.sampling.pilot import arguments
from tiltlens.sampling.sampler import Sampler
from tiltlens.sampling.shadow import cast, heads_of
from tiltlens.units import UnitBank, build_unit
from tiltlens.units.twins import adopt_twins

UNITS = [
    "bundled,class=horse",
    "bundled,class=ship",
    "bundled,layer=blocks.3,tokens=patch,reduction=mean,channel=17",
    "bundled,layer=blocks.2,tokens=patch,reduction=mean,channel=5",
    "bundled,layer=blocks.4,tokens=cls,channel=40",
]
ROWS = (
    "DPS",
    "Calibrated, no memory",
    "+ memory",
    "+ redraws",
    "+ blend",
    "+ learned multipliers",
    "+ learned twist",
)
AWARE = "noise-aware: "
AGAIN = [r for r in ROWS if r not in ("DPS", "+ redraws")]  # with a twin


@dataclass
class Figure:
    """One row: see the head of this file."""

    unit: str
    name: str
    efficiency: float
    efficiency_se: float
    gap: float
    gap_se: float
    passes: float
    note: str = ""


class Bench:
    """One prior, one chain, one pilot. twin: a folder; clean estimates are read by it, and there are no redraws."""

    def __init__(self, asked: argparse.Namespace, twin: str | None = None):
        self.asked, self.redraws = asked, 0 if twin else asked.redraws
        self.guidance = Learned(smoothing=1, redraws=self.redraws, shadows=asked.shadows)
        prior, bank = (
            load_prior(asked.prior, precision=asked.precision),
            UnitBank([build_unit(u) for u in asked.units]),
        )
        bank.validate(prior.image_size)
        if twin:
            adopt_twins(bank, [twin], prior.fingerprint)
        self.sampler = Sampler(prior, bank, Linear(), self.guidance, asked.steps, device=asked.device)
        start = time.perf_counter()
        self.pilots = self.sampler.run_pilot(
            asked.pilot, asked.batch_size, lambda k, n: tell(f"pilot {k}/{n}")
        )
        tell(f"pilot of {asked.pilot}: {time.perf_counter() - start:.0f} s", end="\n")
        self.sampler.guidance = DPS()  # nothing is to be learned yet
        self.sampler.calibrate(self.pilots)
        self.tables, constraint = self.sampler.tables, self.sampler.constraint
        self.guidance.prepare(self.tables, prior, constraint)
        self.read = [
            arguments(p, u, n, True) for p, u, n in zip(self.pilots, bank.units, constraint.naturals)
        ]
        start = time.perf_counter()
        self.heads, _ = heads_of(self.guidance, self.sampler.chain, self.tables, self.pilots, self.read)
        tell(f"heads of all units: {time.perf_counter() - start:.0f} s", end="\n")

    def rows(self, unit: int) -> list[Figure]:
        """One unit's."""
        sampler, done, start = self.sampler, [0], time.perf_counter()
        name = sampler.bank.units[unit].name

        def tick() -> None:
            done[0] += 1
            tell(f"{name}, shadows: step {done[0]}")

        seen = cast(
            self.guidance, sampler.chain, sampler.constraint, self.tables, unit, self.heads,
            self.asked.shadows, sampler.device, sampler.dtype, tick, plain=True,
        )  # fmt: skip
        tell(f"{name}: {time.perf_counter() - start:.0f} s", end="\n")
        a = self.read[unit][1]
        return self._figures(name, unit, seen, float(a[torch.isfinite(a)].var()))

    def _figures(self, name: str, unit: int, seen: Shadows, variance: float) -> list[Figure]:
        steps, k = len(seen.d), self.redraws
        slope, intercept = (x[unit, :steps].double() for x in (self.tables.slope, self.tables.intercept))
        residual = seen.a - intercept[:, None] - slope[:, None] * seen.u
        one, read = torch.ones(steps).double(), slope != 0

        def told(m: torch.Tensor, d: torch.Tensor, square: torch.Tensor) -> Found:
            gain = (residual * m[:, None] * d).sum(0)
            return judge(gain, (m.square()[:, None] * square).sum(0), variance)

        own = self.guidance.candidates.index((1, self.guidance.memory)) if k else 0
        columns = {c: (seen.d[..., c], seen.gram[..., c, c]) for c in {0, own}}
        plain = seen.plain[..., 0], seen.plain[..., 1]
        both, now = [0, self.guidance.candidates.index((0, 0.0))], 1 - (share := Calibrated().blend)
        mixed = torch.zeros(seen.d.shape[-1], dtype=torch.float64).index_put(
            (torch.tensor(both),), torch.tensor([share, now]).double()
        )
        blended = seen.d @ mixed, torch.einsum("tnce,c,e->tn", seen.gram, mixed, mixed)
        headed = torch.zeros(steps, dtype=torch.bool) if self.heads is None else self.heads.gain[unit] > 0
        learned = settle(seen, slope, intercept, self.sampler.chain.log_snr, headed, variance)
        guided, late = float(read.double().mean()), float((read | headed).double().mean())
        redraw = 3 * k * guided  # a forward of the denoiser, both passes of the encoder
        multipliers = learned.found["multipliers"]
        kappa = ", ".join(f"{x:.2f}" for x in learned.kappa.tolist())
        taken = f"taken: {learned.kind}; kappa {kappa}"
        found = [
            (told(one, *plain), 4.0, ""),
            (told(slope, *plain), 1 + 3 * guided, ""),
            (told(slope, *columns[own]), 1 + 3 * guided, ""),
            (told(slope, *columns[0]), 1 + 3 * guided + redraw, f"{k} redraws"),
            (told(slope, *blended), 1 + 3 * guided + redraw, ""),
            (multipliers, 1 + 3 * guided + redraw, taken),
            (learned.found.get("head", multipliers), 1 + 2 * guided + late + redraw, f"head at {int(headed.sum())} steps"),
        ]  # fmt: skip
        return [Figure(name, row, *f, passes, note) for row, (f, passes, note) in zip(ROWS, found)]


def tell(text: str, end: str = "\r") -> None:
    if end == "\n" or sys.stderr.isatty():
        print(f"\x1b[K{text}" if sys.stderr.isatty() else text, end=end, file=sys.stderr, flush=True)


def show(figures: list[Figure]) -> None:
    print("\n| unit | ingredients | efficiency | gap | passes a step | |\n|---|---|---|---|---|---|")
    for f in figures:
        print(
            f"| {f.unit} | {f.name} | {f.efficiency:.2f} ± {f.efficiency_se:.2f} | {f.gap:.2f} ± {f.gap_se:.2f} "
            f"| {f.passes:.1f} | {f.note} |"
        )
    units = list(dict.fromkeys(f.unit for f in figures))
    if len(units) > 1:
        print(
            f"\nMean over {len(units)} units\n\n| ingredients | efficiency | gap | passes a step |\n|---|---|---|---|"
        )
        for name in dict.fromkeys(f.name for f in figures):
            mine = [f for f in figures if f.name == name]
            pair = lambda x, se, mine=mine: (  # noqa: E731
                np.mean([getattr(f, x) for f in mine]),
                np.linalg.norm([getattr(f, se) for f in mine]) / len(mine),
            )
            (e, e_se), (g, g_se) = pair("efficiency", "efficiency_se"), pair("gap", "gap_se")
            passes = np.mean([f.passes for f in mine])
            print(f"| {name} | {e:.2f} ± {e_se:.2f} | {g:.2f} ± {g_se:.2f} | {passes:.1f} |")


def arguments_of_command() -> argparse.Namespace:
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
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pilot", type=int, default=256, help="unguided trajectories")
    parser.add_argument("--shadows", type=int, default=128, help="of these, run again")
    parser.add_argument("--redraws", type=int, default=4)
    parser.add_argument("--noise-aware", help="the folder of a twin that reads clean estimates")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="does it run: one unit, a few steps")
    asked = parser.parse_args()
    if asked.quick:
        asked.steps, asked.pilot, asked.shadows, asked.redraws = 6, 32, 32, 1
        asked.units = asked.units[:1]
    if not 32 <= asked.shadows <= asked.pilot:
        parser.error("expected 32 <= --shadows <= --pilot")
    return asked


def main() -> None:
    asked, start = arguments_of_command(), time.perf_counter()
    bench = Bench(asked)
    figures = [f for unit in range(len(asked.units)) for f in bench.rows(unit)]
    if asked.noise_aware:
        again = Bench(asked, asked.noise_aware)
        for unit in range(len(asked.units)):
            figures += [replace(f, name=AWARE + f.name) for f in again.rows(unit) if f.name in AGAIN]
        names = [u.name for u in bench.sampler.bank.units]
        figures.sort(key=lambda f: names.index(f.unit))
    seconds, prior = time.perf_counter() - start, bench.sampler.prior
    print(
        f"prior {prior.name} ({prior.fingerprint[:12]}), {asked.precision}; {asked.steps} steps, eta 1, uniform in log-SNR; "
        f"pilot of {asked.pilot}, {asked.shadows} shadows; {seconds / 60:.1f} minutes"
        + (" (--quick: the figures mean nothing)" if asked.quick else "")
    )
    show(figures)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(asked).items()}
        body = {"settings": settings, "prior_sha256": prior.fingerprint, "seconds": seconds}
        asked.out.write_text(json.dumps({**body, "rows": [asdict(f) for f in figures]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
