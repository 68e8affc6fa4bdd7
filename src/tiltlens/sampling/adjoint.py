"""Adjoint matching: the soft-constraint objective s E_q[E] + path KL of a trained control, over the discrete chain.

Domingo-Enrich et al., Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models with Memoryless Stochastic
Optimal Control, 2024; here for the chain that is sampled, and not for the SDE. A step is x_r = mu(x_t) + delta_t + v z. With
V_r(x_r) = -log psi_r the cost to go, the best delta_t is stationary:

    delta_t = -v^2 E_z[grad V_r(x_r)].

Along a path of the present control the *lean adjoint* a is the gradient of the cost to go with the controls held fixed,

    a_0 = s grad E(a(x_0)),    a_t = (d mu / d x_t)^T a_r = c_x a_r + c_x0 J^T a_r,    J = d x0_hat / d x_t of the base denoiser,

which at the optimum is an unbiased sample of grad V. So the control is regressed on it,

    loss = sum_t |delta_t + v^2 a_r|^2 / (2 v^2),     x_t and a_r held fixed.

At a control of zero its gradient is that of the objective itself, path by path; its fixed points are the stationary points
of the objective. One backward through each base step, none through the control and none in sampling.

Paths are kept (`Matches`) and read several times: on a unit of a network the regression target is nearly noise, and it is
the number of readings that is cheap, not that of paths.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.guidance.control import Control
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import Noise


@dataclass(frozen=True)
class Path:
    """Paths (B) of a controlled chain. estimates[k]: x0_hat at the start of step k, its graph kept to states[k], a leaf.
    x_0 (B, *shape). path_kl, log_dpdq, energy (B,) float64; energy is s E."""

    states: list[Tensor]
    estimates: list[Tensor]
    x_0: Tensor
    path_kl: Tensor
    log_dpdq: Tensor
    energy: Tensor

    @property
    def objective(self) -> Tensor:
        """(B,): path KL + s E has this mean, and where the control is optimal this value on every path: s E - log dP/dQ."""
        return self.energy - self.log_dpdq


@dataclass(frozen=True)
class Matches:
    """What a control is regressed on, for the controlled steps of paths (P), the first ones: x_t, x0_hat and target (steps, P,
    *shape), target = -v^2 a_r / c_x0 that of the shift of the clean estimate."""

    x_t: Tensor
    x0_hat: Tensor
    target: Tensor

    def __len__(self) -> int:
        return self.x_t.shape[1]


def controlled_steps(chain: Chain, until: float | None) -> list[int]:
    """The steps that are controlled: those that begin at a log-SNR <= until (None: any), the last step never. Raises
    ValueError where there is none."""
    if chain.order != 1:
        raise ValueError(
            f"adjoint matching goes back through each step alone: expected a chain of order 1, found {chain.order}"
        )
    found = [k for k in range(len(chain) - 1) if until is None or float(chain.log_snr[k]) <= until]
    if not found:
        raise ValueError(
            f"no step of the chain begins at a log-SNR <= {until}: the first is {float(chain.log_snr[0]):.2f}"
        )
    return found


def walk(
    chain: Chain, control: Control, rows: RowConstraint, noise: Noise, until: float | None = None
) -> Path:
    """Paths under the control."""
    state, states, estimates = chain.start(noise), [], []
    x, path_kl, log_dpdq = state.x, state.path_kl, state.log_dpdq
    controlled = controlled_steps(chain, until)
    for number, (t, c) in enumerate(zip(chain.indices, chain.coefficients)):
        leaf = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            x0_hat = chain.denoiser(leaf, t)
            x0_hat = x0_hat.clamp(-1, 1) if chain.clip else x0_hat
        x = c.x0 * x0_hat.detach() + c.x * leaf.detach()
        z = noise.draw("step") if c.v > 0 else 0.0
        x = x + c.v * z
        if number in controlled:
            with torch.no_grad():
                delta = c.x0 * shift_of(control, leaf.detach(), t, x0_hat.detach(), chain.clip)
            scaled = delta.double().flatten(1) / c.v
            kl = scaled.square().sum(1) / 2
            path_kl = path_kl + kl
            log_dpdq = log_dpdq - kl - (scaled * z.double().flatten(1)).sum(1)
            x = x + delta
        states.append(leaf)
        estimates.append(x0_hat)
    with torch.no_grad():
        energy = rows.strength.double() * rows.energy_of(rows.read(rows.decode(x))).double()
    return Path(states, estimates, x, path_kl, log_dpdq, energy)


def shift_of(control: Control, x_t: Tensor, t: int, x0_hat: Tensor, clip: bool) -> Tensor:
    """What the control adds to the clean estimate, (B, *shape)."""
    adapted = control.estimate(x_t, t, x0_hat)
    return (adapted.clamp(-1, 1) if clip else adapted) - x0_hat


def lean_adjoint(chain: Chain, path: Path, rows: RowConstraint) -> list[Tensor]:
    """a at the end of each step, (B, *shape) each; the last is s grad E(a(x_0)). Frees the path's graphs."""
    with torch.enable_grad():
        x_0 = path.x_0.detach().clone().requires_grad_()
        cost = (rows.strength * rows.energy_of(rows.read(rows.decode(x_0)))).sum()
        (a,) = torch.autograd.grad(cost, x_0)
    out = []
    for number in reversed(range(len(chain))):
        out.append(a)
        if number == 0:
            break
        c, x0_hat = chain.coefficients[number], path.estimates[number]
        (pulled,) = torch.autograd.grad(x0_hat, path.states[number], (c.x0 * a).to(x0_hat.dtype))
        a = pulled + c.x * a
    return out[::-1]


