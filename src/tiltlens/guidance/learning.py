"""What multipliers cost and bring, in linear response, and the ones that the pilot can tell from the default.

Along an unguided trajectory with step noises z_t let y_tj be the shift that candidate j would make of the step's mean, for
unit strength of a linear energy and over the step's standard deviation. Multipliers m guide by s sum_j m_tj y_tj. To
second order in s, with M = sum_tj m_tj y_tj.z_t, a martingale,

    shift of E[a] = s <m, b>,   path KL = s^2 <m, G m> / 2,     b_tj = E[a(x_0) y_tj.z_t],   G_t = E[y_tj.y_tk],

and the tilt itself shifts by s Var a for s^2 Var a / 2 nats. So

    efficiency = <m, b>^2 / (<m, G m> Var a),     left over = 1 - (2 <m, b> - <m, G m>) / Var a

are the KL efficiency and the gap, as a share of the tilt's own s^2 Var a / 2. The gap is least at m = G^-1 b, the least
squares of a(x_0) on the increments, scale included: shift and path KL of the part of the tilt that these candidates can
make, of all of it where the efficiency is 1. b has less noise, and the same mean, with a(x_0) - c_t - rho_t u_t for a(x_0): z_t
is independent of x_t.

Multipliers are m_tj = rho_t sum_p theta_pj B_p(log-SNR_t) with hat functions B_p, and theta moves from the default in
blocks: the common scale, a constant share of each other candidate, the profile of the default in time. The
blocks are made orthogonal in G and each is shrunk by positive part James-Stein, kappa = 1 - tr V / |x|^2 with V the covariance of its
coordinates x (Stein's rule by blocks; Cavalier and Tsybakov, Sharp adaptation for inverse problems with random noise,
2002), and left out below two standard deviations of what chance gives.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

KNOTS = 5
KEPT_ABOVE = 2.0  # standard deviations; below, a block is left out
CUT = 1e-3  # of its own variance: what a direction must add to those before it
BLOCKS = ("scale", "blend", "profile")


@dataclass(frozen=True)
class Shadows:
    """Candidate shifts along N unguided trajectories, at unit multiplier; float64. The last of the C columns is the head.

    d (steps, N, C): y.z. gram (steps, N, C, C): y_j.y_k. a (N,): the samples' argument of the energy; u (steps, N): that
    of their clean estimates, 0 where it was not read. plain (steps, N, 2): y.z and |y|^2 of the gradient of the step alone,
    without memory and redraws, at every step; where asked for.
    """

    d: Tensor
    gram: Tensor
    a: Tensor
    u: Tensor
    plain: Tensor | None = None

    def only(self, rows: Tensor) -> "Shadows":
        """Those of these trajectories."""
        plain = None if self.plain is None else self.plain[:, rows]
        return Shadows(self.d[:, rows], self.gram[:, rows], self.a[rows], self.u[:, rows], plain)


class Found(NamedTuple):
    """Of multipliers: efficiency and what is left over, each with its standard error."""

    efficiency: float
    efficiency_se: float
    left: float
    left_se: float


@dataclass(frozen=True)
class Multipliers:
    """theta (knots, C), knots (knots,) in log-SNR, kappa (blocks,). found: of the default, and of the fits without and
    with the head (where there is one), leave-one-out; kind: which of them theta is."""

    theta: Tensor
    knots: Tensor
    kappa: Tensor
    found: dict[str, Found]
    kind: str


def place_knots(log_snr: Tensor, used: Tensor) -> Tensor:
    """(knots,): even between the first and the last step that is used."""
    levels = log_snr[used & torch.isfinite(log_snr)]  # a chain may begin at pure noise, log-SNR -inf
    if len(levels) < 2:
        return levels[:1] if len(levels) else log_snr[:1]
    return torch.linspace(float(levels.min()), float(levels.max()), min(KNOTS, len(levels))).double()


def hats(log_snr: Tensor, knots: Tensor) -> Tensor:
    """(steps, knots): hat functions, constant beyond the ends; they sum to 1."""
    if len(knots) == 1:
        return torch.ones(len(log_snr), 1, dtype=torch.float64)
    width = knots[1] - knots[0]
    at = ((log_snr.double().clamp(knots[0], knots[-1]) - knots[0]) / width)[:, None]
    return (1 - (at - torch.arange(len(knots), dtype=torch.float64)).abs()).clamp_min(0)


def moments(shadows: Shadows, residual: Tensor, scale: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Each trajectory's b (N, p) and G (N, p, p) in theta, p = knots C. residual (steps, N): a - c_t - rho_t u_t, or a itself.
    scale (steps, C): rho_t, and 1 for the head. basis (steps, knots)."""
    n = shadows.d.shape[1]
    b = torch.einsum("tn,tnc,tc,tp->npc", residual, shadows.d, scale, basis).reshape(n, -1)
    g = torch.einsum("tnce,tc,te,tp,tq->npcqe", shadows.gram, scale, scale, basis, basis)
    return b, g.reshape(n, b.shape[1], b.shape[1])


def judge(gain: Tensor, cost: Tensor, variance: float) -> Found:
    """gain, cost (N,): each trajectory's <m, b> and <m, G m>. variance: Var a, taken as known.

    The noise of the mean gain is taken out of its square; standard errors by the delta method.
    """
    n, p, q = len(gain), float(gain.mean()), float(cost.mean())
    left = 1 - (2 * gain - cost) / variance
    told = float(left.mean()), float(left.std()) / n**0.5
    if q <= 0:
        return Found(0.0, 0.0, *told)
    square = max(p**2 - float(gain.var()) / n, 0.0) if p > 0 else 0.0
    influence = (2 * p * (gain - p) - p**2 / q * (cost - q)) / (q * variance)
    return Found(square / (q * variance), float(influence.std()) / n**0.5, *told)


