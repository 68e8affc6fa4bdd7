"""The moment-matched twist."""

from typing import Any

import torch
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.guidance.guidance import Guidance, Step, per_row


class MomentMatched(Guidance):
    """psi_t = E[exp(-s E(a))], a ~ N(a(x0_hat), w), w = J S_t J^T, S_t = (sigma_t^2/alpha_t) d x0_hat/d x_t, J = da/dx0_hat.

    Second-order Tweedie covariance (Boys et al., Tweedie Moment Projected Diffusions, 2024) along the one direction
    that the unit reads. w is held fixed in the gradient, so that J's single pull-back v = (d x0_hat/d x_t)^T J gives
    both: w = (sigma_t^2/alpha_t) <J, v> and g = (d log psi / d a) v.
    """

    def cotangent(self, clean: Tensor, step: Step, rows: RowConstraint, memory: Any):
        u = rows.argument(rows.read(rows.decode(clean), step.log_snr))
        (jacobian,) = torch.autograd.grad(u.sum(), clean)

        def scale(v: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
            w = (jacobian * v).flatten(1).sum(1).clamp_min(0) * (step.sigma**2 / step.alpha)
            mean = u.detach().clone().requires_grad_()
            log_psi = rows.log_tilt(mean, w.detach().clone())
            (force,) = torch.autograd.grad(log_psi.sum(), mean)
            return per_row(force, v) * v, log_psi

        return jacobian, memory, scale
