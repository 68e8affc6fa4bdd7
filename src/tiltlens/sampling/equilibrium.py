"""Markov chains at one strength: E under q_s by plain Metropolis in noise space, with no weights in its mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tiltlens.sampling.autocorrelation import autocorrelation_time
from tiltlens.sampling.chain_sampler import Parts
from tiltlens.sampling.noise_space import NoiseSpace
from tiltlens.sampling.noise_walk import NoiseMap, Point
from tiltlens.sampling.plan import Row


@dataclass(frozen=True)
class Equilibrium:
    """energies (replicas, moves): E along the chains, after the warm-up. acceptance: share of moves taken.
    autocorrelation in moves; effective: independent draws that the mean is worth. energy, energy_se: m(s) and its
    standard error; variance: Var_{q_s}(E). point: where the chains end. log_w (replicas,): of the annealing before."""

    energies: np.ndarray
    acceptance: float
    autocorrelation: float
    effective: float
    energy: float
    energy_se: float
    variance: float
    point: Point
    log_w: Tensor


def equilibrium(
    sampler: NoiseSpace, parts: Parts, unit: int, strength: float, seeds: Sequence[int], moves: int,
    warm: int = 0, progress: Callable[[int, int], None] | None = None,
) -> Equilibrium:  # fmt: skip
    """A chain a seed at strength s > 0, begun from the sampler's annealed walks, re-drawn by weight; `warm` moves are
    dropped, `moves` recorded. Raises ValueError where no start is finite."""
    rows = [Row(unit, strength, seed) for seed in seeds]
    walk = sampler.walk(parts, rows)
    log_w = torch.where(torch.isfinite(walk.log_w), walk.log_w, -torch.inf)
    if not bool((log_w > -torch.inf).any()):
        raise ValueError(
            f"strength {strength}: none of {len(rows)} annealed walks has a finite weight to start from"
        )
    point = _redrawn(walk.point, log_w.softmax(0))
    space = NoiseMap(parts.chain, parts.bound(rows))
    noise = space.noise(seeds, parts.device, parts.dtype, domain="equilibrium")
    energies, accepted = [], []
    for k in range(warm + moves):
        point, move = space.move(point, walk.ladder[:, -1], walk.beta[:, -1], noise)
        if k >= warm:
            energies.append(point.energy)
            accepted.append(move.accepted.double().mean())
        if progress:
            progress(k + 1, warm + moves)
    trace = torch.stack(energies, 1).cpu().numpy()
    tau, effective = autocorrelation_time(trace)
    variance = float(trace.var())
    return Equilibrium(
        trace, float(torch.stack(accepted).mean()), tau, effective, float(trace.mean()),
        (variance / effective) ** 0.5 if effective else float("nan"), variance, point, walk.log_w,
    )  # fmt: skip


def _redrawn(point: Point, weight: Tensor) -> Point:
    """As many rows, each as often as its weight says (systematic, from the middle of the first interval)."""
    n = len(weight)
    at = (torch.arange(n, dtype=weight.dtype, device=weight.device) + 0.5) / n
    index = torch.searchsorted(weight.cumsum(0), at).clamp_max(n - 1)
    return Point(*(value[index] for value in vars(point).values()))