def settle(shadows: Shadows, slope: Tensor, intercept: Tensor, log_snr: Tensor, headed: Tensor, variance: float) -> Multipliers:  # fmt: skip
    """The multipliers of one unit. slope, intercept (steps,): of the pilot's regression. headed (steps,) bool: steps with a
    head. variance: Var a of the pilot.

    Everything that moves theta is judged on trajectories that it was not fitted to; what does not lower the gap there is
    not taken.
    """
    steps, n, columns = shadows.d.shape
    slope, log_snr = slope[:steps].double(), log_snr[:steps]
    knots = place_knots(log_snr, (slope != 0) | headed[:steps])
    scale = torch.cat([slope[:, None].expand(steps, columns - 1), torch.ones(steps, 1)], 1).double()
    residual = shadows.a - intercept[:steps, None].double() - slope[:, None] * shadows.u
    b, g = moments(shadows, residual, scale, hats(log_snr, knots))
    default = torch.zeros(len(knots), columns, dtype=torch.float64)
    default[:, 0] = 1.0
    theta, kappa, kind = default, torch.zeros(len(BLOCKS), dtype=torch.float64), "default"
    told = {"default": _apply(default.flatten().expand(n, -1), b, g)}
    for name, with_head in (("multipliers", False), ("head", True)):
        if with_head and not bool(headed.any()):
            continue
        start, blocks = _space(len(knots), columns, with_head)
        apart = [shrunk(*m, start, blocks)[0] for m in _left_out(b - g @ start, g)]
        told[name] = _apply(torch.stack(apart), b, g)
        if _worth(told[name]) > _worth(told[kind]):
            theta, kappa = shrunk(*_of_all(b - g @ start, g), start, blocks)
            theta, kind = theta.reshape(default.shape), name
    return Multipliers(theta, knots, kappa, {k: judge(*v, variance) for k, v in told.items()}, kind)


def shrunk(
    off: Tensor, covariance: Tensor, metric: Tensor, start: Tensor, blocks: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """theta (p,) and kappa (blocks,). off (p,): b - G start, covariance (p, p) its error; metric: G. start (p,): the default;
    blocks: the directions (p, q) that theta may move along."""
    theta, kappa, before = start.clone(), [], start.new_zeros(len(start), 0)
    for block in blocks:
        e = _orthonormal(block, metric, before)
        x, v = e.T @ off, e.T @ covariance @ e
        size, noise, spread = float(x @ x), float(v.trace()), float((2 * (v @ v).trace()).sqrt())
        kept = size > noise + KEPT_ABOVE * spread and size > 0
        kappa.append(1 - noise / size if kept else 0.0)
        theta, before = theta + kappa[-1] * (e @ x), torch.cat([before, e], 1)
    return theta, torch.tensor(kappa, dtype=torch.float64)


def _of_all(off: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance of the mean, and mean G, of each trajectory's off (N, p) and G (N, p, p)."""
    return off.mean(0), torch.cov(off.T).reshape(off.shape[1], -1) / len(off), g.mean(0)


def _left_out(off: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same without the first, without the second, ...: from sums, less one."""
    n = len(off) - 1
    total, square, metric = off.sum(0), off.T @ off, g.sum(0)
    for mine, own in zip(off, g):
        mean = (total - mine) / n
        covariance = (square - torch.outer(mine, mine) - n * torch.outer(mean, mean)) / (n - 1)
        yield mean, covariance / n, (metric - own) / n


def _space(knots: int, columns: int, with_head: bool) -> tuple[Tensor, list[Tensor]]:
    """The default and the blocks; the head's multiplier is 1 by default, where there is one."""
    used = columns if with_head else columns - 1
    start = torch.zeros(knots, columns, dtype=torch.float64)
    start[:, 0] = 1.0
    blend = torch.zeros(used - 1, knots, columns, dtype=torch.float64)
    for j in range(1, used):
        blend[j - 1, :, j] = 1.0
    profile = torch.zeros(knots, knots, columns, dtype=torch.float64)
    profile[range(knots), range(knots), 0] = 1.0
    if with_head:
        start[:, -1] = 1.0
    blocks = [x.reshape(-1, knots * columns).T for x in (start, blend, profile)]
    return start.flatten(), blocks


def _orthonormal(block: Tensor, metric: Tensor, before: Tensor) -> Tensor:
    """Directions (p, r <= q), orthonormal in the metric, of what the block adds to those before it."""
    unit = (block * (metric @ block)).sum(0).clamp_min(0)
    block, unit = block[:, unit > 0], unit[unit > 0]
    block = (block - before @ (before.T @ metric @ block)) / unit.sqrt()
    values, vectors = torch.linalg.eigh(block.T @ metric @ block)
    keep = values > CUT
    return block @ vectors[:, keep] / values[keep].sqrt()


def _apply(theta: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """<m, b> and <m, G m> of each trajectory, with the multipliers theta (N, p) that are its own."""
    return (theta * b).sum(1), torch.einsum("np,npq,nq->n", theta, g, theta)


def _worth(told: tuple[Tensor, Tensor]) -> float:
    gain, cost = told
    return float((2 * gain - cost).mean())
