"""The walk in noise space: all that a chain draws is one Gaussian vector, moved without any gradient.

An unguided chain is a deterministic map of its noise xi = (x_T, z_1, z_2, ..) ~ N(0, I) to a sample x_0(xi), also at
eta = 0, where xi = x_T alone. So the law

    pi_s(xi) = N(xi; 0, I) exp(-s E(a(x_0(xi)))) / Z(s)

is carried by the map to q_s(x_0) = p(x_0) exp(-s E) / Z(s), with p the law of this very chain and the same Z.
Preconditioned Crank-Nicolson (Cotter, Roberts, Stuart, White, MCMC methods for functions, 2013),

    xi' = sqrt(1 - beta^2) xi + beta eta,   eta ~ N(0, I),   accepted with probability min(1, exp(-s (E' - E))),

is reversible for N(0, I), so that the energy alone decides; beta = 1 is the independence sampler.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import Noise


@dataclass(frozen=True)
class Point:
    """Where each row's walk is. xi (B, draws, *shape); x_0 (B, *shape); activation, energy (B,) float64, the energy
    NaN where the sample, its activation or its energy is not finite."""

    xi: Tensor
    x_0: Tensor
    activation: Tensor
    energy: Tensor

    def where(self, mask: Tensor, other: "Point") -> "Point":
        """This point in the rows of mask (B,), the other in the rest."""
        pick = lambda a, b: torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
        return Point(*(pick(a, b) for a, b in zip(vars(self).values(), vars(other).values())))


@dataclass(frozen=True)
class Move:
    """What one move tells, all (B,). probability: of acceptance, float64. accepted; lost: the proposal was not finite."""

    probability: Tensor
    accepted: Tensor
    lost: Tensor


class NoiseMap:
    """xi -> x_0(xi) -> E, for the rows of one batch. chain: run unguided. rows: each row's unit; no gradient is taken."""

    def __init__(self, chain: Chain, rows: RowConstraint):
        self.chain, self.rows = chain, rows
        self.draws = 1 + sum(c.v > 0 for c in chain.coefficients)

    def noise(
        self, seeds, device: torch.device | str, dtype: torch.dtype, domain: str = "sample"
    ) -> "WalkNoise":
        return WalkNoise(seeds, self.draws, self.chain.denoiser.shape, device, dtype, domain)

    @torch.no_grad()
    def __call__(self, xi: Tensor) -> Point:
        for state, _ in self.chain.run(_Given(xi)):  # noqa: B007
            pass
        activation = self.rows.read(self.rows.decode(state.x)).double()
        energy = self.rows.energy_of(activation.to(self.rows.strength)).double()
        sound = torch.isfinite(state.x).flatten(1).all(1) & torch.isfinite(activation)
        energy = torch.where(sound & torch.isfinite(energy), energy, torch.nan)
        return Point(xi, state.x, activation, energy)

    @torch.no_grad()
    def move(self, point: Point, strength: Tensor, beta: Tensor, noise: "WalkNoise") -> tuple[Point, Move]:
        """One move of every row. strength, beta (B,) float64. A proposal that is not finite is refused; a row whose
        own energy is not finite stays where it is."""
        per_row = lambda x: x.to(point.xi).reshape(-1, *[1] * (point.xi.ndim - 1))  # noqa: E731
        eta = noise.proposal()
        proposal = self(per_row((1 - beta**2).sqrt()) * point.xi + per_row(beta) * eta)
        log_ratio = -strength * (proposal.energy - point.energy)
        accepted = noise.log_uniform() < log_ratio  # False for NaN
        probability = log_ratio.clamp(max=0).exp().nan_to_num(0.0)
        return proposal.where(accepted, point), Move(probability, accepted, proposal.energy.isnan())


class WalkNoise:
    """The noise of each row's walk, by name: its start is that of the base chain of the same seed, bit for bit."""

    def __init__(
        self, seeds, draws: int, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype, domain: str
    ):  # fmt: skip
        self._chain = Noise(seeds, shape, device, dtype, domain)
        self._proposal = Noise(seeds, (draws, *shape), device, dtype, domain)
        self._draws, self._rows = draws, range(len(seeds))

    def start(self) -> Tensor:
        """xi (B, draws, *shape), called once."""
        parts = [self._chain.draw("start"), *(self._chain.draw("step") for _ in range(self._draws - 1))]
        return torch.stack(parts, 1)

    def proposal(self) -> Tensor:
        return self._proposal.draw("proposal")

    def log_uniform(self) -> Tensor:
        """log u (B,), u uniform on (0, 1)."""
        return self._chain.uniform("accept", self._rows).log()


class _Given:
    """Noise that is given: a chain reads xi (B, draws, *shape) in the order in which it would have drawn it."""

    def __init__(self, xi: Tensor):
        self._rest = iter(xi.unbind(1))

    def draw(self, stream: str, count: int | None = None) -> Tensor:
        return next(self._rest)
