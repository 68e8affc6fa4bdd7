"""The oracle of the discrete chain in one dimension: its steps as matrices on a grid, no sampling.

A step's kernel is N(mu(x), v^2) and p_t a vector on the grid; the trapezoid rule of smooth laws converges faster than
any power once the grid is as fine as the narrowest v. The last step is deterministic: the law of x_0 is that of
x0_hat(x) at the grid's points.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tiltlens.guidance.guidance import Guidance, clean_estimate
from tiltlens.sampling.chain import Chain


@dataclass(frozen=True)
class Law:
    """x_0, weight (n,) float64, weights of sum 1: the marginal law of the chain's end. path_kl: E_Q of it, nats."""

    x_0: Tensor
    weight: Tensor
    path_kl: float

    def mean(self, f) -> float:
        return float((self.weight * f(self.x_0)).sum())

    def log_z(self, energy, strength: float) -> float:
        """log E[exp(-s E(x_0))], energy a function of x_0 (n,)."""
        return float(torch.logsumexp(self.weight.log() - strength * energy(self.x_0), 0))

    def tilted(self, energy, strength: float) -> "Law":
        log_w = self.weight.log() - strength * energy(self.x_0)
        return Law(self.x_0, log_w.softmax(0), math.nan)


def law_of(
    chain: Chain, reach: float, guidance: Guidance | None = None, constraint=None, strength: float = 0.0,
    samples: int = 0, nodes: int = 5,
) -> Law:  # fmt: skip
    """The law of a chain with eta > 0 over a one-dimensional denoiser, x_t in [-reach, reach].

    guidance, constraint: calibrated; its shift must depend on x_t alone, so that a memory is allowed only where it is
    the same for every past. samples: of a Monte-Carlo twist, integrated over by Gauss-Hermite nodes.
    """
    quadrature, share = _nodes(samples, nodes)
    widths = [c.v for c in chain.coefficients[:-1]]
    x = _grid(reach, widths[0])
    density = torch.exp(-((x / chain.denoiser.schedule.start_std(chain.indices[0])) ** 2) / 2)
    density, path_kl, memory = density / density.sum(), 0.0, None
    for number, (t, c) in enumerate(zip(chain.indices, chain.coefficients)):
        x0_hat = clean_estimate(chain.denoiser, x[:, None], t, chain.clip)[:, 0]
        if number == len(chain) - 1:
            return Law(x0_hat, density, path_kl)
        shift = torch.zeros(len(share), len(x), dtype=torch.float64)
        if guidance:
            state = x.repeat(len(share))[:, None]  # the nodes' rows one after another
            rows = constraint.rows(
                torch.zeros(len(state), dtype=torch.long), torch.full_like(state[:, 0], strength)
            )
            step = chain.where(number, lambda k, x=x: quadrature.repeat_interleave(len(x), 0)[..., None])
            said = guidance(chain.denoiser, state, step, rows, _regrid(memory, guidance, state))
            memory = said.memory
            shift = shift if said.shift is None else said.shift.reshape(len(share), len(x))
        after = _grid(reach, min(widths[number : number + 2]))
        passed = torch.zeros_like(after)
        for weight, delta in zip(share, c.x0 * shift):
            mu = c.x0 * x0_hat + c.x * x + delta
            passed += weight * (torch.exp(-((after[:, None] - mu) ** 2) / (2 * c.v**2)) @ density)
            path_kl += weight * float((density * delta**2).sum()) / (2 * c.v**2)
        x, density = after, passed * float(after[1] - after[0]) / (c.v * math.sqrt(2 * math.pi))
        assert abs(float(density.sum()) - 1) < 1e-6, "the grid is too narrow or too coarse"
    raise AssertionError("a chain has at least one step")


def law_without_noise(chain: Chain, points: int = 4001) -> Law:
    """The law of a chain at eta = 0: a map of x_T alone."""
    x_t = torch.linspace(-6, 6, points, dtype=torch.float64)
    state = x_t[:, None] * chain.denoiser.schedule.start_std(chain.indices[0])
    for t, c in zip(chain.indices, chain.coefficients):
        state = c.x0 * clean_estimate(chain.denoiser, state, t, chain.clip) + c.x * state
    return Law(state[:, 0], (-(x_t**2) / 2).softmax(0), 0.0)


def _grid(reach: float, width: float) -> Tensor:
    """Points at most 1.1 widths apart: the trapezoid rule then errs by exp(-2 pi^2 / 1.2) at most, 1e-7."""
    return torch.linspace(-reach, reach, 2 * math.ceil(reach / (1.1 * width)) + 1, dtype=torch.float64)


def _regrid(memory, guidance: Guidance, state: Tensor):
    """A memory that is the same for every past, on the next grid."""
    if memory is None:
        return guidance.start(state)
    first = lambda m: m[:1].expand(len(state), *m.shape[1:])  # noqa: E731
    return type(memory)(*(first(m) for m in vars(memory).values()))


def _nodes(samples: int, nodes: int) -> tuple[Tensor, list[float]]:
    """Gauss-Hermite for `samples` standard normals: (nodes^samples, samples) and their weights."""
    at, weight = np.polynomial.hermite_e.hermegauss(nodes)
    grids = (
        np.stack(np.meshgrid(*[at] * samples, indexing="ij"), -1).reshape(-1, samples)
        if samples
        else np.zeros((1, 0))
    )
    weights = np.ones(1)
    for _ in range(samples):
        weights = np.outer(weights, weight / weight.sum()).ravel()
    return torch.from_numpy(grids), weights.tolist()
