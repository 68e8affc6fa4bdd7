"""What guidance costs: against the bare network calls, over a sweep, and in memory.

    python benchmarks/guided_step.py [--quick]

(a) One guided step / the network calls that it cannot do without, on the same batch: a forward of the prior's network
    and of the encoder (on as many views), and the vector-Jacobian product of each.
(b) A sweep of K = 4 strengths through batches that hold all four / four runs of one strength: same rows, same batch
    size. Without pilots (the samples alone), and as sample.py runs them: a pilot for each single run, one for the sweep.
(c) A group of 64 particles, resampled at every step / 64 independent rows, guided alike.
(d) Peak memory of a process that samples with 200 steps / with 20 steps.

A and B take turns and the median of their ratios counts, so that whatever else the machine does meets both.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tiltlens.energies import Linear
from tiltlens.guidance import DPS, Calibrated, Guidance
from tiltlens.guidance.guidance import PilotTables
from tiltlens.priors import load_prior
from tiltlens.sampling import Independent, Particles
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.plan import Row, plan
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import UnitBank, build_unit

UNIT = "bundled,class=horse"
STRENGTHS = [0.5, 1.0, 2.0, 4.0]
MEMORY_ROWS = 4
PARTICLES = 64


def build(prior, guidance: Guidance, steps: int) -> Sampler:
    """A sampler in which every step is guided: all slopes 1, whatever a pilot would say of this prior."""
    sampler = Sampler(prior, UnitBank([build_unit(UNIT)]), Linear(), guidance, steps)
    sampler.calibrate(sampler.run_pilot(8, 8))
    one = torch.ones_like(sampler.tables.slope)
    guidance.prepare(PilotTables(one, 0 * one, one, sampler.chain.log_snr), prior, sampler.constraint)
    return sampler


def take_turns(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median seconds of a and of b, and the median of their ratios; each pair a, b or b, a in turn."""
    a(), b()
    pairs = []
    for k in range(repeats):
        seconds = {}
        for call in (a, b) if k % 2 else (b, a):
            start = time.perf_counter()
            call()
            seconds[call] = time.perf_counter() - start
        pairs.append((seconds[a], seconds[b]))
    return *(statistics.median(x) for x in zip(*pairs)), statistics.median(x / y for x, y in pairs)


def step_cost(prior, guidance: Guidance, batch: int, repeats: int) -> tuple[float, float, float]:
    """Seconds of a guided step, of its bare calls, and their ratio."""
    sampler = build(prior, guidance, 10)
    chain, number = sampler.chain, 6
    rows = sampler.constraint.rows(torch.zeros(batch, dtype=torch.long), torch.ones(batch))
    noise = Noise(range(batch), chain.denoiser.shape)
    state = chain.start(noise, guidance)
    network, views = prior.denoiser, getattr(guidance, "smoothing", 1)
    time_t = torch.full((batch,), float(network.schedule.time[chain.indices[number]]))
    encoder, column = sampler.bank.encoders[0], torch.tensor(7)
    x_t, images = state.x.clone(), state.x.repeat(views, 1, 1, 1)

    def bare() -> Tensor:
        with torch.autocast("cpu", network.autocast or torch.bfloat16, enabled=network.autocast is not None):
            x = x_t.detach().requires_grad_()
            f = network.network(x, time_t)
        clean = images.detach().requires_grad_()
        a = encoder.model(clean)[:, column].sum()
        (h,) = torch.autograd.grad(a, clean)
        return torch.autograd.grad(f, x, h[:batch].to(f.dtype))[0]

    return take_turns(lambda: chain.step(state, number, noise, guidance, rows), bare, repeats)


def sweep_cost(prior, batch: int, steps: int, repeats: int) -> dict[str, tuple[float, float, float]]:
    """Seconds of the sweep, of the single runs together, and their ratio; without and with pilots."""
    sampler = build(prior, Calibrated(), steps)
    rows = sorted(
        plan(1, STRENGTHS, batch), key=lambda r: (r.seed, r.strength)
    )  # a batch holds every strength

    mixed = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    single = [[r for r in rows if r.strength == s] for s in STRENGTHS]
    # batch against batch, so that a pair is short against the moods of the machine
    pairs = [
        take_turns(lambda m=m: sampler.sample(m), lambda s=s: sampler.sample(s), repeats)
        for m, s in zip(mixed, single)
    ]
    sweep, alone = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    out = {"without pilots": (sweep, alone, statistics.median(p[2] for p in pairs))}
    start = time.perf_counter()
    sampler.run_pilot(batch, batch)
    pilot = time.perf_counter() - start
    with_pilots = (sweep + pilot, alone + len(STRENGTHS) * pilot)
    out[f"with pilots of {batch}"] = (*with_pilots, with_pilots[0] / with_pilots[1])
    return out


