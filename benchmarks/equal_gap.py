"""Samples a second at equal gap: how much faster a guidance is than a published one where both are as far from the optimum.

    python benchmarks/equal_gap.py [--out figures.json] [--units ADDRESS ...] [--noise-aware bundled] [--theirs DPS] [--ours NAME] [--steps 6 10 ...] [--quick]

At one and the same shift of the mean activation (--shift, in prior standard deviations) the gap of a guidance, path KL + s E + log Z at the
strength s that this shift is the optimum of, is path KL - kl_lower: where the least KL is the same, equal gaps are equal KL
efficiencies. Both guidances are run at several numbers of steps, each with its strength tuned to the shift on seeds of its own, as guidance.py
does it, whose rows these are. p is the law of the chain with these steps: chains of different lengths have each their own p, standard deviations
and least KL, and what is compared is the efficiency. The fastest chain of ours that is at least as efficient as one of theirs, unit mean
against unit mean, says how many samples a second it makes where theirs makes one; nothing is interpolated. Their own shorter chains are
rows of the table, and the last column is against each of them; the verdict is against the most efficient.

+- is one standard error: bootstrap over seeds and pool, the mean over units; chains of different lengths share their seeds. A kl_lower with ">=" in guidance.py's sense (at the
edge of what the pool can tell) is marked >=, a shift that misses by more than a quarter *. Every row is kept in --out as it ends, with its seconds, so give it a
machine that does nothing else; the same call goes on where it was stopped. The table goes to stdout, progress to stderr.
"""

import argparse
import json
import math
import time
from copy import copy

import numpy as np
import torch
from guidance import AWARE, GUIDANCES, Bench, Figure, common, fingerprints, pm, settings_of, tell, twin_of

from tiltlens.priors import load_prior
from tiltlens.units import build_unit

THEIRS, OURS, GOAL = "DPS", "Calibrated, memory, noise-aware", 2.0
STEPS = [6, 8, 12, 16, 24, 40]
BEGIN = {"DPS": 0.3}  # a strength to begin the tuning with, for a shift of one; 1 for what is calibrated
MISSED = 0.25  # of the shift: such a row is marked

Key = tuple[int, str, str]  # steps, guidance, unit


def measure(asked: argparse.Namespace, figures: dict[Key, Figure]) -> None:
    """Every row that is not there yet, kept as it ends."""
    names = [build_unit(u).name for u in asked.units]
    for steps in asked.steps:
        mine = copy(asked)
        mine.steps = steps
        if all((steps, g, u) in figures for g in asked.guidance for u in names):
            continue
        bench = Bench(mine)
        for guidance in asked.guidance:
            sampler = bench.calibrated(GUIDANCES[guidance](), guidance.endswith(AWARE))
            for unit, name in enumerate(names):
                if (steps, guidance, name) in figures:
                    continue
                what = f"{steps} steps, {name}, {guidance}"
                begin = BEGIN.get(guidance, 1.0) * asked.shift
                strength = bench.tune(sampler, unit, asked.shift, [], what, begin)
                f = figures[steps, guidance, name] = bench.row(sampler, unit, guidance, strength, asked.shift)
                keep(asked, figures)
                tell(
                    f"{what}: shift {pm(f.shift)}, efficiency {pm(f.efficiency)}, {f.seconds:.2f} s", end="\n"
                )


def whole(figures: dict[Key, Figure], steps: int, guidance: str, names: list[str]) -> tuple[tuple, float]:
    """Efficiency, the mean over units with its resamples, and seconds a sample."""
    rows = [figures[steps, guidance, u] for u in names]
    efficiency = tuple(np.mean([r.efficiency[k] for r in rows], 0) for k in (0, 1))
    return efficiency, float(np.mean([r.seconds for r in rows]))


def fastest(found: dict[int, tuple[tuple, float]], level: float) -> tuple[int, float] | None:
    """Of the numbers of steps that are as efficient as this the one of least seconds; None where none is."""
    enough = [(seconds, steps) for steps, (e, seconds) in found.items() if e[0] >= level]  # a NaN never is
    return (min(enough)[1], min(enough)[0]) if enough else None


