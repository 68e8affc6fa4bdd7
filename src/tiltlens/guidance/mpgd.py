"""Manifold-preserving guidance: no gradient through the denoiser."""

from typing import Any

import torch
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.denoiser import Denoiser
from tiltlens.guidance.guidance import Guidance, Step, clean_estimate, clean_spread


class MPGD(Guidance):
    """x0_hat <- x0_hat + r_t^2 d(-s E)/d x0_hat: the posterior covariance S_t taken as r_t^2 I.

    He et al., Manifold Preserving Guided Diffusion, 2024 (without an autoencoder); r_t as in `LGD`.
    """

    def __init__(self, sigma_data: float = 0.5, profile: Any = None):
        super().__init__(profile)
        if not sigma_data > 0:
            raise ValueError(f"MPGD needs sigma_data > 0, found {sigma_data}")
        self.sigma_data = sigma_data

    def twist(self, denoiser: Denoiser, x_t: Tensor, step: Step, rows: RowConstraint, memory: Any):
        with torch.no_grad():
            x0_hat = clean_estimate(denoiser, x_t, step.t, step.clip)
        clean = x0_hat.detach().clone().requires_grad_()
        u = rows.argument(rows.read(rows.decode(clean), step.log_snr))
        log_psi = rows.log_tilt(u, 0.0)
        (h,) = torch.autograd.grad(log_psi.sum(), clean)
        # r_t^2 h stands for (sigma^2 / alpha) g, so that profile and the mask of strengths stay in one place
        g = h * (clean_spread(step, self.sigma_data) ** 2 * step.alpha / step.sigma**2)
        return x0_hat, g, log_psi, memory