def matches(chain: Chain, path: Path, adjoint: Sequence[Tensor], until: float | None = None) -> Matches:
    """What is left of paths once their graphs are freed."""
    steps = controlled_steps(chain, until)
    target = [-(chain.coefficients[k].v ** 2) / chain.coefficients[k].x0 * adjoint[k] for k in steps]
    return Matches(
        torch.stack([path.states[k].detach() for k in steps]),
        torch.stack([path.estimates[k].detach() for k in steps]),
        torch.stack(target),
    )


def joined(parts: Sequence[Matches]) -> Matches:
    """Paths of several walks."""
    return Matches(*(torch.cat([getattr(p, f.name) for p in parts], 1) for f in fields(Matches)))


def step_energy(chain: Chain, found: Matches) -> Tensor:
    """(steps,): the mean over paths of |v a_r|^2 / 2, what a step can be of use at most, and mostly noise."""
    scale = torch.tensor(
        [c.x0**2 / (2 * c.v**2) for c in chain.coefficients[: len(found.x_t)]], dtype=torch.float64
    )
    return scale * found.target.double().flatten(2).square().sum(2).mean(1).cpu()


def drawn_steps(energy: Tensor, count: int, generator: torch.Generator) -> tuple[list[int], list[float]]:
    """`count` steps with replacement, half of them by their `step_energy`, and the weights that make their sum unbiased."""
    p = (energy / energy.sum().clamp_min(1e-300) + 1 / len(energy)) / 2
    p = p / p.sum()
    numbers = torch.multinomial(p, count, replacement=True, generator=generator)
    return numbers.tolist(), (1 / (count * p[numbers])).tolist()


def matching_loss(
    chain: Chain,
    control: Control,
    found: Matches,
    paths: Tensor,
    numbers: Sequence[int],
    weights: Sequence[float],
) -> Tensor:
    """The sum over the steps `numbers` of weight x mean over `paths` of |delta_t + v^2 a_r|^2 / (2 v^2)."""
    terms = []
    for k, weight in zip(numbers, weights):
        c = chain.coefficients[k]
        shift = shift_of(control, found.x_t[k, paths], chain.indices[k], found.x0_hat[k, paths], chain.clip)
        residual = (shift - found.target[k, paths]).square().flatten(1).sum(1)
        terms.append(residual.mean() * (weight * c.x0**2 / (2 * c.v**2)))
    return torch.stack(terms).sum()
