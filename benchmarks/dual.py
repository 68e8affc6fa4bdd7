"""The dual on real units: is "q0.999" met within one standard error, with nothing tuned, at the cost of three sweeps.

    python benchmarks/dual.py [--out DIR] [--constraint q0.999] [--units ADDRESS ...] [--n 32] [--particles 8] [--quick]

Ten units of the bundled encoder, five classes and five channels, solved in one run as `sample.py --constraint` does, by
guided chains, or with --particles by groups of so many: natural samples, a first sweep of three strengths, then strengths near the solution, then more rows there where
they would sharpen the value or let the exact law be certified. A sweep is --n natural rows and --n at each of three
strengths. The pilot of 1,000 is what a quantile of 0.999 takes.

target: the natural quantile as a mean activation. reached: the value and its standard error, of the ideal law q_s or of
the law that was sampled, as `law` says. off: their distance in standard errors. KL: of q_s at the solution where it is
certified, else between its bounds; least: that of any law with that mean. denoiser calls, seconds: what all rows cost
over what the sweep's rows cost; a call of a guided row, which has a gradient, counts as one, like any other. The pilot,
which a sweep needs as well, is in neither.
--out is a run folder: a run that was stopped goes on, and its report.html can be looked at.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import numpy as np

from tiltlens import tilt
from tiltlens.estimates.dual import FIRST
from tiltlens.guidance import Calibrated
from tiltlens.modules.accelerator import cpu_precision
from tiltlens.modules.results import columns
from tiltlens.report.digits import number, plus_minus
from tiltlens.sampling import Independent, Particles
from tiltlens.sampling.chain import ORDERS

UNITS = [
    "bundled,class=horse",
    "bundled,layer=blocks.3,tokens=patch,reduction=mean,channel=17",
    "bundled,class=ship",
    "bundled,layer=blocks.2,tokens=patch,reduction=mean,channel=5",
    "bundled,class=automobile",
    "bundled,layer=blocks.4,tokens=cls,channel=40",
    "bundled,class=frog",
    "bundled,layer=blocks.4,tokens=patch,reduction=mean,channel=90",
    "bundled,class=airplane",
    "bundled,layer=blocks.1,tokens=patch,reduction=max,channel=64",
]
MOST = 3.0  # sweeps
COLUMNS = (
    "unit",
    "status",
    "law",
    "target",
    "reached",
    "off",
    "KL, nats",
    "least",
    "denoiser calls",
    "seconds",
)


def solve(asked: argparse.Namespace) -> list[dict]:
    """Each unit's certificate and costs."""
    result = tilt(
        "bundled", asked.units, n=asked.n, constraint=asked.constraint, guidance=Calibrated(),
        sampler=Particles(asked.particles) if asked.particles else Independent(), steps=asked.steps, pilot=asked.pilot, batch_size=asked.n,
        precision=asked.precision, out=asked.out, order=asked.order,
    )  # fmt: skip
    rows, told = columns(result.folder.samples()), result.folder.read_manifest()["constraint"]
    result.report()
    return [
        found | {"unit": name} | costs(name, rows, told, asked.n) for name, found in result.constraint.items()
    ]


def costs(unit: str, rows: dict, told: dict, n: int) -> dict:
    mine = rows["unit"] == unit
    seconds, guided = rows["seconds"][mine], rows["strength"][mine] > 0
    # a strength of the sweep costs what any guided rows of the run do: the mean, not the luck of the first batches
    sweep = seconds[~guided].sum() + len(FIRST) * n * seconds[guided].mean() if guided.any() else 0.0
    return {
        "calls": sum(told["blocks"][unit]) / (1 + len(FIRST)),
        "seconds": float(seconds.sum() / sweep) if guided.any() else 0.0,
        "strengths": len(told["strengths"][unit]),
        "rows": int(mine.sum()),
    }


def met(found: dict) -> bool:
    """Within one standard error, or natural samples meet it already; at most at the cost of three sweeps."""
    return found["status"] in ("reached", "natural") and off(found) <= 1 and found["calls"] <= MOST


def off(found: dict) -> float:
    if found["status"] == "natural" or found["value"] is None:
        return 0.0 if found["status"] == "natural" else np.inf
    return abs(found["value"] - found["target"]) / max(found["value_se"], 1e-12)


def line(found: dict) -> str:
    kl = plus_minus(found["kl"], found["kl_se"])
    if found["kl"] is None:
        kl = f"{number(found['kl_least'])} to {number(found['kl_most'])}"
    cells = (
        found["unit"], found["status"], found["law"], number(found["target"]), plus_minus(found["value"], found["value_se"]),
        f"{off(found):.2f}", kl, number(found["kl_least"]), f"{found['calls']:.2f}", f"{found['seconds']:.2f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="run folders, and figures.json")
    parser.add_argument("--constraint", default="q0.999")
    parser.add_argument("--units", nargs="+", default=UNITS, help="addresses")
    parser.add_argument("--n", type=int, default=32, help="rows a strength, in whole groups of particles")
    parser.add_argument("--particles", type=int, default=0, help="of a group; 0 for independent chains")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--pilot", type=int, default=1000)
    parser.add_argument("--order", type=int, default=1, choices=ORDERS, help="of the chain")
    parser.add_argument("--precision", default=cpu_precision(), choices=("float32", "bfloat16"))
    parser.add_argument("--quick", action="store_true", help="does it run: one unit, few steps")
    asked = parser.parse_args()
    if asked.quick:
        asked.units, asked.n, asked.particles, asked.steps, asked.pilot = asked.units[:1], 16, 4, 8, 16
    asked.out = asked.out or Path(tempfile.mkdtemp(prefix="dual-"))
    start = time.perf_counter()
    figures = solve(asked)
    print(*(f["text"] for f in figures), sep="\n", file=sys.stderr)
    print(
        f"{asked.constraint}, {asked.n} rows a strength{f' in groups of {asked.particles}' if asked.particles else ''}, "
        f"{asked.steps} steps of order {asked.order}, pilot {asked.pilot}; "
        f"{(time.perf_counter() - start) / 60:.1f} minutes"
        + (" (--quick: the figures mean nothing)" if asked.quick else "")
        + "\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    print(*(line(f) for f in figures), sep="\n")
    good = sum(map(met, figures))
    exact = sum(f["law"] == "q_s" for f in figures)
    whole = good == len(figures)
    print(
        f"\n{'PASS' if whole else 'FAIL'}: {good} of {len(figures)} units within one standard error at the cost of at most "
        f"{MOST:g} sweeps; {exact} certified for q_s itself."
    )
    if not (whole or asked.quick):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
