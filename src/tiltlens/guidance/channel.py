"""What a(x_0) may be where a clean estimate says that its mean is mu: the unit's natural law, seen through a Gaussian channel.

A unit of natural images is seldom Gaussian (a class is a rare mode far from the rest), and then a Gaussian twist, whose force
is the strength whatever mu is, steers worst where it matters: between the modes. If x_t told of a(x_0) what a Gaussian
channel of precision kappa tells, the law of a(x_0) given x_t were a member of one family,

    p(a | lambda) ~ p(a) exp(lambda a - kappa a^2 / 2),      E[a | lambda] = mu,

with p the law of the unit on natural images. The pilot knows all of it: p is the law of its activations, kappa_t is the
precision at which the channel leaves the residual variance r_t^2 of the regression of a(x_0) on u_t, and mu = c_t + rho_t u_t. For
a Gaussian p this is N(mu, r_t^2), the Gaussian twist; otherwise the force of E = -a is

    d log psi / d mu = (E[a | lambda + s] - E[a | lambda]) / Var[a | lambda],

s where nothing is in doubt, more for an image that may still fall into a higher mode, less for one that is there.

Of what lies beyond them n activations tell nothing, and a law that ends with the highest of them would stop pushing there: with the weight of
a draw that exceeds them all, 1/(n + 1), a(x_0) is taken to be N(mu, r_t^2) instead (`log_tilt`). At strengths that the pilot can speak of this is next to nothing, at
great ones it is the Gaussian twist.

p is a sum of equal Gaussians on at most ATOMS quantile means of the activations, of Silverman's width, drawn together so that mean and
variance are those of the activations. Every sum is over a row's own atoms: a row never depends on another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tiltlens.constraint import RowConstraint

ATOMS = 64
GRID = 96  # precisions at which the channel's residual variance is tabulated
NODES = 12  # of Gauss-Hermite quadrature over its noise
NEWTON = 40
MET = 1e-8  # of the mean; one step more squares it


@dataclass(frozen=True)
class Channel:
    """atoms (B, M): centres; width2 (B,): variance of each; kappa (B,). float64."""

    atoms: Tensor
    width2: Tensor
    kappa: Tensor

    def law(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p(a | lambda) as a mixture: log weights (B, M), means (B, M), variance of each (B, 1)."""
        lam, width2, kappa = lam[:, None], self.width2[:, None], self.kappa[:, None]
        spread = 1 / (1 + kappa * width2)
        log_w = spread * (lam * self.atoms - kappa * self.atoms.square() / 2)
        return log_w.log_softmax(1), spread * (self.atoms + width2 * lam), spread * width2

    def moments(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """E[a | lambda] and Var[a | lambda], (B,)."""
        log_w, mean, variance = self.law(lam)
        w = log_w.exp()
        first = (w * mean).sum(1)
        return first, (w * (mean - first[:, None]).square()).sum(1) + variance[:, 0]

    def at(self, mu: Tensor) -> Tensor:
        """lambda (B,) float64 with E[a | lambda] = mu (B,), by Newton's method in a bracket; differentiable in mu."""
        lam = self._solve(mu.detach().double())
        first, variance = self.moments(lam)
        # one step more, for the derivative of the inverse
        return lam + (mu.double() - first) / variance

    @torch.no_grad()
    def _solve(self, mu: Tensor) -> Tensor:
        scale = 1 + self.kappa * self.width2
        low = (mu * scale - self.atoms.amax(1)) / self.width2
        high = (mu * scale - self.atoms.amin(1)) / self.width2
        lam = torch.zeros_like(mu).clamp(low, high)
        for _ in range(NEWTON):
            first, variance = self.moments(lam)
            met = (first - mu).abs() <= MET * (1 + mu.abs())
            if bool(met.all()):
                break
            low, high = torch.where(first <= mu, lam, low), torch.where(first >= mu, lam, high)
            step = lam + (mu - first) / variance
            step = torch.where((step > low) & (step < high), step, (low + high) / 2)
            lam = torch.where(met, lam, step)  # each row stops by itself: others may go on
        return lam


@dataclass(frozen=True)
class NaturalLaws:
    """atoms (units, M), width2 (units,), kappa (units, steps); float64. grid, left (units, GRID): precisions, and the residual
    variance that a channel of each leaves, the dullest last. beyond (units,): the weight of what lies beyond the activations; None for 0."""

    atoms: Tensor
    width2: Tensor
    kappa: Tensor
    grid: Tensor | None = None
    left: Tensor | None = None
    beyond: Tensor | None = None

    @classmethod
    def of(cls, arguments: Sequence[Tensor], residual_variance: Tensor) -> "NaturalLaws":
        """arguments: of the energy on natural images, (P,) for each unit. residual_variance (units, steps)."""
        atoms, width2 = (torch.stack(x) for x in zip(*(_smooth(a.double()) for a in arguments)))
        grid = torch.stack([_grid(*x) for x in zip(atoms, width2)])
        left = torch.stack([_left_over(*x) for x in zip(atoms, width2, grid)])
        beyond = torch.tensor(
            [1 / (int(torch.isfinite(a).sum()) + 1) for a in arguments], dtype=torch.float64
        )
        return cls(atoms, width2, _precisions(left, grid, residual_variance.double()), grid, left, beyond)

    def log_tilt(
        self, rows: RowConstraint, number: int, mean: Tensor, variance: Tensor, own: Tensor | None = None
    ) -> Tensor:
        """log E[exp(-s E(a))] (B,) float64 over p(a | mean), at step `number`. mean, variance (B,): of the regression; own: as of `rows`."""
        channel = self.rows(rows.which, number, mean, variance, own)
        log_w, means, variances = channel.law(channel.at(mean))
        inside = torch.logsumexp(log_w.T + rows.log_tilt(means.T, variances.T), 0)
        if self.beyond is None:
            return inside
        share = self.beyond[rows.which.cpu()].to(inside)
        beyond = rows.log_tilt(mean.double(), variance.double())
        return torch.logaddexp((-share).log1p() + inside, share.log() + beyond)

    def rows(
        self, which: Tensor, number: int, like: Tensor, variance: Tensor | None = None, own: Tensor | None = None
    ) -> Channel:  # fmt: skip
        """Of rows of units `which` (B,), at step `number`. variance (B,): the residual's of the rows `own` (B,) bool, whose it is and
        not the step's; differentiable."""
        which = which.cpu()
        atoms, width2, kappa = self.atoms[which], self.width2[which], self.kappa[which, number]
        if own is not None:
            told = _precisions(self.left[which], self.grid[which], variance.double().cpu()[:, None])[:, 0]
            kappa = torch.where(own.cpu(), told, kappa)
        return Channel(*(x.to(like.device) for x in (atoms, width2, kappa)))


def _smooth(a: Tensor) -> tuple[Tensor, Tensor]:
    """Atoms (ATOMS,) and the variance of each, of a sample (P,)."""
    a = a[torch.isfinite(a)].sort().values
    count = 1 << (
        min(ATOMS, len(a)).bit_length() - 1
    )  # of few, each is there several times, so that all weigh alike
    atoms = torch.stack([x.mean() for x in a.tensor_split(count)]).repeat_interleave(ATOMS // count)
    mean, variance = a.mean(), a.var()
    quartiles = torch.quantile(a, torch.tensor([0.25, 0.75], dtype=a.dtype))
    spread = torch.minimum(variance.sqrt(), (quartiles[1] - quartiles[0]) / 1.34)
    width = 0.9 * torch.maximum(spread, 0.1 * variance.sqrt()) * len(a) ** -0.2
    scale = ((variance - width**2) / atoms.var(unbiased=False).clamp_min(1e-12)).clamp_min(0).sqrt()
    return mean + (atoms - atoms.mean()) * scale, width**2


def _grid(atoms: Tensor, width2: Tensor) -> Tensor:
    """(GRID,): precisions, from the finest channel to the dullest."""
    return torch.logspace(-3, 5, GRID, dtype=torch.float64).flip(0) / (atoms.var(unbiased=False) + width2)


def _left_over(atoms: Tensor, width2: Tensor, grid: Tensor) -> Tensor:
    """(GRID,): the variance that a channel of each precision of the grid leaves; increasing."""
    nodes, weights = _hermite(NODES)
    left = []
    for kappa in grid:
        # lambda = kappa a + sqrt(kappa) xi
        lam = kappa * atoms[:, None] + (kappa + kappa**2 * width2).sqrt() * nodes
        flat = lam.flatten()
        channel = Channel(atoms.expand(len(flat), -1), width2.expand(len(flat)), kappa.expand(len(flat)))
        left.append((channel.moments(flat)[1].unflatten(0, lam.shape) @ weights).mean())
    return torch.stack(left).cummax(0).values


def _precisions(left: Tensor, grid: Tensor, residual: Tensor) -> Tensor:
    """kappa (units, K) at which a channel leaves these residual variances, between the points of left and grid (units, GRID), in
    the logarithm of the latter."""
    inside = residual.detach().clamp(left[:, :1], left[:, -1:])
    at = torch.searchsorted(left.contiguous(), inside.contiguous()).clamp(1, GRID - 1)
    low, high = left.gather(1, at - 1), left.gather(1, at)
    share = ((residual - low) / (high - low).clamp_min(1e-30)).clamp(0, 1)
    below, above = grid.log().gather(1, at - 1), grid.log().gather(1, at)
    kappa = (below + share * (above - below)).exp()
    return torch.where(residual >= left[:, -1:], torch.zeros_like(kappa), kappa)


def _hermite(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E[f(xi)], xi ~ N(0, 1)."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())
