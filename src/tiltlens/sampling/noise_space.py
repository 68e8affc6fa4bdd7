"""Annealed importance sampling in noise space: q_s with no gradient, the referee of everything that is guided.

Neal, Annealed importance sampling, 2001. Each row walks by itself through a ladder 0 = s_0 < s_1 < .. < s_K = s,

    xi_0 ~ N(0, I),   log w = - sum_k (s_{k+1} - s_k) E(xi_k),   xi_k -> xi_{k+1} by moves that leave pi_{s_{k+1}} invariant.

Let Q be the law of the whole walk and R that of the reversed one, which starts from pi_s at its end: w = Z(s) dR/dQ, so
that E_Q[w f(x_0)] = Z(s) E_{q_s}[f] exactly, whatever the ladder, the step sizes and the number of moves, and further
moves at s keep the weights. The bound on what was sampled: with q' the law of the output,

    E_Q[-log w] + log Z(s) = KL(Q||R) >= KL(q'||q_s) = KL(q'||p) + s E_{q'}[E] + log Z(s),

so that path_kl = -s E - log w has E_Q[path_kl] >= KL(q'||p), as a guided chain's path KL does, and the same gap. It
needs no density of a step, and holds at eta = 0 too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiltlens.constraint import Constraint
from tiltlens.sampling.burn_in import BurnIn
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise_walk import NoiseMap, Point
from tiltlens.sampling.plan import Row


@dataclass(frozen=True)
class Walk:
    """What the walks of a batch recorded. point: where they end. log_w (B,) float64. ladder, beta (B, K + 1), beta of
    level 0 unused. accepted (B, K): share of the moves taken at s_1 .. s_K. trace (B, final + 1): the energy at the
    final strength, a move each. lost (B,): proposals that were not finite."""

    point: Point
    log_w: Tensor
    ladder: Tensor
    beta: Tensor
    accepted: Tensor
    trace: Tensor
    lost: Tensor


class NoiseSpace:
    """levels: K, rungs of the ladder. moves: at each. final: further moves at the final strength, whose energies tell the
    autocorrelation. replicas: of the burn-in, which sets ladder and step sizes of each unit before its first row.

    A row costs 1 + levels * moves + final unguided samples, one of strength 0 one. Raises ValueError for less than one
    level or move, a negative `final`, or fewer than 4 replicas.
    """

    def __init__(self, levels: int = 24, moves: int = 1, final: int = 8, replicas: int = 16):
        for name, value, least in (("levels", levels, 1), ("moves", moves, 1), ("final", final, 0), ("replicas", replicas, 4)):  # fmt: skip
            if value < least:
                raise ValueError(f"NoiseSpace: {name} = {value}: expected a whole number >= {least}")
        self.levels, self.moves, self.final, self.replicas = levels, moves, final, replicas
        self._burn_ins: dict[int, BurnIn] = {}
        self._of: Any = None

    def burn_in(
        self, chain: Chain, constraint: Constraint, unit: int, device: Any, dtype: torch.dtype
    ) -> BurnIn:
        """The unit's burn-in for this chain and constraint; begun at the first call."""
        if self._of is None or self._of[0] is not chain or self._of[1] is not constraint:
            self._burn_ins, self._of = {}, (chain, constraint)
        if unit not in self._burn_ins:
            rows = constraint.rows(
                torch.full((self.replicas,), unit, device=device),
                torch.zeros(self.replicas, dtype=dtype, device=device),
            )
            self._burn_ins[unit] = BurnIn(NoiseMap(chain, rows), range(self.replicas), device, dtype)
        return self._burn_ins[unit]

    def walk(
        self, chain: Chain, constraint: Constraint, rows: Sequence[Row], device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32, progress: Callable[[int, int], None] | None = None,
    ) -> Walk:  # fmt: skip
        """The rows as one batch; progress(done, total) in unguided samples. Rows of strength 0 are the base chain's."""
        still = [i for i, r in enumerate(rows) if r.strength == 0]
        moving = [i for i, r in enumerate(rows) if r.strength > 0]
        parts = [self._walk(chain, constraint, [rows[i] for i in part], device, dtype, progress)
                 for part in (still, moving) if part]  # fmt: skip
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor(still + moving, device=device).argsort()
        return _join(parts, order)

    def _walk(self, chain, constraint, rows, device, dtype, progress) -> Walk:
        which = torch.tensor([r.unit for r in rows], device=device)
        s = torch.tensor([r.strength for r in rows], dtype=torch.float64, device=device)
        ladder, beta = (
            torch.from_numpy(x).to(device) for x in self._steps(chain, constraint, rows, device, dtype)
        )
        free = bool((s == 0).all())
        total = 1 if free else 1 + self.levels * self.moves + self.final
        space = NoiseMap(chain, constraint.rows(which, s.to(dtype)))
        noise = space.noise([r.seed for r in rows], device, dtype)
        point, done = space(noise.start()), 1
        log_w, lost = torch.zeros_like(s), torch.zeros_like(s)
        accepted = torch.zeros_like(ladder[:, 1:])
        trace = point.energy[:, None].repeat(1, self.final + 1)
        report = progress or (lambda done, total: None)
        report(done, total)
        if free:
            return Walk(point, log_w, ladder, beta, accepted, trace, lost)
        for k in range(1, self.levels + 1):
            log_w = log_w - (ladder[:, k] - ladder[:, k - 1]) * point.energy
            for _ in range(self.moves + (self.final if k == self.levels else 0)):
                point, move = space.move(point, ladder[:, k], beta[:, k], noise)
                accepted[:, k - 1] += move.accepted
                lost += move.lost
                done += 1
                report(done, total)
                if (left := total - done) <= self.final:
                    trace[:, self.final - left] = point.energy
        accepted[:, -1] *= self.moves / (self.moves + self.final)
        return Walk(point, log_w, ladder, beta, accepted / self.moves, trace, lost)

    def _steps(self, chain, constraint, rows, device, dtype) -> tuple[np.ndarray, np.ndarray]:
        """Ladder and step sizes (B, K + 1), frozen by the burn-in of each row's unit."""
        known: dict[tuple[int, float], tuple[np.ndarray, np.ndarray]] = {}
        for r in rows:
            if (r.unit, r.strength) in known:
                continue
            if r.strength == 0:
                known[r.unit, 0.0] = np.zeros(self.levels + 1), np.ones(self.levels + 1)
                continue
            burn_in = self.burn_in(chain, constraint, r.unit, device, dtype)
            ladder = burn_in.ladder(r.strength, self.levels)
            known[r.unit, r.strength] = ladder, burn_in.beta(ladder)
        return tuple(np.stack([known[r.unit, r.strength][i] for r in rows]) for i in (0, 1))

    def describe(self) -> dict:
        """Name and settings, for the manifest; the ladder is even in the thermodynamic length of the unit's burn-in."""
        return {"class": type(self).__name__, "levels": self.levels, "moves": self.moves, "final": self.final,
                "replicas": self.replicas, "ladder": "even in thermodynamic length"}  # fmt: skip


def path_kl(strength: Tensor, energy: Tensor, log_w: Tensor) -> Tensor:
    """-s E - log w (B,), whose mean is no less than KL(q'||p); see above."""
    return -(log_w + strength * energy)


def _join(parts: list[Walk], order: Tensor) -> Walk:
    """Parts of one batch, put back in order."""
    one = lambda name, read: torch.cat([read(getattr(p, name)) for p in parts])[order]  # noqa: E731
    point = Point(*(torch.cat([getattr(p.point, f) for p in parts])[order] for f in vars(parts[0].point)))
    rest = {name: one(name, lambda x: x) for name in vars(parts[0]) if name != "point"}
    return Walk(point, **rest)
