"""Shadows: what guidance would have done along unguided trajectories, and what it learns from that.

Pilot trajectories are run again, with the same seeds and noise, so that nothing new is sampled. At each step the shifts
of the mean that the candidates of `Learned` would make, for unit strength of a linear energy, are held against the noise
that the step draws, y = delta / v and y.z, without being applied: see `tiltlens.guidance.learning`. The head of a trajectory
is the one fitted without it (`tiltlens.guidance.heads`), so that what it is worth is found honestly.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tiltlens.constraint import Constraint, RowConstraint
from tiltlens.guidance.guidance import (
    Guided,
    PilotTables,
    Step,
    clean_and_features,
    clean_estimate,
    finite_step,
    per_row,
)
from tiltlens.guidance.heads import FOLDS, Heads, fit_heads, fit_spread, fold_of
from tiltlens.guidance.learned import Learned, Lesson
from tiltlens.guidance.learning import Shadows, settle
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.pilot import UnitPilot, arguments

ROWS = 16  # of a batch: a network's graph is kept for all the candidates' passes
VECTORS = 256  # where there is no network
Progress = Callable[[int, int], None]


def learn(
    guidance: Learned, chain: Chain, constraint: Constraint, tables: PilotTables, pilots: Sequence[UnitPilot],
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, progress: Progress | None = None,
) -> list[Lesson]:  # fmt: skip
    """One lesson a unit. guidance: prepared, not yet taught. progress(done, total), in units of steps.

    Raises ValueError for fewer than 32 trajectories, no noise, or a pilot without the features that the head needs.
    """
    standardise, count = constraint.energy.standardise, len(pilots[0].members)
    guidance.check(count, chain.eta)
    read = [
        arguments(p, u, n, standardise) for p, u, n in zip(pilots, constraint.bank.units, constraint.naturals)
    ]
    heads, wide = heads_of(guidance, chain, tables, pilots, read) if guidance.reads_features else (None, None)
    several = min(guidance.shadows, count)
    total = len(pilots) * len(_batches(chain, several)) * (len(chain) - 1)
    lessons, done = [], 0
    for unit, (_, a) in enumerate(read):

        def tick() -> None:
            nonlocal done
            done += 1
            if progress:
                progress(done, total)

        seen = cast(guidance, chain, constraint, tables, unit, heads, several, device, dtype, tick)
        a = a[torch.isfinite(a)]
        lessons.append(lesson(seen, tables, unit, heads, float(a.var()), count, wide))
    return lessons


def lesson(
    seen: Shadows, tables: PilotTables, unit: int, heads: Heads | None, variance: float, pilot: int,
    wide: Heads | None = None,
) -> Lesson:  # fmt: skip
    """What shadows of a unit teach. variance: Var a of the pilot; pilot: its trajectories."""
    steps = len(tables.log_snr)

    def of(heads: Heads | None) -> tuple[Tensor, ...]:
        if heads is None:
            return torch.zeros(steps, 0).double(), torch.zeros(steps).double(), torch.zeros(steps).double()
        pad = lambda x: torch.cat([x, x.new_zeros(1, *x.shape[1:])])  # noqa: E731  the last step has no head
        return tuple(pad(x[unit]).double() for x in (heads.weight, heads.offset, heads.gain))

    whole = of(heads)
    m = settle(seen, tables.slope[unit], tables.intercept[unit], tables.log_snr, whole[2] > 0, variance)
    return Lesson.of(m, *whole, pilot, seen.d.shape[1], *of(wide)[:2])


def heads_of(
    guidance: Learned, chain: Chain, tables: PilotTables, pilots: Sequence[UnitPilot],
    read: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Heads | None, Heads | None]:  # fmt: skip
    """The heads of all units, for they share their features, and those of the variance that they leave; None where there are none,
    or none are asked for."""
    phi = pilots[0].features
    if phi is None:
        raise ValueError(
            "Learned guidance with a head needs the denoiser's features along the pilot, and this pilot has none: run it by a "
            "Sampler that holds this guidance, or take head = False"
        )
    if phi.shape[2] == 0:
        return None, None
    last = len(chain) - 1
    phi = phi[:last]
    residual = torch.stack([
        a - tables.intercept[i, :last, None] - tables.slope[i, :last, None] * u[:last] for i, (u, a) in enumerate(read)
    ])  # fmt: skip
    good = torch.isfinite(residual).all(0).all(0) & torch.isfinite(phi).all(2).all(0)
    if int(good.sum()) < FOLDS * 2:
        return None, None
    where = torch.nonzero(good)[:, 0]
    told = phi[:, where], residual[:, :, where], fold_of(len(good))[where]
    heads = fit_heads(*told) if guidance.head else None
    wide = fit_spread(*told, heads) if guidance.spread else None
    schedule = chain.denoiser.schedule
    off = [
        not schedule.alpha[t] > 1e-6 or guidance.weight(Step(n, t, schedule, chain.clip, None)) == 0
        for n, t in enumerate(chain.indices[:last])
    ]
    off = torch.tensor(off, dtype=torch.bool)
    return tuple(None if x is None else x.without(off) for x in (heads, wide))


def cast(
    guidance: Learned, chain: Chain, constraint: Constraint, tables: PilotTables, unit: int, heads: Heads | None,
    count: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    tick: Callable[[], None] | None = None, plain: bool = False,
) -> Shadows:  # fmt: skip
    """The shadows of one unit along the first `count` pilot trajectories. tick(): called after each step of a batch.
    plain: look also at the gradient of each step alone, at every step (what DPS would do)."""
    parts = []
    for seeds in _batches(chain, count):
        which = torch.full((len(seeds),), unit, device=device)
        rows = constraint.rows(which, torch.ones(len(seeds), dtype=dtype, device=device))
        mine = None
        if heads is not None:
            fold = fold_of(count)[list(seeds)]
            mine = heads.fold_weight[fold, unit].to(device), heads.gain[unit] > 0
        with torch.inference_mode(False):
            parts.append(
                _follow(guidance, chain, rows, tables, unit, mine, seeds, device, dtype, tick, plain)
            )
    d, gram, a, u, last = (list(x) for x in zip(*parts))
    whole = Shadows(
        torch.cat(d, 1),
        torch.cat(gram, 1),
        torch.cat(a),
        torch.cat(u, 1),
        torch.cat(last, 1) if plain else None,
    )
    good = torch.isfinite(whole.a) & torch.isfinite(whole.gram).all(0).all(1).all(1)
    return whole.only(good)


def _batches(chain: Chain, count: int) -> list[range]:
    size = VECTORS if len(chain.denoiser.shape) == 1 else ROWS
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def _follow(
    guidance: Learned, chain: Chain, rows: RowConstraint, tables: PilotTables, unit: int,
    head: tuple[Tensor, Tensor] | None, seeds: Sequence[int], device: torch.device | str, dtype: torch.dtype,
    tick: Callable[[], None] | None, plain: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One batch. head: weights (B, steps, F), and the steps that have one."""
    make = lambda: Noise(seeds, chain.denoiser.shape, device, dtype, domain="pilot")  # noqa: E731
    noise, ahead = make(), make()
    state = chain.start(noise, guidance)
    ds, grams, us, plains = [], [], [], []
    for number, c in enumerate(chain.coefficients[:-1]):
        step = chain.where(number, lambda k, n=number: noise.at("twist", n, k))
        w = head[0][:, number] if head is not None and bool(head[1][number]) else None
        on = step.alpha > 1e-6 and guidance.weight(step) != 0
        slope = float(tables.slope[unit, number]) if on else 0.0
        x0_hat, u, memory, columns, own = _look(
            guidance, chain, state.x, step, rows, state.memory, slope, w, plain
        )
        factor = c.x0 * guidance.weight(step) * step.sigma**2 / max(step.alpha, 1e-6) / c.v
        z = ahead.draw("step").double().flatten(1)
        y = factor * torch.stack([g.double().flatten(1) for g in columns])
        ds.append((y * z).sum(2).T.cpu())
        grams.append(torch.einsum("cbd,ebd->bce", y, y).cpu())
        us.append(u.double().cpu())
        if plain:
            own = factor * own.double().flatten(1)
            plains.append(torch.stack([(own * z).sum(1), own.square().sum(1)], 1).cpu())
        state, _ = chain.move(state, number, Guided(x0_hat, None, memory), noise)
        if tick:
            tick()
    with torch.no_grad():
        x_0 = clean_estimate(chain.denoiser, state.x, chain.indices[-1], chain.clip)
        a = rows.argument(rows.read(rows.decode(x_0)))
    last = torch.stack(plains) if plain else torch.empty(0)
    return torch.stack(ds), torch.stack(grams), a.double().cpu(), torch.stack(us), last