def particles_cost(prior, steps: int, repeats: int) -> tuple[float, float, float]:
    """Seconds of a group, of as many independent rows, and their ratio. Threshold 1 resamples whenever weights differ:
    the most that particles can cost."""
    sampler = build(prior, Calibrated(), steps)
    rows = [Row(0, 1.0, i) for i in range(PARTICLES)]
    group, alone = Particles(PARTICLES, 1.0), Independent()
    return take_turns(
        lambda: group.run(sampler.parts(), rows), lambda: alone.run(sampler.parts(), rows), repeats
    )


def memory_child(steps: int, precision: str) -> None:
    """Prints the peak of this process in MiB, and how much of it came after the networks were loaded and warm."""
    prior = load_prior("bundled", precision=precision)
    sampler = build(prior, Calibrated(), steps)
    rows = [Row(0, 1.0, i) for i in range(MEMORY_ROWS)]
    sampler.chain.step(
        sampler.chain.start(Noise(range(MEMORY_ROWS), prior.denoiser.shape), sampler.guidance), 0,
        Noise(range(MEMORY_ROWS), prior.denoiser.shape), sampler.guidance,
        sampler.constraint.rows(torch.zeros(MEMORY_ROWS, dtype=torch.long), torch.ones(MEMORY_ROWS)),
    )  # fmt: skip
    warm = peak()
    sampler.sample(rows)
    print(peak(), peak() - warm)


def peak() -> float:
    """MiB; ru_maxrss is in KiB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(steps: int, precision: str) -> tuple[float, float]:
    command = [sys.executable, __file__, "--memory-child", str(steps), "--precision", precision]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    total, after = done.stdout.split()[-2:]
    return float(total), float(after)


def say(what: str, ratio: float, goal: float | None, detail: str) -> None:
    verdict = "" if goal is None else f"<= {goal:g} | {'PASS' if ratio <= goal else 'FAIL'}"
    print(f"| {what} | {ratio:.3f} | {verdict or '- | -'} | {detail} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", default="float32", help="of the prior's network: float32 or bfloat16")
    parser.add_argument("--batch", type=int, default=16, help="rows of a guided step")
    parser.add_argument("--repeats", type=int, default=31, help="pairs of (a); (b) takes a fifth of it")
    parser.add_argument("--quick", action="store_true", help="does it run: few repeats, few steps")
    parser.add_argument("--memory-child", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory_child:
        return memory_child(asked.memory_child, asked.precision)
    repeats, few = (5, 2) if asked.quick else (asked.repeats, max(asked.repeats // 5, 3))
    prior = load_prior("bundled", precision=asked.precision)
    print(f"bundled prior ({asked.precision}) and encoder, {torch.get_num_threads()} threads\n")
    print("| what | ratio | goal | verdict | detail |\n|---|---|---|---|---|")
    for name, guidance in (
        ("DPS", DPS()),
        ("Calibrated, 1 view", Calibrated(smoothing=1)),
        ("Calibrated", Calibrated()),
    ):
        a, b, ratio = step_cost(prior, guidance, asked.batch, repeats)
        say(
            f"guided step / bare network calls: {name}",
            ratio,
            1.05,
            f"{a * 1e3:.0f} ms / {b * 1e3:.0f} ms, {asked.batch} rows",
        )
    for name, (a, b, ratio) in sweep_cost(prior, 8, 5 if asked.quick else 10, few).items():
        say(
            f"sweep of {len(STRENGTHS)} strengths / as many single runs, {name}",
            ratio,
            1.02,
            f"{a:.1f} s / {b:.1f} s, 8 rows each",
        )
    a, b, ratio = particles_cost(prior, 3 if asked.quick else 10, few)
    say(
        f"{PARTICLES} particles / {PARTICLES} independent guided samples",
        ratio,
        1.05,
        f"{a:.1f} s / {b:.1f} s, {3 if asked.quick else 10} steps",
    )
    short, long = (5, 20) if asked.quick else (20, 200)
    (few_mib, few_more), (many_mib, many_more) = memory(short, asked.precision), memory(long, asked.precision)
    say(
        f"peak memory, {long} steps / {short} steps", many_mib / few_mib, 1.05,
        f"{many_mib:.0f} / {few_mib:.0f} MiB; above a warm process {many_more:.0f} / {few_more:.0f} MiB, {MEMORY_ROWS} rows",
    )  # fmt: skip


if __name__ == "__main__":
    main()
