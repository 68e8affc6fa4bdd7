"""Annealed importance sampling in noise space: q_s with no gradient, the referee of everything that is guided.

Neal, Annealed importance sampling, 2001. Each row walks by itself up a ladder 0 = s_0 < s_1 < .. < s_K = s,

    xi_0 ~ N(0, I),   log w = - sum_k (s_{k+1} - s_k) E(xi_k),   xi_k -> xi_{k+1} by moves that leave pi_{s_{k+1}} invariant.

Let Q be the law of the whole walk and R that of the reversed one, which starts from pi_s at its end: w = Z(s) dR/dQ, so
that E_Q[w f(x_0)] = Z(s) E_{q_s}[f] exactly, whatever the ladder, the step sizes and the number of moves; further moves
at s keep the weights. The bound on what was sampled, with q' the law of the output:

    E_Q[-log w] + log Z(s) = KL(Q||R) >= KL(q'||q_s) = KL(q'||p) + s E_{q'}[E] + log Z(s),

so that path_kl = -s E - log w has E_Q[path_kl] >= KL(q'||p), as a guided chain's path KL has, and gap = KL(Q||R). No
density of a step is needed: all of it holds at eta = 0 too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tiltlens.constraint import Constraint
from tiltlens.sampling.autocorrelation import autocorrelation_time
from tiltlens.sampling.burn_in import BurnIn
from tiltlens.sampling.chain import Chain, State
from tiltlens.sampling.chain_sampler import ChainSampler, Parts, Samples
from tiltlens.sampling.noise_walk import NoiseMap, Point
from tiltlens.sampling.plan import Row


@dataclass(frozen=True)
class Walk:
    """What the walks of a batch recorded. point: where they end. log_w (B,) float64. ladder, beta (B, K + 1); beta of
    level 0 is not used. energies (B, K + 1): E(xi_k) after the moves at s_k, the terms of every log w. accepted (B, K): share
    of the moves taken at s_1 .. s_K. trace (B, final + 1): the energy at the final strength, a move each. lost (B,):
    proposals that were not finite."""

    point: Point
    log_w: Tensor
    ladder: Tensor
    beta: Tensor
    energies: Tensor
    accepted: Tensor
    trace: Tensor
    lost: Tensor

    @property
    def log_weights(self) -> Tensor:
        """(B, K + 1): log w of the walk broken off at each level, for E_Q[w f(xi_k)] = Z(s_k) E_{q_{s_k}}[f]; one walk
        answers for the whole ladder."""
        work = self.ladder.diff(dim=1) * self.energies[:, :-1]
        return torch.nn.functional.pad(-work.cumsum(1), (1, 0))


class NoiseSpace(ChainSampler):
    """levels: K, rungs of the ladder. moves: at each. final: further moves at the final strength, whose energies tell the
    autocorrelation. replicas: of the burn-in, which sets ladder and step sizes of a unit before its first guided row.

    A row of strength s > 0 costs 1 + levels * moves + final unguided samples, and no gradient. The guidance is not used.
    Raises ValueError for less than one level or move, a negative `final`, or fewer than 4 replicas.
    """

    weighs_deterministic = True
    guides = False

    def __init__(self, levels: int = 24, moves: int = 1, final: int = 8, replicas: int = 16):
        asked = (("levels", levels, 1), ("moves", moves, 1), ("final", final, 0), ("replicas", replicas, 4))
        for name, value, least in asked:
            if value < least:
                raise ValueError(f"NoiseSpace: {name} = {value}: expected a whole number >= {least}")
        self.levels, self.moves, self.final, self.replicas = levels, moves, final, replicas
        self._burn_ins: dict[int, BurnIn] = {}
        self._of: tuple[Chain, Constraint] | None = None
        self._records: list[dict[str, Tensor]] = []  # of the walks, a batch each

    def burn_in(self, parts: Parts, unit: int) -> BurnIn:
        """The unit's burn-in, begun at the first call. It knows its own unit, chain and noise, nothing of the plan."""
        if self._of is None or self._of[0] is not parts.chain or self._of[1] is not parts.constraint:
            self._burn_ins, self._records, self._of = {}, [], (parts.chain, parts.constraint)
        if unit not in self._burn_ins:
            rows = [Row(unit, 0.0, seed) for seed in range(self.replicas)]
            space = NoiseMap(parts.chain, parts.bound(rows))
            self._burn_ins[unit] = BurnIn(space, range(self.replicas), parts.device, parts.dtype)
        return self._burn_ins[unit]

    def run(
        self, parts: Parts, rows: Sequence[Row], progress: Callable[[int, int], None] | None = None
    ) -> Samples:
        """One batch; progress(done, total) in unguided samples."""
        walk = self.walk(parts, rows, progress)
        strength = torch.tensor([r.strength for r in rows], dtype=torch.float64, device=parts.device)
        bound = path_kl(strength, walk.point.energy, walk.log_w)
        state = State(walk.point.x_0, walk.log_w + strength * walk.point.energy, bound)
        nothing = [torch.zeros_like(bound)] * len(parts.chain)
        samples = parts.finish(rows, parts.bound(rows), state, nothing, nothing)
        log_w, bound = walk.log_w.cpu(), bound.cpu()  # defined at eta = 0 as well
        finite = samples.finite & torch.isfinite(log_w) & torch.isfinite(bound)
        return replace(samples, log_w=log_w, path_kl=bound, finite=finite)

    def walk(
        self, parts: Parts, rows: Sequence[Row], progress: Callable[[int, int], None] | None = None
    ) -> Walk:
        """The same, with all that was recorded. Rows of strength 0 stay where the base chain puts them, bit by bit."""
        ladder, beta = self._steps(parts, rows)
        space = NoiseMap(parts.chain, parts.bound(rows))
        noise = space.noise([r.seed for r in rows], parts.device, parts.dtype)
        moves = self.levels * self.moves + self.final if bool((ladder > 0).any()) else 0
        point, done = space(noise.start()), 0
        log_w, lost = torch.zeros_like(ladder[:, 0]), torch.zeros_like(ladder[:, 0])
        energies = point.energy[:, None].repeat(1, self.levels + 1)
        accepted, trace = torch.zeros_like(ladder[:, 1:]), point.energy[:, None].repeat(1, self.final + 1)
        for k in range(1, self.levels + 1 if moves else 0):
            rise = ladder[:, k] - ladder[:, k - 1]
            log_w = log_w - torch.where(rise != 0, rise * point.energy, 0.0)
            here = self.moves + (self.final if k == self.levels else 0)
            for _ in range(here):
                point, move = space.move(point, ladder[:, k], beta[:, k], noise)
                accepted[:, k - 1] += move.accepted / here
                lost, done = lost + move.lost, done + 1
                if done + self.final >= moves:
                    trace[:, done + self.final - moves] = point.energy
                if progress:
                    progress(done + 1, moves + 1)
            energies[:, k] = point.energy
        found = Walk(point, log_w, ladder, beta, energies, accepted, trace, lost)
        if moves:
            self._records.append(_record(rows, found))
        return found

    def _steps(self, parts: Parts, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Ladder and step sizes (B, K + 1), frozen by the burn-in of each row's unit; beta = 0 does not move."""
        known: dict[tuple[int, float], tuple[np.ndarray, np.ndarray]] = {}
        for unit, strength in {(r.unit, r.strength) for r in rows}:
            ladder = beta = np.zeros(self.levels + 1)
            if strength > 0:
                burn_in = self.burn_in(parts, unit)
                ladder = burn_in.ladder(strength, self.levels)
                beta = burn_in.beta(ladder)
            known[unit, strength] = ladder, beta
        tables = zip(*(known[r.unit, r.strength] for r in rows))
        ladder, beta = (torch.from_numpy(np.stack(t)).to(parts.device) for t in tables)
        return ladder, beta

    def describe(self) -> dict:
        return super().describe() | {"ladder": "even in the thermodynamic length of the burn-in"}

    def recorded(self) -> dict[str, Tensor] | None:
        """Of the guided rows of the last batch: unit (index), strength, seed, lost (B,); ladder, beta, accepted (B, K); trace."""
        return self._records[-1] if self._records else None

    def diagnostics(self, records: Sequence[dict[str, Tensor]] | None = None) -> list[dict]:
        """For each (unit, strength > 0) walked so far, or in these records of several calls: unit (index), strength, n; ladder,
        beta, acceptance (K each, s_1 to s_K); autocorrelation (moves) and effective samples of the further moves at s;
        lost proposals."""
        of: dict[
            tuple[int, float], dict[int, dict[str, np.ndarray]]
        ] = {}  # a row that was walked twice counts once
        for record in self._records if records is None else records:
            columns = {k: v.cpu().numpy() for k, v in record.items()}
            for i, (unit, strength, seed) in enumerate(
                zip(*(columns[k].tolist() for k in ("unit", "strength", "seed")))
            ):
                of.setdefault((unit, strength), {})[seed] = {k: v[i] for k, v in columns.items()}
        out = []
        for (unit, strength), walks in sorted(of.items()):
            take = {
                k: np.stack([w[k] for w in walks.values()])
                for k in ("ladder", "beta", "accepted", "trace", "lost")
            }
            tau, effective = autocorrelation_time(take["trace"][np.isfinite(take["trace"]).all(1)])
            out.append({
                "unit": unit, "strength": strength, "n": len(walks), "ladder": take["ladder"][0].tolist(),
                "beta": take["beta"][0].tolist(), "acceptance": take["accepted"].mean(0).tolist(),
                "autocorrelation": tau, "effective": effective, "lost": int(take["lost"].sum()),
            })  # fmt: skip
        return out


def _record(rows: Sequence[Row], walk: Walk) -> dict[str, Tensor]:
    guided = [i for i, r in enumerate(rows) if r.strength > 0]
    tables = {"ladder": walk.ladder[:, 1:], "beta": walk.beta[:, 1:], "accepted": walk.accepted}
    tables |= {"trace": walk.trace, "lost": walk.lost}
    return {
        "unit": torch.tensor([rows[i].unit for i in guided]),
        "strength": torch.tensor([rows[i].strength for i in guided], dtype=torch.float64),
        "seed": torch.tensor([rows[i].seed for i in guided]),
        **{k: v[guided].cpu().contiguous() for k, v in tables.items()},
    }


def path_kl(strength: Tensor, energy: Tensor, log_w: Tensor) -> Tensor:
    """-s E - log w (B,), whose mean is no less than KL(q'||p); see above."""
    return -(log_w + strength * energy)