def _look(
    guidance: Learned, chain: Chain, x_t: Tensor, step: Step, rows: RowConstraint, memory: object, slope: float,
    head: Tensor | None, plain: bool,
) -> tuple[Tensor, Tensor, object, list[Tensor], Tensor]:  # fmt: skip
    """x0_hat; u (B,); the memory; every candidate's and the head's gradient (B, *shape) in x_t for a force of 1 and slope
    1, 0 where it would not steer, and for a finite step the default's part of it; that of the step alone."""
    zero = torch.zeros_like(x_t)
    u, columns, own = torch.zeros_like(rows.strength), [zero] * len(guidance.candidates), zero
    read = slope != 0
    if not (read or head is not None or (plain and step.alpha > 1e-6)):
        with torch.no_grad():
            x0_hat = clean_estimate(chain.denoiser, x_t, step.t, step.clip)
        return x0_hat, u, memory, [*columns, zero], zero
    with torch.enable_grad():
        leaf = x_t.detach().clone().requires_grad_()
        phi = None
        if head is not None:
            x0_hat, phi = clean_and_features(chain.denoiser, leaf, step.t, step.clip)
        else:
            x0_hat = clean_estimate(chain.denoiser, leaf, step.t, step.clip)
        pull = lambda h: torch.autograd.grad(x0_hat, leaf, h.to(x0_hat.dtype), retain_graph=True)[0]  # noqa: E731
        if read or plain:
            clean, step = guidance.leaf(chain.denoiser, x_t, x0_hat, step)
            found = guidance.read(clean, step, rows)
            sources = guidance.sources(clean, found, torch.ones_like(found[0]), step, rows)
            u = found[0].detach() if read else u
            own = pull(sources[guidance.own]) if plain else zero
        if read:
            averages, memory = guidance.average(sources, torch.ones_like(u), step, memory)
            columns = [pull(h) for h in averages]
            if guidance.finite:
                part = finite_step(averages[0], columns[0], step)
                columns = [per_row(part, g) * g for g in columns]
        of_head = zero
        if head is not None:
            (of_head,) = torch.autograd.grad(phi, leaf, head.to(phi))
    return x0_hat.detach(), u, memory, [*columns, of_head], own