def show(asked: argparse.Namespace, figures: dict[Key, Figure]) -> bool:
    """The table and the verdict: at the gap of their most efficient chain."""
    names = [build_unit(u).name for u in asked.units]
    found = {g: {n: whole(figures, n, g, names) for n in asked.steps} for g in asked.guidance}
    print(
        f"\n| guidance | steps | {' | '.join(names)} | mean efficiency | shifts | s/sample | ours as efficient: steps, times as fast |"
    )
    print("|---" * (len(names) + 6) + "|")
    for g in asked.guidance:
        for n in asked.steps:
            rows = [figures[n, g, u] for u in names]
            cells = " | ".join((">= " if r.edge else "") + pm(r.efficiency) for r in rows)
            e, seconds = found[g][n]
            ours = fastest(found[asked.ours], e[0]) if g == asked.theirs else None
            said = "" if g == asked.ours else f"{ours[0]}, {seconds / ours[1]:.1f}" if ours else "none"
            missed = [abs(r.shift[0] - asked.shift) > MISSED * asked.shift for r in rows]
            shifts = ", ".join(f"{r.shift[0]:.2f}{'*' * m}" for r, m in zip(rows, missed))
            print(f"| {g} | {n} | {cells} | {pm(e)} | {shifts} | {seconds:.2f} | {said} |")
    theirs = found[asked.theirs]
    best = max((e[0] for e, _ in theirs.values() if e[0] == e[0]), default=None)
    if best is None:
        print(f"\nFAIL: {asked.theirs} has no efficiency at any of these numbers of steps.")
        return False
    steps, seconds = fastest(theirs, best)
    ours = fastest(found[asked.ours], best)
    if ours is None:
        print(f"\nFAIL: {asked.ours} is nowhere as efficient as {asked.theirs} with {steps} steps.")
        return False
    ratio = seconds / ours[1]
    again = theirs[steps][0][1], found[asked.ours][ours[0]][0][1]
    ahead = float(np.mean(again[1] >= again[0]))
    print(
        f"\n{'PASS' if ratio >= GOAL else 'FAIL'}: at the gap of {asked.theirs} with {steps} steps, its least, {asked.ours} makes {ratio:.1f} times as many "
        f"samples a second ({ours[0]} steps; as efficient in {100 * ahead:.0f} % of the resamples); goal: at least {GOAL:g}."
    )
    return ratio >= GOAL


def arguments() -> argparse.Namespace:
    parser = common(__doc__)
    parser.set_defaults(noise_aware="bundled", pilot=128, tuning=32)
    parser.add_argument("--theirs", default=THEIRS, choices=list(GUIDANCES), metavar="NAME")
    parser.add_argument("--ours", default=OURS, choices=list(GUIDANCES), metavar="NAME")
    parser.add_argument("--shift", type=float, default=1.0, help="in prior standard deviations")
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    asked = parser.parse_args()
    if asked.quick:
        asked.samples, asked.steps, asked.pool, asked.pilot = 4, [5], 32, 32
        asked.tuning, asked.batch_size, asked.units = 2, 8, asked.units[:1]
    if not 8 <= asked.pilot <= asked.pool:
        parser.error("expected 8 <= --pilot <= --pool")
    if not 0 < asked.shift < math.inf:
        parser.error(f"expected a --shift above 0, found {asked.shift}")
    longest = len(load_prior(asked.prior).denoiser.schedule)
    if not all(2 <= n <= longest for n in asked.steps):
        parser.error(f"expected --steps of 2 to {longest}, found {asked.steps}")
    if asked.theirs == asked.ours:
        parser.error("expected two different guidances")
    asked.guidance = [asked.theirs, asked.ours]
    return asked


def settings(asked: argparse.Namespace) -> dict:
    """What a row depends on."""
    free = ("steps", "theirs", "ours")
    return {
        **{k: v for k, v in settings_of(asked).items() if k not in free},
        "shift": asked.shift,
        "twin": twin_of(asked),
        "batch_size": asked.batch_size,  # of seconds
        "threads": torch.get_num_threads(),
    }


def kept(asked: argparse.Namespace) -> dict[Key, Figure]:
    """What an earlier call left in --out."""
    if asked.out is None or not asked.out.exists():
        return {}
    body = json.loads(asked.out.read_text())
    if body["settings"] != settings(asked):
        raise SystemExit(f"{asked.out} holds figures of other settings: give another --out")
    for name, sha256 in fingerprints(asked).items():
        if body["unit_sha256"].get(name, sha256) != sha256:
            raise SystemExit(f"{asked.out} holds figures of {name} with other weights: give another --out")
    return {tuple(r["key"]): Figure.of(r["row"]) for r in body["kept"]}


def keep(asked: argparse.Namespace, figures: dict[Key, Figure]) -> None:
    if asked.out is None:
        return
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"key": list(k), "row": f.whole()} for k, f in figures.items()]
    before = json.loads(asked.out.read_text())["unit_sha256"] if asked.out.exists() else {}
    body = {"settings": settings(asked), "unit_sha256": before | fingerprints(asked), "kept": rows}
    fresh = asked.out.with_name(f"{asked.out.name}.part")
    fresh.write_text(json.dumps(body) + "\n")
    fresh.replace(asked.out)


def main() -> None:
    asked, start = arguments(), time.perf_counter()
    figures = kept(asked)
    measure(asked, figures)
    print(
        f"prior {asked.prior}, {asked.precision}; eta 1, uniform in log-SNR; {asked.samples} samples a row near a shift of {asked.shift:g}; pool of {asked.pool}, "
        f"slopes from {asked.pilot}; {(time.perf_counter() - start) / 60:.1f} minutes"
        + (" (--quick: the figures mean nothing)" if asked.quick else "")
    )
    met = show(asked, figures)
    if not (met or asked.quick):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
