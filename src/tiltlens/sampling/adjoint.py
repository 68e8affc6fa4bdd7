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
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.guidance.control import Control
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import Noise


@dataclass(frozen=True)
class Path:
    """Paths (B) of a controlled chain. estimates[k]: x0_hat at the start of step k, its graph kept to states[k], a leaf;
    shifts[k]: of the control there, with the graph of its parameters where asked, None at the last step. x_0 (B, *shape).
    path_kl, log_dpdq, energy (B,) float64."""

    states: list[Tensor]
    estimates: list[Tensor]
    shifts: list[Tensor | None]
    x_0: Tensor
    path_kl: Tensor
    log_dpdq: Tensor
    energy: Tensor

    @property
    def objective(self) -> Tensor:
        """(B,): path KL + s E has this mean, and where the control is optimal this value on every path: s E - log dP/dQ."""
        return self.energy - self.log_dpdq


def walk(chain: Chain, control: Control, rows: RowConstraint, noise: Noise, kept: Sequence[int]) -> Path:
    """Paths under the control; kept: the steps whose shift keeps its graph. energy is s E."""
    state, states, estimates, shifts = chain.start(noise), [], [], []
    x, path_kl, log_dpdq = state.x, state.path_kl, state.log_dpdq
    for number, (t, c) in enumerate(zip(chain.indices, chain.coefficients)):
        leaf = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            x0_hat = chain.denoiser(leaf, t)
            x0_hat = x0_hat.clamp(-1, 1) if chain.clip else x0_hat
        shift, z = None, None
        if number < len(chain) - 1:
            with torch.set_grad_enabled(number in kept):
                shift = shift_of(control, leaf.detach(), t, x0_hat.detach(), chain.clip)
            z = noise.draw("step")
        x = c.x0 * x0_hat.detach() + c.x * leaf.detach()
        if shift is not None:
            scaled = c.x0 * shift.detach().double().flatten(1) / c.v
            kl = scaled.square().sum(1) / 2
            path_kl = path_kl + kl
            log_dpdq = log_dpdq - kl - (scaled * z.double().flatten(1)).sum(1)
            x = x + c.x0 * shift.detach() + c.v * z
        states.append(leaf)
        estimates.append(x0_hat)
        shifts.append(shift)
    with torch.no_grad():
        energy = rows.strength.double() * rows.energy_of(rows.read(rows.decode(x))).double()
    return Path(states, estimates, shifts, x, path_kl, log_dpdq, energy)


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


def matching_loss(chain: Chain, path: Path, adjoint: Sequence[Tensor]) -> Tensor:
    """The mean over paths and the sum over steps, estimated from the steps whose shifts kept their graph."""
    terms = []
    for c, shift, a in zip(chain.coefficients, path.shifts, adjoint):
        if shift is not None and shift.requires_grad:
            residual = c.x0 * shift + c.v**2 * a
            terms.append(residual.square().flatten(1).sum(1).mean() / (2 * c.v**2))
    return torch.stack(terms).sum() * ((len(chain) - 1) / len(terms))
